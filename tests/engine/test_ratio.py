"""The policy ratio: exactly 1 before the first update, whatever the step, the storage and the loss.

The chain: log-probability taken in the rollout == taken from what was stored == taken by training's forward == taken again.
"""

from types import SimpleNamespace

import pytest
import torch
from engine_cases import Iteration, PlainRuntime, small_config
from kernel_cases import assert_close

from tempflow.training.update import Updater, UpdateStats
from tempflow_kernels import group_loss, sde_step

KINDS = ("flow", "dance", "cps")
LOG_PROB = 2e-6  # fp32, of values of size 1: forwards of other batch shapes differ in their last bits


def config_of(sde, **training):
    return small_config(rollout={"sde": sde, "num_steps": 5, "plan": {"branch_steps": [0, 2, 3]}}, training=training)


@pytest.fixture(scope="module")
def iterations(policy):
    """One rollout of the shipped model per kind of step."""
    made = {}

    def get(sde):
        if sde not in made:
            made[sde] = Iteration(policy, config_of(sde))
        return made[sde]

    return get


def prepared(iteration, size=5, share=True, **training):
    """An updater of that rollout under other training options, and its micro-batches."""
    config = config_of(iteration.config.rollout.sde, **training)
    updater = Updater(config, PlainRuntime(iteration.policy), iteration.embed, share_forward=share)
    return updater, iteration.batches(iteration.advantages(), size, config=config)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "per-child"])
@pytest.mark.parametrize("ratio", ["plain", "guard"])
@pytest.mark.parametrize("sde", KINDS)
def test_first_update_has_ratio_one(iterations, sde, ratio, share):
    """And so has a second one that finds the weights unchanged, by the old policy that the first has left."""
    iteration = iterations(sde)
    updater, batches = prepared(iteration, share=share, objective={"ratio": ratio})
    for first in (True, False):
        metrics = updater.update(batches, iteration.total, 1.0, first=first)
        assert metrics["ratio/max_dev"] == 0 and metrics["ratio/min"] == metrics["ratio/max"] == 1
        assert metrics["clip_fraction"] == 0
        assert any(g.abs().max() > 0 for g in updater.runtime.gradient().values()), "ratio 1 is no lack of gradient"


@pytest.mark.parametrize("sde", KINDS)
def test_ratio_leaves_one_when_the_weights_move(iterations, sde):
    iteration = iterations(sde)
    updater, batches = prepared(iteration)
    updater.update(batches, iteration.total, 1.0, first=True)
    updater.runtime.descend(updater.runtime.gradient(), 1e-2)
    metrics = updater.update(batches, iteration.total, 1.0, first=False)
    assert metrics["ratio/max_dev"] > 1e-5 and metrics["ratio/min"] < 1 < metrics["ratio/max"]


@pytest.mark.parametrize("sde", KINDS)
def test_training_repeats_the_rollouts_log_probabilities(iterations, sde):
    iteration = iterations(sde)
    updater, batches = prepared(iteration, size=3)
    metrics = updater.update(batches, iteration.total, 1.0, first=True)
    assert 0 <= metrics["mismatch/log_prob"] <= LOG_PROB
    seen = 0
    for batch in batches:
        assert_close("log_prob", batch.log_prob_old, batch.log_prob_rollout, LOG_PROB, scale=1.0)
        seen += batch.real
    assert seen == iteration.total
    spread = torch.cat([batch.log_prob_rollout[: batch.real] for batch in batches])
    assert spread.std() > 1e-2, "log-probabilities that are all alike would agree anyhow"


@pytest.mark.parametrize("sde", KINDS)
def test_replay_is_exact(iterations, sde):
    updater, batches = prepared(iterations(sde))
    assert updater.replay_deviation(batches[0]) == 0


def test_replay_sees_what_is_not_exact(iterations):
    """Dropout, say: here a velocity that differs from call to call."""
    updater, batches = prepared(iterations("flow"))
    exact, calls = updater.velocity, []

    def noisy(transformer, batch):
        calls.append(batch)
        return exact(transformer, batch) * (1 + 1e-3 * len(calls))

    updater.velocity = noisy
    assert updater.replay_deviation(batches[0]) > 1e-6


@pytest.mark.parametrize("storage", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sde", KINDS)
def test_stored_children_have_the_log_probability_that_was_taken(iterations, sde, storage):
    """Rounding comes before the log-probability, so that it moves the sample and not the ratio."""
    iteration = iterations(sde)
    decisions = iteration.data.decisions
    steps = [d.step for d in decisions]
    x, scalars = torch.stack([d.x for d in decisions]), [s[steps] for s in vars(iteration.collector.sde).values()]
    updater, (batch,) = prepared(iteration, size=len(decisions))
    with torch.no_grad():
        v = updater.velocity(updater.runtime.engine, batch)
    key = torch.arange(3 * len(decisions)).reshape(-1, 3)
    x_next, taken = sde_step(x, v, *scalars, key=key, children=3, out_dtype=storage)
    zero, one = torch.zeros_like(taken), torch.ones(len(decisions))

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
    config = small_config(training={"objective": {"clip_low": low, "clip_high": high}})
    updater, stats, counted = Updater(config, None, None), UpdateStats(), []
    generator = torch.Generator().manual_seed(0)
    for real in reals:
        ratio = 0.6 + 0.8 * torch.rand(4, 5, generator=generator)
        chosen = ratio[:real].double()
        outside = ((chosen < 1 - low) | (chosen > 1 + high)).double()
        seen = SimpleNamespace(ratio=ratio, log_prob=ratio, kl=torch.zeros(()), clip_fraction=outside.mean() if real else torch.zeros(()))
        batch = SimpleNamespace(real=real, units=[None] * 4)
        updater._note(batch, batch, seen, first=False, stats=stats)
        counted.append(chosen)
    counted, found = torch.cat(counted), stats.reduced()
    assert found["clip_fraction/high"] == pytest.approx((counted > 1 + high).double().mean().item(), abs=1e-6)
    assert found["clip_fraction/low"] == pytest.approx((counted < 1 - low).double().mean().item(), abs=1e-6)
    assert 0 < found["clip_fraction/high"] < found["clip_fraction"] < 1
