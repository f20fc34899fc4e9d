"""One forward per state gives the gradient of one forward per child, on the shipped model.

Three ways to the same gradient: the engine's shared forward, the benchmark's one_child_per_state,
and docs/method.md written out child by child in float64 (engine_cases.naive_loss), in which
nothing is skipped, padded or batched.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from bench import one_child_per_state
from engine_cases import Iteration, PlainRuntime, flat, naive_loss, small_config
from kernel_cases import assert_close

FP32 = 1e-5
PLAIN = {"clip_low": 2e-3, "clip_high": 1e-3}
GUARD = {"objective": {**PLAIN, "ratio": "guard"}}
KL_X, KL_V = (
    {"penalty": {"type": "kl", "coef": coef, "form": form}}
    for form, coef in (("x", 0.3), ("v", 0.03))
)
VARIANTS = {
    "plain": {},
    "guard": GUARD,
    "uniform": {"weighting": "uniform"},
    "kl-x": KL_X,
    "kl-v": KL_V,
    "guard-kl-x": GUARD | KL_X,
    "guard-kl-v": GUARD | KL_V | {"weighting": "guard"},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def config_of(**training):
    rollout = {"num_steps": 4, "plan": {"seeds": 2, "children": 3, "branch_steps": [0, 2]}}
    return small_config(rollout=rollout, training={"objective": PLAIN, **training})


@pytest.fixture(scope="module")
def iteration(policy):
    """8 states of 3 children: 2 prompts, 2 seeds, steps 0 and 2."""
    return Iteration(policy, config_of())


@pytest.fixture(scope="module")
def rewards(iteration):
    """The rollout's own, but: one failed child, two failed children, a group without spread, a
    group that failed."""
    rewards = iteration.dense(iteration.rewards).copy()
    rewards[0, 0, 1, 2] = np.nan
    rewards[0, 1, 0, :2] = np.nan
    rewards[1, 0, 0, :2] = rewards[1, 0, 0, 2]
    rewards[1, 1, 1] = np.nan
    rewards[1, 0, 1] = [0.1, np.nan, 0.3]
    return rewards.ravel()


LENGTH = 0.02  # of the step between the two updates; moves ratios by about the clip range


class Engine:
    """The engine's gradients of an iteration at the first and at the second update."""

    def __init__(self, iteration, rewards, size, extra=0, share=True, **training):
        config = config_of(**training)
        self.runtime = PlainRuntime(iteration.policy, drift=0.05)
        updater = iteration.updater(self.runtime, config)
        part = iteration.part(iteration.advantages(rewards), size, extra, config)
        part = part if share else one_child_per_state(part)
        self.metrics, self.gradients = [], []
        for _ in range(2):
            self.metrics.append(updater.update(part, 1.0))
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

    session, states = iteration.session, iteration.states

    def forward(transformer, state):
        sigma = session.grid.sigmas[state.step : state.step + 1]
        return session.sampler.velocity(
            transformer, state.x[None], sigma, session.embed([state.unit])
        )[0]

    with torch.no_grad():
        old = {id(s): forward(runtime.engine, s) for s in states}
        reference = {id(s): forward(runtime.reference, s) for s in states}
    for _ in range(2):
        loss = naive_loss(
            config,
            lambda s: forward(runtime.engine, s),
            lambda s: old[id(s)],
            lambda s: reference[id(s)],
            states,
            advantages,
            session.grid.sigmas,
        )
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


@pytest.mark.parametrize("name", ["plain", "kl-x", "guard-kl-v"])
def test_equals_one_forward_per_child(iteration, rewards, shared, name):
    """Each ratio and each KL once: the formulas above are held to in all variants, and they go
    child by child too."""
    variant = VARIANTS[name]
    together, per_child = (
        shared(variant),
        Engine(iteration, rewards, size=3, extra=1, share=False, **variant),
    )
    assert_same_gradients(together.gradients, per_child.gradients)
    for one, other in zip(together.metrics, per_child.metrics):
        for key in ("loss", "kl", "clip_fraction", "clip_fraction/high", "ratio/max_dev"):
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-7), key
        assert other["forwards"] == 3 * one["forwards"], (
            "the reference's forwards, once per iteration, are shared as well"
        )


@pytest.mark.parametrize(
    "variant", [VARIANTS["plain"], VARIANTS["guard-kl-x"]], ids=["plain", "guard-kl-x"]
)
def test_micro_batches_and_padding_change_nothing(iteration, rewards, shared, variant):
    whole = Engine(iteration, rewards, size=8, **variant)
    for parts in (
        shared(variant),
        *(Engine(iteration, rewards, size, extra, **variant) for size, extra in ((1, 0), (5, 2))),
    ):
        assert_same_gradients(parts.gradients, whole.gradients)
        assert [m["forwards"] for m in parts.metrics] == [m["forwards"] for m in whole.metrics], (
            "padding is not counted"
        )
        for key in ("loss", "kl", "clip_fraction", "clip_fraction/high", "ratio/max_dev"):
            assert parts.metrics[1][key] == pytest.approx(
                whole.metrics[1][key], rel=1e-3, abs=1e-7
            ), key


def test_groups_without_advantage_are_skipped_but_counted(iteration, rewards):
    """8 states; one has no spread, one no rewards, and one a single reward: 5 forwards, the mean
    over 8."""
    engine = Engine(iteration, rewards, size=8)
    assert engine.metrics[0]["forwards"] == engine.metrics[1]["forwards"] == 5
    with_kl = Engine(iteration, rewards, size=8, **KL_X)
    assert with_kl.metrics[0]["forwards"] == 2 * 7, (
        "a KL term needs every state with a reward, and its reference"
    )
    assert with_kl.metrics[1]["forwards"] == 7, "the reference is kept for the second update"


def test_one_child_per_state_is_the_same_loss_laid_out_otherwise(iteration, rewards):
    part = iteration.part(iteration.advantages(rewards), 8)
    apart = one_child_per_state(part)
    (batch,), (split,) = part.batches, apart.batches
    assert apart.total == 3 * part.total
    assert (
        split.x.shape == (15, 48, 32)
        and split.children.shape == (15, 1, 48, 32)
        and split.real == 3 * batch.real == 15
    )
    for n in range(5):
        for i in range(3):
            row = 3 * n + i
            assert torch.equal(split.x[row], batch.x[n]) and torch.equal(
                split.children[row, 0], batch.children[n, i]
            )
            assert (
                split.advantage[row, 0] == batch.advantage[n, i]
                and split.weight[row] == batch.weight[n]
            )
            assert split.units[row] == batch.units[n] and split.sigma[row] == batch.sigma[n]


def test_masked_children_do_not_matter(iteration, rewards):
    """Whatever a child holds whose reward failed, the gradient is that of its group without it."""
    base = Engine(iteration, rewards, size=8)
    state = next(s for s in iteration.states if (s.unit.prompt, s.unit.seed, s.step) == (0, 0, 2))
    children = state.children.clone()
    children[2] += 100
    states = [replace(s, children=children) if s is state else s for s in iteration.states]
    other = copy.copy(iteration)
    other.rolled = replace(iteration.rolled, kept=replace(iteration.rolled.kept, states=states))
    changed = Engine(other, rewards, size=8)
    assert torch.equal(flat(base.gradients[0]), flat(changed.gradients[0]))
