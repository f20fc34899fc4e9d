"""The policy ratio: exactly 1 before the first update, whatever the step, the storage and the loss.

The chain: log-probability taken in the rollout == taken from what was stored == taken by training's
forward == taken again.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from bench import one_child_per_state
from engine_cases import Iteration, PlainRuntime, small_config
from kernel_cases import assert_close

from tempflow.objectives import Seen
from tempflow.objectives.grpo import Grpo
from tempflow.training.update import Part
from tempflow.training.update_stats import UpdateStats
from tempflow_kernels import group_loss, sde_step


def test_a_ratio_that_is_no_number_is_no_deviation_of_zero():
    stats = UpdateStats(Grpo().clip_high)
    for value in (1.0, float("nan"), 1.0):
        ratio = torch.full((2, 3), value)
        seen = Seen(ratio, ratio, kl=torch.zeros(()), clip_fraction=torch.zeros(()))
        batch = SimpleNamespace(real=2, units=[None] * 2)
        stats.add(batch, seen, torch.zeros(()), first=False)
    assert math.isnan(stats.reduced()["ratio/max_dev"])


KINDS = ("flow", "dance", "cps")
LOG_PROB = (
    2e-6  # fp32, of values of size 1: forwards of other batch shapes differ in their last bits
)


def config_of(sde, **training):
    plan = {"branch_steps": [0, 2, 3], "seeds": 2, "children": 2}
    return small_config(rollout={"sde": sde, "num_steps": 5, "plan": plan}, training=training)


@pytest.fixture(scope="module")
def iterations(policy):
    """One rollout of the shipped model per kind of step."""
    made = {}

    def get(sde):
        if sde not in made:
            made[sde] = Iteration(policy, config_of(sde))
        return made[sde]

    return get


def prepared(iteration, size=5, share=True, **objective):
    """An updater of that rollout under other options of the objective, and its states in
    micro-batches."""
    config = config_of(
        iteration.config.rollout.sde, objective={"clip_low": 1e-3, "clip_high": 1e-3, **objective}
    )
    part = iteration.part(iteration.advantages(), size, config=config)
    return iteration.updater(PlainRuntime(iteration.policy), config), (
        part if share else one_child_per_state(part)
    )


def again(part):
    """A part of the same micro-batches that no update has seen."""
    return Part.of(part.batches, part.total)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "per-child"])
@pytest.mark.parametrize("ratio", ["plain", "guard"])
@pytest.mark.parametrize("sde", KINDS)
def test_first_update_has_ratio_one(iterations, sde, ratio, share):
    """And so has a second one that finds the weights unchanged, by the old policy that the first
    has left."""
    iteration = iterations(sde)
    updater, part = prepared(iteration, share=share, ratio=ratio)
    for _ in range(2):
        metrics = updater.update(part, 1.0)
        assert metrics["ratio/max_dev"] == 0 and metrics["ratio/min"] == metrics["ratio/max"] == 1
        assert metrics["clip_fraction"] == 0
        assert any(g.abs().max() > 0 for g in updater.runtime.gradient().values()), (
            "ratio 1 is no lack of gradient"
        )


@pytest.mark.parametrize("sde", KINDS)
def test_ratio_leaves_one_when_the_weights_move(iterations, sde):
    iteration = iterations(sde)
    updater, part = prepared(iteration)
    updater.update(part, 1.0)
    updater.runtime.descend(updater.runtime.gradient(), 1e-2)
    metrics = updater.update(part, 1.0)
    assert metrics["ratio/max_dev"] > 1e-5 and metrics["ratio/min"] < 1 < metrics["ratio/max"]


@pytest.mark.parametrize("sde", KINDS)
def test_training_repeats_the_rollouts_log_probabilities(iterations, sde):
    iteration = iterations(sde)
    updater, part = prepared(iteration, size=3)
    metrics = updater.update(part, 1.0)
    assert 0 <= metrics["mismatch/log_prob"] <= LOG_PROB
    seen, batches = 0, part.batches
    for batch, old in zip(batches, part.old, strict=True):
        assert_close("log_prob", old.log_prob, batch.log_prob_rollout, LOG_PROB, scale=1.0)
        seen += batch.real
    assert seen == iteration.total
    spread = torch.cat([batch.log_prob_rollout[: batch.real] for batch in batches])
    assert spread.std() > 1e-2, "log-probabilities that are all alike would agree anyhow"


@pytest.mark.parametrize("sde", KINDS)
def test_replay_is_exact(iterations, sde):
    updater, part = prepared(iterations(sde))
    assert updater.replay_deviation(part.batches[0]) == 0


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_what_is_remembered_is_what_a_first_update_leaves(iterations, ratio):
    """A part that is met after the weights have moved has the old policy of one that is met
    before."""
    updater, part = prepared(iterations("flow"), ratio=ratio)
    other = again(part)
    assert updater.remember(other) == iterations("flow").total
    updater.update(part, 1.0)
    for one, noted in zip(part.old, other.old, strict=True):
        assert torch.equal(one.log_prob, noted.log_prob)
        assert (one.velocity is None) == (noted.velocity is None) == (ratio == "plain")
        assert ratio == "plain" or torch.equal(one.velocity, noted.velocity)


def test_replay_sees_what_is_not_exact(iterations):
    """Dropout, say: here a velocity that differs from call to call."""
    updater, part = prepared(iterations("flow"))
    exact, calls = updater.velocity, []

    def noisy(transformer, batch):
        calls.append(batch)
        return exact(transformer, batch) * (1 + 1e-3 * len(calls))

    updater.velocity = noisy
    assert updater.replay_deviation(part.batches[0]) > 1e-6


@pytest.mark.parametrize("storage", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sde", KINDS)
def test_stored_children_have_the_log_probability_that_was_taken(iterations, sde, storage):
    """Rounding comes before the log-probability, so that it moves the sample and not the ratio."""
    iteration = iterations(sde)
    states = iteration.states
    x, scalars = (
        torch.stack([s.x for s in states]),
        [torch.tensor([getattr(s, name) for s in states]) for name in ("a", "b", "tau")],
    )
    updater, part = prepared(iteration, size=len(states))
    (batch,) = part.batches
    with torch.no_grad():
        v = updater.velocity(updater.runtime.engine, batch)
    key = torch.arange(3 * len(states)).reshape(-1, 3)
    x_next, taken = sde_step(x, v, *scalars, key=key, children=3, out_dtype=storage)
    zero, one = torch.zeros_like(taken), torch.ones(len(states))

    def stats(children, old):
        return group_loss(v, x, children, *scalars, old, zero, one, clip_low=0.0, clip_high=0.0)[1]

    assert x_next.dtype == storage
    assert torch.equal(stats(x_next, taken).ratio, torch.ones_like(taken))
    unrounded, _ = sde_step(x, v, *scalars, key=key, children=3)
    shift = (stats(unrounded, taken).ratio - 1).abs().max()
    assert (shift > 1e-6) == (storage != torch.float32), "the rounding is one that could be seen"


@pytest.mark.parametrize("low, high", [(0.2, 0.1), (0.05, 0.3)])
@pytest.mark.parametrize("reals", [[3, 2], [3, 0], [4]])
def test_clip_fractions_above_and_below(low, high, reals):
    """Together they are the clip fraction; padding counts in neither."""
    stats, counted = UpdateStats(Grpo(clip_low=low, clip_high=high).clip_high), []
    generator = torch.Generator().manual_seed(0)
    for real in reals:
        ratio = 0.6 + 0.8 * torch.rand(4, 5, generator=generator)
        chosen = ratio[:real].double()
        outside = ((chosen < 1 - low) | (chosen > 1 + high)).double()
        seen = Seen(
            ratio,
            ratio,
            kl=torch.zeros(()),
            clip_fraction=outside.mean() if real else torch.zeros(()),
        )
        batch = SimpleNamespace(real=real, units=[None] * 4)
        stats.add(batch, seen, torch.zeros(()), first=False)
        counted.append(chosen)
    counted, found = torch.cat(counted), stats.reduced()
    assert found["clip_fraction/high"] == pytest.approx(
        (counted > 1 + high).double().mean().item(), abs=1e-6
    )
    assert found["clip_fraction/low"] == pytest.approx(
        (counted < 1 - low).double().mean().item(), abs=1e-6
    )
    assert 0 < found["clip_fraction/high"] < found["clip_fraction"] < 1
