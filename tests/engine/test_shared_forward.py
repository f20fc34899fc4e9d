"""One forward per state gives the gradient of one forward per child, on the shipped model.

Three ways to the same gradient: the engine's shared forward, its one_child_per_state, and DESIGN section 2 written
out child by child in float64 (engine_cases.naive_loss), in which nothing is skipped, padded or batched.
"""

import numpy as np
import pytest
import torch
from engine_cases import Iteration, PlainRuntime, flat, naive_loss, small_config
from kernel_cases import assert_close

from tempflow.training.batches import one_child_per_state
from tempflow.training.update import Updater

FP32 = 1e-5
CLIP = {"clip_low": 2e-3, "clip_high": 1e-3}
VARIANTS = {
    "plain": {},
    "guard": {"objective": {**CLIP, "ratio": "guard"}},
    "uniform": {"weighting": "uniform"},
    "kl-x": {"penalty": {"coef": 0.3}},
    "kl-v": {"penalty": {"coef": 0.3, "form": "v"}},
    "guard-kl-x": {"objective": {**CLIP, "ratio": "guard"}, "penalty": {"coef": 0.3}},
    "guard-kl-v": {"objective": {**CLIP, "ratio": "guard"}, "penalty": {"coef": 0.3, "form": "v"}},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def config_of(**training):
    rollout = {"num_steps": 4, "plan": {"seeds": 2, "children": 3, "branch_steps": [0, 2]}}
    return small_config(rollout=rollout, training={"objective": CLIP, **training})


@pytest.fixture(scope="module")
def iteration(policy):
    """8 states of 3 children: 2 prompts, 2 seeds, steps 0 and 2."""
    return Iteration(policy, config_of())


@pytest.fixture(scope="module")
def rewards(iteration):
    """The rollout's own, but: one failed child, two failed children, a group without spread, a group that failed."""
    rewards = iteration.data.rewards.copy()
    rewards[0, 0, 1, 2] = np.nan
    rewards[0, 1, 0, :2] = np.nan
    rewards[1, 0, 0, :2] = rewards[1, 0, 0, 2]
    rewards[1, 1, 1] = np.nan
    rewards[1, 0, 1] = [0.1, np.nan, 0.3]
    return rewards


LENGTH = 0.02  # of the step between the two updates; moves ratios by about the clip range


class Engine:
    """The engine's gradients of an iteration at the first and at the second update."""

    def __init__(self, iteration, rewards, size, extra=0, share=True, **training):
        config = config_of(**training)
        self.runtime = PlainRuntime(iteration.policy, drift=0.05)
        updater = Updater(config, self.runtime, iteration.embed, share_forward=share)
        self.batches = iteration.batches(iteration.advantages(rewards), size, extra, config)
        self.metrics, self.gradients = [], []
        for first in (True, False):
            self.metrics.append(updater.update(self.batches, iteration.total, 1.0, first=first))
            self.gradients.append(self.runtime.gradient())
            self.runtime.descend(self.gradients[-1], LENGTH)


@pytest.fixture(scope="module")
def shared(iteration, rewards):
    """The shared forward in micro-batches of 3, by variant."""
    made = {}

    def get(variant):
        name = str(variant)
        if name not in made:
            made[name] = Engine(iteration, rewards, size=3, extra=1, **variant)
        return made[name]

    return get


def naive_gradients(iteration, rewards, **training):
    """The same two gradients from the formulas."""
    config, runtime = config_of(**training), PlainRuntime(iteration.policy, drift=0.05)
    advantages, gradients = iteration.advantages(rewards), []

    def forward(transformer, decision):
        sigma = iteration.collector.sigmas[decision.step : decision.step + 1]
        return iteration.collector.sampler.velocity(transformer, decision.x[None], sigma, iteration.embed([decision.unit]))[0]

    with torch.no_grad():
        old = {id(d): forward(runtime.engine, d) for d in iteration.data.decisions}
        reference = {id(d): forward(runtime.reference, d) for d in iteration.data.decisions}
    for _ in range(2):
        loss = naive_loss(config, lambda d: forward(runtime.engine, d), lambda d: old[id(d)], lambda d: reference[id(d)],
                          iteration.data.decisions, advantages, iteration.collector.sigmas)  # fmt: skip
        loss.backward()
        gradients.append(runtime.gradient())
        runtime.descend(gradients[-1], LENGTH)
    return gradients


def assert_same_gradients(one, other):
    for update, (a, b) in enumerate(zip(one, other)):
        assert a.keys() == b.keys()
        assert_close(f"gradient of update {update}", flat(a), flat(b), FP32)
        assert flat(b).norm() > 1e-4


@variants
def test_equals_the_formulas(iteration, rewards, shared, variant):
    engine = shared(variant)
    assert_same_gradients(engine.gradients, naive_gradients(iteration, rewards, **variant))
    assert 0 < engine.metrics[1]["clip_fraction"] < 1, "some children must be clipped, and some not"


@variants
def test_equals_one_forward_per_child(iteration, rewards, shared, variant):
    together, per_child = shared(variant), Engine(iteration, rewards, size=3, extra=1, share=False, **variant)
    assert_same_gradients(together.gradients, per_child.gradients)
    for one, other in zip(together.metrics, per_child.metrics):
        for key in ("loss", "kl", "clip_fraction", "clip_fraction/high", "ratio/max_dev"):
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-7), key
        assert other["forwards"] == 3 * one["forwards"], "the reference's forwards, once per iteration, are shared as well"


@pytest.mark.parametrize("variant", [VARIANTS["plain"], VARIANTS["guard-kl-x"]], ids=["plain", "guard-kl-x"])
def test_micro_batches_and_padding_change_nothing(iteration, rewards, variant):
    whole = Engine(iteration, rewards, size=8, **variant)
    for size, extra in ((1, 0), (3, 0), (5, 2)):
        parts = Engine(iteration, rewards, size, extra, **variant)
        assert_same_gradients(parts.gradients, whole.gradients)
        assert [m["forwards"] for m in parts.metrics] == [m["forwards"] for m in whole.metrics], "padding is not counted"
        for key in ("loss", "kl", "clip_fraction", "clip_fraction/high", "ratio/max_dev"):
            assert parts.metrics[1][key] == pytest.approx(whole.metrics[1][key], rel=1e-3, abs=1e-7), key


def test_groups_without_advantage_are_skipped_but_counted(iteration, rewards):
    """8 states; one has no spread, one no rewards, and one a single reward: 5 forwards, the mean over 8."""
    engine = Engine(iteration, rewards, size=8)
    assert engine.metrics[0]["forwards"] == engine.metrics[1]["forwards"] == 5
    with_kl = Engine(iteration, rewards, size=8, penalty={"coef": 0.3})
    assert with_kl.metrics[0]["forwards"] == 2 * 7, "a KL term needs every state with a reward, and its reference"
    assert with_kl.metrics[1]["forwards"] == 7, "the reference is kept for the second update"


def test_one_child_per_state_is_the_same_loss_laid_out_otherwise(iteration, rewards):
    (batch,) = iteration.batches(iteration.advantages(rewards), 8)
    split = one_child_per_state(batch)
    assert split.x.shape == (24, 48, 32) and split.x_next.shape == (24, 1, 48, 32) and split.real == 3 * batch.real
    for n in range(8):
        for i in range(3):
            row = 3 * n + i
            assert torch.equal(split.x[row], batch.x[n]) and torch.equal(split.x_next[row, 0], batch.x_next[n, i])
            assert split.advantage[row, 0] == batch.advantage[n, i] and split.weight[row] == batch.weight[n]
            assert split.units[row] == batch.units[n] and split.sigma[row] == batch.sigma[n]


def test_masked_children_do_not_matter(iteration, rewards):
    """Whatever a child holds whose reward failed, the gradient is that of its group without it."""
    base = Engine(iteration, rewards, size=8)
    other = Iteration.__new__(Iteration)
    other.__dict__.update(iteration.__dict__)
    other.data = type(iteration.data)(**vars(iteration.data))
    other.data.decisions = [d for d in iteration.data.decisions]
    place = next(n for n, d in enumerate(other.data.decisions) if (d.unit.prompt, d.unit.seed, d.step) == (0, 0, 2))
    decision = other.data.decisions[place]
    children = decision.x_next.clone()
    children[2] += 100
    other.data.decisions[place] = type(decision)(decision.unit, decision.step, decision.x, children, decision.log_prob)
    changed = Engine(other, rewards, size=8)
    assert torch.equal(flat(base.gradients[0]), flat(changed.gradients[0]))
