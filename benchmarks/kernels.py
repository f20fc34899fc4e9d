"""Measures `tempflow_kernels` against the memory that must be moved, and against the same formulas
in PyTorch.

    python benchmarks/kernels.py                    # GPU: FLUX-1024 and SD3.5-512
    python benchmarks/kernels.py --cases sde --compile

Without a GPU it times the PyTorch reference at small sizes instead of the Triton kernels; such a
report says nothing about a GPU.

A row is one case: the bytes that any implementation must move, the median time with its 20% and 80%
quantiles, the bandwidth as a share of a device copy that was measured in the same run, and the
ratio to the eager chain of small fp32 operations that GRPO codebases run (with --compile also to
that chain under torch.compile). Every case is first compared with the chain; a case that disagrees
is an error and gets no time. On a GPU the inputs rotate through sets that are larger than the L2
cache, and one CUDA graph holds all launches of a measurement. The report is written to
benchmarks/results/ as JSON after every row, with a plot at the end.

The goal is 90% of the copy's bandwidth. The SDE step with bf16 children cannot reach it: making a
normal number takes as many instructions for 2 bytes as for 4, and issuing these takes about twice
as long as moving the bytes, so such a case cannot exceed about 50% of the copy. The column "of
bound" takes this into account: it is the share of what the slower of the two, the copy and the
issue of the kernel's instructions, allows.
"""

import argparse
import datetime
import functools
import itertools
import json
import math
import statistics
import time
from pathlib import Path

import torch

from tempflow.run.environment import device_name
from tempflow.run.logs import write_atomic
from tempflow_kernels import group_loss, sde_step

RESULTS = Path(__file__).parent / "results"
SIZES = {"FLUX-1024": (4096, 64), "SD3.5-512": (16, 64, 64)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLIP = {"clip_low": 1e-4, "clip_high": 1e-4}
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def inputs(shape, rows, children, dtype, device, ode):
    """The arguments of one decision: states, velocities, coefficients of a flow SDE step at sigma
    0.6, and its children."""
    x, velocity = (torch.randn(rows, *shape, device=device).to(dtype) for _ in range(2))
    a, b, tau = (
        torch.full((rows,), value, device=device) for value in (0.92, -0.14, 0.0 if ode else 0.27)
    )
    key = torch.randint(-(2**62), 2**62, (rows, children), device=device)
    x_next, log_prob = sde_step(x, velocity, a, b, tau, key=key, children=children)
    return {
        "x": x,
        "velocity": velocity,
        "a": a,
        "b": b,
        "tau": tau,
        "key": key,
        "x_next": x_next,
        "log_prob": log_prob,
        "advantage": torch.randn(rows, children, device=device),
        "weight": torch.ones(rows, device=device),
    }


def expand(scalar, like):
    return scalar.view(-1, *[1] * (like.ndim - 1))


def eager_step(x, velocity, a, b, tau, noise):
    """The step and its log-probability as a chain of PyTorch operations on all children at once.
    noise: [N, B, ...]."""
    mean = (expand(a, x) * x.float() + expand(b, x) * velocity.float())[:, None]
    std = expand(tau, mean)
    x_next = (mean + std * noise).to(x.dtype)
    density = -((x_next.float() - mean) ** 2) / (2 * std**2) - torch.log(std) - HALF_LOG_2PI
    return x_next, density.flatten(2).mean(dim=2)


def eager_sde(case):
    """The same with noise from PyTorch's own generator, as other projects do it."""
    noise = torch.randn(*case["key"].shape, *case["x"].shape[1:], device=case["x"].device)
    return eager_step(*pick(case, "x", "velocity", "a", "b", "tau"), noise)


def eager_ode(case):
    x = case["x"]
    return (expand(case["a"], x) * x.float() + expand(case["b"], x) * case["velocity"].float()).to(
        x.dtype
    )[:, None]


def eager_loss(velocity, case):
    x, tau = case["x"], expand(case["tau"], case["x_next"])
    mean = (expand(case["a"], x) * x.float() + expand(case["b"], x) * velocity.float())[:, None]
    density = -((case["x_next"].float() - mean) ** 2) / (2 * tau**2) - torch.log(tau) - HALF_LOG_2PI
    ratio = torch.exp(density.flatten(2).mean(dim=2) - case["log_prob"])
    clipped = ratio.clamp(1 - CLIP["clip_low"], 1 + CLIP["clip_high"])
    per_child = torch.maximum(-case["advantage"] * ratio, -case["advantage"] * clipped)
    return (case["weight"] * per_child.mean(dim=1)).mean()


def pick(case, *names):
    return [case[name] for name in names]


def our_step(case):
    inputs = pick(case, "x", "velocity", "a", "b", "tau")
    return sde_step(*inputs, key=case["key"], children=case["key"].shape[1])


def our_loss(velocity, case):
    inputs = pick(case, "x", "x_next", "a", "b", "tau", "log_prob", "advantage", "weight")
    return group_loss(velocity, *inputs, **CLIP)[0]


def with_gradient(loss, case):
    velocity = case["velocity"].detach().requires_grad_()
    return torch.autograd.grad(loss(velocity, case), velocity)[0]


def step_bytes(rows, children, numel, size):
    return rows * numel * size * (2 + children)


def gradient_bytes(rows, children, numel, size):
    """Bytes of the forward (x, v and children once) and of the backward (the same again, and the
    gradient)."""
    return rows * numel * size * (2 * (2 + children) + 1)


# name -> (ours, eager, bytes, whether tau = 0)
OPS = {
    "ode": (our_step, eager_ode, step_bytes, True),
    "sde": (our_step, eager_sde, step_bytes, False),
    "loss": (
        lambda c: our_loss(c["velocity"], c),
        lambda c: eager_loss(c["velocity"], c),
        step_bytes,
        False,
    ),
    "loss+grad": (
        lambda c: with_gradient(our_loss, c),
        lambda c: with_gradient(eager_loss, c),
        gradient_bytes,
        False,
    ),
}


def check(name, case):
    """Compare our result with the chain's for this case; for the SDE step, the chain gets our
    noise."""
    ours, eager, _, _ = OPS[name]
    if name == "sde":
        from tempflow_kernels import normal

        noise = normal(case["key"], case["x"][0].numel()).view(
            *case["key"].shape, *case["x"].shape[1:]
        )
        got, want = our_step(case), eager_step(*pick(case, "x", "velocity", "a", "b", "tau"), noise)
        agree(name, got[1], want[1], 1e-5)
        got, want = got[0], want[0]
    else:
        got, want = (
            result[0] if isinstance(result, tuple) else result
            for result in (ours(case), eager(case))
        )
    agree(name, got, want, 1e-5 if got.dtype == torch.float32 else 2 * torch.finfo(got.dtype).eps)


def agree(name, got, want, tolerance):
    error = ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-3)).item()
    if not error <= tolerance:
        raise SystemExit(
            f"{name}: differs from the PyTorch chain by {error:.1e} (allowed {tolerance:.0e}); not"
            " timed"
        )


def time_cpu(function, cases, repeats):
    function(cases[0])
    samples = []
    for i in range(repeats):
        start = time.perf_counter()
        function(cases[i % len(cases)])
        samples.append(time.perf_counter() - start)
    return samples


def time_gpu(function, cases, repeats):
    """Seconds per call, from replays of one graph that runs every case once, which excludes launch
    gaps and hits in the L2 cache."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for case in cases[:2]:
            function(case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for case in cases:
            function(case)
    graph.replay()
    samples = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3 / len(cases))
    return samples


def quantiles(samples):
    cuts = statistics.quantiles(samples, n=5)
    return {"median": statistics.median(samples), "p20": cuts[0], "p80": cuts[3]}


def copy_bandwidth(device, timer, repeats):
    """Bytes per second, read plus written, of the device's own copy: the upper limit of this
    run."""
    numel = 2**28 if device.type == "cuda" else 2**24
    source, target = torch.randn(numel, device=device), torch.empty(numel, device=device)
    return 2 * 4 * numel / statistics.median(timer(lambda _: target.copy_(source), [None], repeats))


def enough_cases(make, case_bytes, device):
    """The number of input sets: 1 on a CPU; on a GPU as many as fill its L2 cache four times, at
    most 64."""
    if device.type != "cuda":
        return [make()]
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return [make() for _ in range(min(64, max(2, math.ceil(4 * l2 / case_bytes))))]


def measure(name, size, rows, children, dtype, device, timer, ceiling, arguments):
    ours, eager, count_bytes, ode = OPS[name]
    moved = count_bytes(rows, children, math.prod(SIZES[size]), DTYPES[dtype].itemsize)
    cases = enough_cases(
        lambda: inputs(SIZES[size], rows, children, DTYPES[dtype], device, ode), moved, device
    )
    check(name, cases[0])
    row = {
        "op": name,
        "size": size,
        "rows": rows,
        "children": children,
        "dtype": dtype,
        "bytes": moved,
    }
    row["seconds"] = quantiles(timer(ours, cases, arguments.repeats))
    row["bytes_per_second"] = moved / row["seconds"]["median"]
    row["share_of_copy"] = row["bytes_per_second"] / ceiling
    row["eager_seconds"] = quantiles(timer(eager, cases, arguments.repeats))
    row["times_eager"] = row["eager_seconds"]["median"] / row["seconds"]["median"]
    if arguments.compile:
        row["compiled_seconds"] = quantiles(timer(torch.compile(eager), cases, arguments.repeats))
        row["times_compiled"] = row["compiled_seconds"]["median"] / row["seconds"]["median"]
    floor = (
        noise_floor(rows * children * math.prod(SIZES[size]), dtype, device)
        if name == "sde" and device.type == "cuda"
        else None
    )
    row["arithmetic_floor_seconds"] = floor
    row["share_of_bound"] = max(moved / ceiling, floor or 0.0) / row["seconds"]["median"]
    return row


@functools.cache
def noise_instructions(dtype, capability):
    import aot  # it needs triton
    from triton.backends.compiler import GPUTarget

    variant = aot.step("benchmark", dtype, dtype, dtype)
    compiled = aot.compile_for(variant, GPUTarget("cuda", capability[0] * 10 + capability[1], 32))
    return aot.inspect_cuda(variant, compiled)["noise_instructions_per_element"]


def noise_floor(elements, dtype, device):
    """Seconds to issue the SDE step's instructions at 128 lanes per clock and multiprocessor.

    None on ROCm, and if the driver does not report the clock (CUDA 13 removed the field from
    cudaDeviceProp).
    """
    properties = torch.cuda.get_device_properties(device)
    clock_khz = getattr(properties, "clock_rate", None)
    if torch.version.hip or not clock_khz:
        return None
    lanes_per_second = properties.multi_processor_count * 128 * clock_khz * 1e3
    return (
        elements
        * noise_instructions(dtype, torch.cuda.get_device_capability(device))
        / lanes_per_second
    )


def table(rows):
    head = (
        "| op | size | N | B | dtype | MB | time, us (p20 - p80) | GB/s | of copy | of bound | x"
        " eager | x compiled |"
    )
    lines = [head, "|" + " --- |" * head.count(" | ") + " --- |"]
    for r in rows:
        t = {name: value * 1e6 for name, value in r["seconds"].items()}
        compiled = f"{r['times_compiled']:.1f}" if "times_compiled" in r else ""
        lines.append(
            f"| {r['op']} | {r['size']} | {r['rows']} | {r['children']} | {r['dtype']} |"
            f" {r['bytes'] / 1e6:.1f} | {t['median']:.1f} ({t['p20']:.1f} - {t['p80']:.1f}) |"
            f" {r['bytes_per_second'] / 1e9:.0f} | {r['share_of_copy']:.0%} |"
            f" {r['share_of_bound']:.0%} | {r['times_eager']:.1f} | {compiled} |"
        )
    return "\n".join(lines)


def plot(report, path):
    """A roofline plot: bytes against time with one point per case, and the measured copy as a
    line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    for name, marker in zip(OPS, "osd^"):
        points = [(r["bytes"], r["seconds"]["median"]) for r in report["rows"] if r["op"] == name]
        if points:
            axes.scatter(*zip(*points), marker=marker, label=name)
    ends = [f(r["bytes"] for r in report["rows"]) for f in (min, max)]
    axes.plot(
        ends,
        [e / report["copy_bytes_per_second"] for e in ends],
        color="black",
        label="device copy",
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bytes that must move",
        ylabel="seconds",
        title=report["what"],
    )
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def parse_arguments(on_gpu, given=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=list(SIZES) if on_gpu else ["SD3.5-512"]
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 9, 36] if on_gpu else [1, 9])
    parser.add_argument("--children", nargs="+", type=int, default=[1, 6])
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES) if on_gpu else ["fp32"]
    )
    parser.add_argument("--repeats", type=int, default=50 if on_gpu else 10)
    parser.add_argument(
        "--compile", action="store_true", help="also time the PyTorch chain under torch.compile"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report")
    return parser.parse_args(given)


def cases(arguments):
    """The (size, op, rows, children, dtype) of every case."""
    chosen = itertools.product(
        arguments.sizes, arguments.cases, arguments.rows, arguments.children, arguments.dtypes
    )
    return [case for case in chosen if not (case[1] == "ode" and case[3] > 1)]


def run(arguments, device, keep):
    """Measure every case and return the report. keep(report) is called after each case with the
    report so far."""
    timer = time_gpu if device.type == "cuda" else time_cpu
    implementation = (
        "Triton kernels"
        if device.type == "cuda"
        else "PyTorch reference, no GPU: not the Triton kernels"
    )
    report = {
        "what": f"{implementation} on {device_name()}, {torch.get_num_threads()} threads",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "copy_bytes_per_second": copy_bandwidth(device, timer, arguments.repeats),
        "rows": [],
    }
    print(
        f"{report['what']}, torch {report['torch']}, copy"
        f" {report['copy_bytes_per_second'] / 1e9:.1f} GB/s\n"
    )
    for size, name, rows, children, dtype in cases(arguments):
        row = measure(
            name,
            size,
            rows,
            children,
            dtype,
            device,
            timer,
            report["copy_bytes_per_second"],
            arguments,
        )
        report["rows"].append(row)
        keep(report)
    return report


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = parse_arguments(device.type == "cuda")
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = arguments.output / f"kernels-{device.type}-{datetime.date.today().isoformat()}"
    report = run(
        arguments,
        device,
        lambda report: write_atomic(stem.with_suffix(".json"), json.dumps(report, indent=1) + "\n"),
    )
    print(table(report["rows"]))
    plot(report, stem.with_suffix(".png"))
    print(f"\n{stem}.json, {stem}.png")


if __name__ == "__main__":
    main()
