"""The ops as torch custom ops: registration, compilation, autocast, and the choice of
implementation."""

import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import drift, loss_case, step_case

from tempflow_kernels import group_loss, normal, sde_step

ops = torch.ops.tempflow


def step_arguments(device, **options):
    case = step_case(3, (4, 25), 2, still_rows=[1], device=device)
    return (*case.values(), options.get("out_dtype", torch.float32))


def loss_arguments(device, ratio="plain"):
    case = loss_case(3, (40,), 2, padding_rows=[1], device=device)
    velocity = case.pop("velocity").requires_grad_()
    order = ("x", "x_next", "a", "b", "tau", "log_prob_old", "advantage", "weight")
    old = drift(velocity.detach(), 0.1) if ratio == "guard" else None
    return (
        velocity,
        *(case[name] for name in order),
        1e-3,
        2e-3,
        drift(velocity.detach(), 0.2),
        0.05,
        "x",
        ratio,
        old,
    )


def backward_arguments(device):
    case = loss_case(2, (30,), 3, device=device)
    return (
        torch.ones((), device=device),
        case["velocity"],
        case["x"],
        case["x_next"],
        case["a"],
        case["b"],
        case["advantage"],
        case["weight"],
        drift(case["velocity"], 0.2),
        None,
    )


@pytest.mark.parametrize(
    "name", ["normal", "sde_step", "sde_step bf16", "group_loss", "group_loss guard", "backward"]
)
def test_opcheck(device, name):
    """torch.library.opcheck: schema, fake implementation, autograd registration, AOT dispatch with
    dynamic shapes."""
    op, arguments = {
        "normal": lambda: (ops.normal, (torch.arange(6, device=device).reshape(2, 3), 37)),
        "sde_step": lambda: (ops.sde_step, step_arguments(device)),
        "sde_step bf16": lambda: (ops.sde_step, step_arguments(device, out_dtype=torch.bfloat16)),
        "group_loss": lambda: (ops.group_loss, loss_arguments(device)),
        "group_loss guard": lambda: (ops.group_loss, loss_arguments(device, "guard")),
        "backward": lambda: (ops.group_loss_backward, backward_arguments(device)),
    }[name]()
    torch.library.opcheck(op.default, arguments)


def training_step(weight, features, case, options):
    """A linear model of the velocity, its loss and its statistics: what a compiled training step
    contains."""
    velocity = (features @ weight).unflatten(-1, case["x"].shape[1:])
    loss, stats = group_loss(velocity, **case, **options)
    return loss + 0 * stats.kl, stats.ratio


def test_compiles_as_one_graph(device):
    """torch.compile(fullgraph=True) of a model, the loss and its gradient equals eager, bit for
    bit."""
    case = loss_case(3, (8, 5), 4, device=device)
    velocity = case.pop("velocity")
    options = {
        "clip_low": 1e-3,
        "clip_high": 1e-3,
        "velocity_ref": drift(velocity, 0.1),
        "kl_coef": 0.01,
    }
    features, found = torch.randn(3, 7, device=device), []
    initial = torch.randn(7, 40, device=device)
    for step in (training_step, torch.compile(training_step, fullgraph=True, backend="aot_eager")):
        weight = initial.clone().requires_grad_()
        loss, ratio = step(weight, features, case, options)
        loss.backward()
        found.append((loss.detach(), ratio, weight.grad))
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*found))


def test_step_compiles_for_any_batch_size(device):
    def step(x, velocity, a, b, tau, key):
        x_next, log_prob = sde_step(2 * x, velocity, a, b, tau, key=key, children=3)
        return x_next + 1, log_prob

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5):
        case = step_case(rows, (33,), 3, device=device)
        assert all(torch.equal(got, want) for got, want in zip(compiled(**case), step(**case)))


def test_compiles_with_inductor():
    """The default backend, on a CPU through its C++ code generator."""
    case = loss_case(3, (8, 5), 4)
    velocity = case.pop("velocity")
    weight, features = torch.randn(7, 40, requires_grad=True), torch.randn(3, 7)
    options = {"clip_low": 1e-3, "clip_high": 1e-3}
    eager = training_step(weight, features, case, options)[0]
    compiled = torch.compile(training_step, fullgraph=True)(weight, features, case, options)[0]
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    assert velocity.shape == case["x"].shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(device, dtype):
    case = loss_case(2, (50,), 3, device=device)
    want, _ = group_loss(**case, clip_low=1e-3, clip_high=1e-3)
    with torch.autocast(device.type, dtype=dtype):
        got, stats = group_loss(**case, clip_low=1e-3, clip_high=1e-3)
        x_next, log_prob = sde_step(**step_case(2, (50,), 3, device=device), children=3)
    assert torch.equal(got, want)
    assert {tensor.dtype for tensor in (got, stats.log_prob, log_prob, x_next)} == {torch.float32}


def test_the_two_implementations_agree(monkeypatch):
    """Reference and Triton on the same inputs: fp32 rounding apart, for every output."""
    if torch.cuda.is_available():
        pytest.skip(
            "the reference runs on the CPU and Triton on the GPU: each is tested against float64"
            " instead"
        )
    step, loss = step_case(3, (5003,), 2, still_rows=[0]), loss_case(3, (5003,), 2)
    found = []
    for choice in ("reference", "triton"):
        monkeypatch.setenv("TEMPFLOW_KERNELS", choice)
        value, stats = group_loss(**loss, clip_low=1e-3, clip_high=1e-3)
        found.append((*sde_step(**step, children=2), value, *stats))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-6)


def test_unknown_choice_is_an_error(monkeypatch):
    monkeypatch.setenv("TEMPFLOW_KERNELS", "cuda")
    with pytest.raises(
        ValueError, match="TEMPFLOW_KERNELS='cuda': expected one of auto, reference, triton"
    ):
        normal(torch.zeros(1, dtype=torch.int64), 4)


def run_python(code, **environment):
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "TEMPFLOW_KERNELS")
    }
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **environment}
    )


CALL = (
    "import torch; from tempflow_kernels import normal; print(normal(torch.zeros(1,"
    " dtype=torch.int64), 2).shape)"
)


@pytest.mark.parametrize(
    "prelude, environment, message",
    [
        ("", {}, "is not a GPU, and TRITON_INTERPRET=1 is not set"),
        (
            "import triton, os; os.environ['TRITON_INTERPRET'] = '1'; ",
            {},
            "TRITON_INTERPRET was set after triton had been",
        ),
        ("import sys; sys.modules['triton'] = None; ", {}, "the package triton is not installed"),
    ],
    ids=["no GPU", "too late", "no triton"],
)
def test_a_forced_path_that_cannot_run_says_why(prelude, environment, message):
    result = run_python(prelude + CALL, TEMPFLOW_KERNELS="triton", **environment)
    assert result.returncode != 0 and message in result.stderr


def test_the_cpu_path_does_not_import_triton():
    """Nor needs it: triton is an extra of the distribution."""
    result = run_python("import sys; sys.modules['triton'] = None; " + CALL)
    assert result.returncode == 0 and "torch.Size([1, 2])" in result.stdout, result.stderr
