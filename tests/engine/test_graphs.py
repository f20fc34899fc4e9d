"""The graph cache's logic with the capture stood in for, and the capture with torch.cuda stood in
for; both for real under the marker `gpu`."""

import sys
from contextlib import contextmanager

import pytest
import torch
from engine_cases import examples, small_config
from rollout_cases import Rollout
from run_cases import run_command

from tempflow.errors import UserError
from tempflow.sampling.graphs import CannotCapture, Captured, CudaCapture, GraphCache
from tempflow.sampling.layout import iteration_units
from tempflow.types import Size


class Recorded:
    """A capture that behaves as a graph does: replay reads the static inputs, and writes over the
    outputs."""

    def __init__(self, nbytes=10, refuse=(), fail=(), wrong=(), off=0.0):
        self.nbytes, self.refuse, self.fail, self.wrong, self.off, self.shapes = (
            nbytes,
            refuse,
            fail,
            wrong,
            off,
            [],
        )

    def __call__(self, function, inputs):
        rows = len(inputs["x"])
        self.shapes.append(rows)
        if rows in self.refuse:
            raise CannotCapture("RuntimeError: called a synchronizing CUDA operation")
        if rows in self.fail:
            raise RuntimeError("operation not permitted when stream is capturing")
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        outputs = tuple(torch.full_like(t, 7.0) for t in function(**static))

        def replay():
            for buffer, value in zip(outputs, function(**static), strict=True):
                buffer.copy_(value + 1 if rows in self.wrong else value * (1 + self.off))

        return Captured(static, outputs, replay, self.nbytes)


def cache_of(capture, *, limit_bytes=1000, verify=True):
    notes = []
    return GraphCache(capture, limit_bytes=limit_bytes, verify=verify, note=notes.append), notes


def double(x, y):
    return 2 * x, x + y


def inputs(rows, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 3, generator=generator).to(dtype),
        "y": torch.randn(rows, 3, generator=generator),
    }


def check(cache, rows, seed=0):
    given = inputs(rows, seed)
    got = cache(double, given)
    assert all(torch.equal(one, other) for one, other in zip(got, double(**given), strict=True))
    return got


def test_one_capture_per_set_of_shapes():
    capture = Recorded()
    cache, notes = cache_of(capture)
    for seed in range(3):
        check(cache, 4, seed)
        check(cache, 2, seed)
    assert capture.shapes == [4, 2] and cache.captures == 2 and cache.replays == 6 and not notes
    cache(double, inputs(4, dtype=torch.bfloat16))
    assert capture.shapes == [4, 2, 4], "another dtype is another graph"


def test_results_survive_the_next_replay():
    cache, _ = cache_of(Recorded())
    first = check(cache, 4, seed=0)
    kept = [t.clone() for t in first]
    check(cache, 4, seed=1)
    assert all(torch.equal(one, other) for one, other in zip(first, kept, strict=True))


def test_the_least_recently_used_leave_beyond_the_limit():
    capture = Recorded(nbytes=10)
    cache, _ = cache_of(capture, limit_bytes=20)
    for rows in (1, 2, 1, 3):  # 2 is the oldest when 3 comes
        check(cache, rows)
    assert len(cache) == 2 and cache.nbytes == 20
    check(cache, 1)
    assert capture.shapes == [1, 2, 3]
    check(cache, 2)
    assert capture.shapes == [1, 2, 3, 2]


def test_one_graph_larger_than_the_limit_is_kept():
    cache, _ = cache_of(Recorded(nbytes=100), limit_bytes=20)
    check(cache, 1)
    check(cache, 1)
    assert len(cache) == 1 and cache.captures == 1


def test_what_cannot_be_captured_runs_eagerly_and_says_so_once():
    capture = Recorded(refuse=(2, 3))
    cache, notes = cache_of(capture)
    for rows in (2, 2, 3, 4, 4):
        check(cache, rows)
    assert capture.shapes == [2, 3, 4], "what was refused is not tried again"
    assert (
        len(notes) == 1
        and "2 rows" in notes[0]
        and "synchronizing" in notes[0]
        and "eagerly" in notes[0]
    )


def test_a_capture_that_fails_ends_the_run():
    """Nothing runs in that process any more: neither the function nor another capture."""
    capture, calls = Recorded(fail=(2,)), []
    cache, notes = cache_of(capture)

    def counted(x, y):
        calls.append(len(x))
        return (x + y,)

    with pytest.raises(
        UserError,
        match=(
            "rollout.graphs: .* 2 rows failed .*stream is capturing.* set rollout.graphs to false"
        ),
    ):
        cache(counted, inputs(2))
    assert not calls and not notes and len(cache) == 0


@pytest.mark.parametrize(
    "off, dtype, taken",
    [
        (1e-3, torch.bfloat16, True),
        (1e-1, torch.bfloat16, False),
        (1e-3, torch.float32, False),
        (1e-7, torch.float32, True),
    ],
)
def test_replays_are_compared_as_the_loosest_dtype_allows(off, dtype, taken):
    """The fp32 latent that a bf16 velocity moves may be as far off as the velocity."""
    cache, notes = cache_of(Recorded(off=off))
    cache(lambda x, y: (x, x.float() + y), inputs(4, dtype=dtype))
    assert (len(cache), len(notes)) == ((1, 0) if taken else (0, 1))


def test_a_wrong_replay_is_found_by_verification_only():
    cache, notes = cache_of(Recorded(wrong=(2,)))
    check(cache, 2)
    check(cache, 2)
    assert "other values" in notes[0] and len(cache) == 0
    cache, notes = cache_of(Recorded(wrong=(2,)), verify=False)
    given = inputs(2)
    assert torch.equal(cache(double, given)[0], double(**given)[0] + 1) and not notes


def test_nan_is_no_reason_to_refuse():
    cache, notes = cache_of(Recorded())
    given = inputs(2)
    given["x"][0, 0] = float("nan")
    assert cache(double, given)[0].isnan().sum() == 1 and not notes


def test_weights_that_moved_invalidate():
    module, capture = torch.nn.Linear(3, 3), Recorded()
    cache, notes = cache_of(capture)
    cache.watch(module.parameters())
    check(cache, 4)
    with torch.no_grad():
        module.weight.copy_(torch.zeros(3, 3))  # in place, as a refresh does
    cache.watch(module.parameters())
    check(cache, 4)
    assert capture.shapes == [4] and not notes
    module.weight.data = torch.ones(3, 3)
    cache.watch(module.parameters())
    check(cache, 4)
    assert capture.shapes == [4, 4] and "moved" in notes[0]


# -------------------------------------------------------------------------------- torch.cuda's part
class Cuda:
    """torch.cuda as far as a capture uses it: a cache that is emptied first, waits that can be
    errors, and a capture that fails as torch's does, in ending, before its stream is left."""

    def __init__(self, monkeypatch, ends_well=True):
        self.reserved, self.cached, self.mode, self.stream, self.modes, self.ends_well = (
            1000,
            400,
            0,
            "main",
            [],
            ends_well,
        )
        stream = type("Stream", (), {"wait_stream": lambda self, other: None})
        graph = type("Graph", (), {"replay": lambda self: None})
        for name in ("empty_cache", "graph", "stream"):
            monkeypatch.setattr(
                torch.cuda, name, getattr(self, name if name != "stream" else "on_stream")
            )
        for name, value in {
            "Stream": stream,
            "CUDAGraph": graph,
            "current_stream": lambda: stream(),
            "synchronize": lambda: None,
            "set_stream": lambda chosen: setattr(self, "stream", "main"),
            "graph_pool_handle": lambda: (0, 1),
            "memory_reserved": lambda: self.reserved,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def empty_cache(self):
        self.reserved, self.cached = self.reserved - self.cached, 0

    @contextmanager
    def on_stream(self, stream):
        yield

    @contextmanager
    def graph(self, graph, pool, capture_error_mode):
        assert capture_error_mode == "thread_local", "NCCL's own thread must not end a capture"
        self.empty_cache()
        self.stream = "capture"
        yield
        if not self.ends_well:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.stream = "main"
        self.reserved += 64

    def forward(self, x):
        self.modes.append((self.mode, self.stream))
        return (2 * x,)

    def waiting(self, x):
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation\n  in this line")
        return self.forward(x)


def test_a_capture_is_preceded_by_a_run_that_must_not_wait(monkeypatch):
    cuda = Cuda(monkeypatch)
    x = torch.ones(3, 4)
    captured = CudaCapture()(cuda.forward, {"x": x})
    assert cuda.modes == [(0, "main")] * 2 + [("error", "main"), (0, "capture")]
    assert captured.nbytes == x.nbytes + 64, (
        "what the capture reserved, though it emptied the cache first"
    )


def test_what_waits_is_refused_before_a_capture_begins(monkeypatch):
    cuda = Cuda(monkeypatch)
    with pytest.raises(
        CannotCapture, match=r"RuntimeError: called a synchronizing CUDA operation$"
    ):
        CudaCapture()(cuda.waiting, {"x": torch.ones(3)})
    assert cuda.mode == 0 and {stream for _, stream in cuda.modes} == {"main"}


def test_a_failed_capture_leaves_its_stream(monkeypatch):
    cuda = Cuda(monkeypatch, ends_well=False)
    cache, _ = cache_of(CudaCapture())
    with pytest.raises(UserError, match="previous error during capture"):
        cache(cuda.forward, {"x": torch.ones(3, 1)})
    assert cuda.stream == "main"


# --------------------------------------------------------------------------------- in the scheduler
def plain(x, sigma, units):
    """By row alone, so that padding rows do not matter."""
    return sigma.reshape(-1, 1, 1) * x.clamp(-1, 1)


@pytest.mark.parametrize("suffix", [None, {}])
def test_a_rollout_through_the_cache_equals_an_eager_one(suffix):
    """With every forward of one size, so that one graph does."""
    config = small_config(
        rollout={"plan": {"branch_steps": "all", "children": 3}, "suffix": suffix}
    )
    units = iteration_units([5, 9], 1)
    capture = Recorded()
    cache, notes = cache_of(capture)
    graphed = Rollout(config, units, velocity=plain, micro_batch=16, execute=cache, pad=True)
    eager = Rollout(config, units, velocity=plain, micro_batch=16)
    assert capture.shapes == [16] and not notes
    assert graphed.finished.keys() == eager.finished.keys()
    for place, latent in eager.finished.items():
        assert torch.equal(graphed.finished[place], latent)
    for place, state in eager.states.items():
        assert torch.equal(graphed.states[place].log_prob, state.log_prob)
    assert graphed.stats.forwards == eager.stats.forwards and eager.stats.padded == 0
    assert graphed.stats.padded == 16 * graphed.stats.batches - graphed.stats.forwards > 0


# ----------------------------------------------------------------------------------------- hardware
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capture_and_replay_of_the_shipped_model(dtype):
    """A captured forward equals an eager one, follows its inputs, and follows weights refreshed in
    place."""
    from engine_cases import MODEL

    from tempflow.models import load_policy

    policy = load_policy(
        MODEL, dtype=str(dtype).removeprefix("torch."), device="cuda", max_sequence_length=20
    )
    conditioning = policy.encode(examples(['the word "HELLO"'] * 4))
    shape = policy.latent_shape(Size(32, 96))

    def forward(x, sigma, **given):
        return (policy.velocity(policy.transformer, x, sigma, given, Size(32, 96), 0.0),)

    def given(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(4, *shape, device="cuda", generator=generator)
        return {"x": x, "sigma": torch.rand(4, device="cuda", generator=generator), **conditioning}

    cache, notes = cache_of(CudaCapture(), limit_bytes=1 << 30)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for seed in range(3):
        if seed == 2:
            with torch.no_grad():
                policy.transformer.proj_out.weight.mul_(1.5)
        got, want = cache(forward, given(seed))[0], forward(**given(seed))[0]
        assert (got.float() - want.float()).norm() <= tolerance * want.float().norm()
    assert cache.captures == 1 and cache.replays == 3 and not notes


@pytest.mark.gpu
def test_a_forward_that_reads_a_value_runs_eagerly():
    """Refused in its checked run, after which captures go on as ever."""
    cache, notes = cache_of(CudaCapture(), limit_bytes=1 << 30)
    before = torch.cuda.current_stream()

    def reads(x):
        return (x * x.sum().item(),)

    def plain(x):
        return (3 * x,)

    x = torch.randn(4, 8, device="cuda")
    for _ in range(2):
        assert torch.equal(cache(reads, {"x": x})[0], reads(x)[0])
        assert torch.equal(cache(plain, {"x": x})[0], 3 * x)
    assert "synchroniz" in notes[0] and cache.captures == 1 and cache.nbytes > 0
    assert torch.cuda.current_stream() == before and torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.gpu
def test_a_capture_that_fails_on_hardware_ends_in_one_message():
    """In a process of its own, which it spoils: a wait for the whole device is no error in the
    checked run."""
    code = """if True:
        import torch
        from tempflow import cli
        from tempflow.sampling.graphs import CudaCapture, GraphCache

        def waits(x):
            torch.cuda.synchronize()
            return (2 * x,)

        def main():
            before = torch.cuda.current_stream()
            cache = GraphCache(CudaCapture(), limit_bytes=1 << 30, verify=True, note=print)
            try:
                cache(waits, {"x": torch.ones(4, 4, device="cuda")})
            finally:
                print("same stream" if torch.cuda.current_stream() == before else "another stream")
        cli.run(main)
    """
    done = run_command([sys.executable, "-c", code])
    assert done.returncode == 2 and "same stream" in done.stdout, done.stdout + done.stderr
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error: rollout.graphs: the capture of a forward of 4 rows failed")
    )
