"""The graph cache's logic with the capture stood in for; capture and replay for real under the marker `gpu`."""

import pytest
import torch
from engine_cases import small_config
from rollout_cases import Rollout

from tempflow.rollout.graphs import Captured, CudaCapture, GraphCache
from tempflow.rollout.plan import iteration_units


class Recorded:
    """A capture that behaves as a graph does: replay reads the static inputs, and writes over the outputs."""

    def __init__(self, nbytes=10, fail=(), wrong=()):
        self.nbytes, self.fail, self.wrong, self.shapes = nbytes, fail, wrong, []

    def __call__(self, function, inputs):
        rows = len(inputs["x"])
        self.shapes.append(rows)
        if rows in self.fail:
            raise RuntimeError("operation not permitted when stream is capturing")
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        outputs = tuple(torch.full_like(t, 7.0) for t in function(**static))

        def replay():
            for buffer, value in zip(outputs, function(**static), strict=True):
                buffer.copy_(value + 1 if rows in self.wrong else value)

        return Captured(static, outputs, replay, self.nbytes)


def cache_of(capture, *, limit_bytes=1000, verify=True):
    notes = []
    return GraphCache(capture, limit_bytes=limit_bytes, verify=verify, note=notes.append), notes


def double(x, y):
    return 2 * x, x + y


def inputs(rows, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, 3, generator=generator).to(dtype), "y": torch.randn(rows, 3, generator=generator)}


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
    capture = Recorded(fail=(2, 3))
    cache, notes = cache_of(capture)
    for rows in (2, 2, 3, 4, 4):
        check(cache, rows)
    assert capture.shapes == [2, 3, 4], "what was refused is not tried again"
    assert len(notes) == 1 and "2 rows" in notes[0] and "stream is capturing" in notes[0] and "eagerly" in notes[0]


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


# ----------------------------------------------------------------------------------------------- in the scheduler
def plain(x, sigma, units):
    """By row alone, so that padding rows do not matter."""
    return sigma.reshape(-1, 1, 1) * x.clamp(-1, 1)


@pytest.mark.parametrize("suffix", [None, {}])
def test_a_rollout_through_the_cache_equals_an_eager_one(suffix):
    """With every forward of one size, so that one graph does."""
    config = small_config(rollout={"branch_steps": "all", "children": 3, "suffix": suffix})
    units = iteration_units([5, 9], 1)
    capture = Recorded()
    cache, notes = cache_of(capture)
    graphed = Rollout(config, units, velocity=plain, micro_batch=16, run=cache, pad=True)
    eager = Rollout(config, units, velocity=plain, micro_batch=16)
    assert capture.shapes == [16] and not notes
    assert graphed.finished.keys() == eager.finished.keys()
    for place, latent in eager.finished.items():
        assert torch.equal(graphed.finished[place], latent)
    for place, decision in eager.decisions.items():
        assert torch.equal(graphed.decisions[place].log_prob, decision.log_prob)
    assert graphed.stats.forwards == eager.stats.forwards and eager.stats.padded == 0
    assert graphed.stats.padded == 16 * graphed.stats.batches - graphed.stats.forwards > 0


# -------------------------------------------------------------------------------------------------------- hardware
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capture_and_replay_of_the_shipped_model(dtype):
    """A captured forward equals an eager one, follows its inputs, and follows weights refreshed in place."""
    from engine_cases import MODEL

    from tempflow.policy import load_policy

    policy = load_policy(MODEL, dtype=str(dtype).removeprefix("torch."), device="cuda", max_sequence_length=20)
    conditioning = policy.encode(['the word "HELLO"'] * 4)
    shape = policy.latent_shape(32, 96)

    def forward(x, sigma, **given):
        return (policy.velocity(policy.transformer, x, sigma, given, height=32, width=96, guidance_scale=0.0),)

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
