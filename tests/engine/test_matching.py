"""Objectives on finished latents: their likelihood by hand and in every form, and which latents are
taken."""

import numpy as np
import pytest
import torch
from engine_cases import Iteration, PlainRuntime, flat, small_config
from kernel_cases import assert_close

from tempflow.objectives import Batch, Old, Rollout
from tempflow.objectives.awm import Awm
from tempflow.objectives.fpo import Fpo
from tempflow.objectives.matching import noised, picked
from tempflow.sampling.noise import Noise
from tempflow.sampling.steps import Flow, Grid
from tempflow.types import Advantages, Endpoint, Slots, State, Unit

SHAPE = (3, 5)
UNITS = [Unit(n, n // 2, 7 + n // 2, n % 2) for n in range(4)]  # two prompts of two seeds
GRID = Grid(torch.linspace(1, 0, 9), Flow().coefficients(torch.linspace(1, 0, 9)))
PLAN = {"plan": {"type": "flow_grpo", "seeds": 3, "branch_steps": [0, 2]}, "num_steps": 4}


def rollout(over="prompt", mine=slice(None)) -> Rollout:
    """Eight finished latents, two of each unit."""
    g = torch.Generator().manual_seed(0)
    endpoints = [Endpoint(UNITS[n // 2], torch.randn(*SHAPE, generator=g), n) for n in range(8)]
    prompt, seed = (
        np.array([getattr(e.unit, name) for e in endpoints]) for name in ("prompt", "seed")
    )
    slots = Slots(
        prompt,
        seed,
        np.full(8, -1),
        np.arange(8),
        np.zeros(8, dtype=int),
        tuple((n,) for n in range(8)),
    )
    return Rollout(slots, [], endpoints[mine], GRID, Noise(0, 3), over)


def advantages(*values) -> Advantages:
    values = np.array(values, dtype=np.float32)
    return Advantages(np.nan_to_num(values), np.isfinite(values), np.zeros(2, dtype=bool), {})


def batch_of(states: list[State], advantage) -> Batch:
    scalars = [
        torch.tensor([getattr(s, name) for s in states]) for name in ("sigma", "a", "b", "tau")
    ]
    advantage, n = torch.tensor(advantage)[:, None], len(states)
    x, children = torch.stack([s.x for s in states]), torch.stack([s.children for s in states])
    return Batch(
        [s.unit for s in states],
        x,
        children,
        *scalars,
        torch.ones(n),
        advantage,
        None,
        n,
        torch.ones(n, 1, dtype=torch.bool),
        scalars[0].tolist(),
    )


def ratio_of(objective, batch, velocity, before):
    old = Old(objective.measure(before, batch, None).log_prob, None)
    return objective.measure(velocity, batch, old).ratio[:, 0]


# -------------------------------------------------------------------------------------- likelihoods
@pytest.mark.parametrize("form, log_ratio", [("v", 0.75), ("eps", 0.75 / 4)])
def test_fpo_by_hand(form, log_ratio):
    """x0 = 0, eps = 1, s = .5, v from 0 to .5: errors 1 and .25, log ratio .75; of the noise (1 -
    s)^2 = 1/4 of that."""
    a, b, child = {"v": (0.0, 1.0, 1.0), "eps": (1.0, 0.5, 1.0)}[form]
    one = State(
        UNITS[0],
        0,
        0.5,
        a,
        b,
        0.5**0.5,
        torch.tensor([0.5]),
        torch.tensor([[child]]),
        np.array([0]),
    )
    found = ratio_of(
        Fpo(form=form), batch_of([one], [1.0]), torch.tensor([[0.5]]), torch.tensor([[0.0]])
    )
    assert found.log().item() == pytest.approx(log_ratio, rel=1e-6)


@pytest.mark.parametrize("form", ["v", "eps"])
@pytest.mark.parametrize("kappa", [1.0, 4.0])
def test_the_ratio_is_that_of_the_errors(form, kappa):
    """exp(kappa (l_old - l)), with l the error of the velocity, or of the noise x + (1 - s) v, in
    float64."""
    made = rollout()
    states = noised(made, made.endpoints, 3, form, kappa)
    g = torch.Generator().manual_seed(1)
    v, before = torch.randn(2, len(states), *SHAPE, generator=g)
    errors = []
    for velocity in (before, v):
        rows = []
        for n, state in enumerate(states):
            x0, s = made.endpoints[state.slots[0]].latent.double(), state.sigma
            eps = (state.x.double() - (1 - s) * x0) / s
            apart = (
                velocity[n].double() - (eps - x0)
                if form == "v"
                else state.x + (1 - s) * velocity[n].double() - eps
            )
            rows.append(apart.square().mean())
        errors.append(torch.stack(rows))
    expected = kappa * (errors[0] - errors[1])
    found = ratio_of(
        Fpo(form=form, kappa=kappa), batch_of(states, [1.0] * len(states)), v, before
    ).log()
    assert_close("log ratio", found, expected.float(), 1e-5, scale=expected.norm().item())
    assert expected.abs().mean() > 0.1


@pytest.mark.parametrize("form", ["v", "eps"])
def test_levels_are_spread_over_the_grid(form):
    """One in each of as many parts, drawn anew for each latent; the noise's error has no gradient
    at s = 1, so it is not drawn."""
    made = rollout()
    first = 1 if form == "eps" else 0
    strata = [np.arange(first, 8)[part] for part in np.array_split(np.arange(8 - first), 3)]
    steps = np.array([s.step for s in noised(made, made.endpoints, 3, form)]).reshape(8, 3)
    for column, stratum in zip(steps.T, strata, strict=True):
        assert set(column) <= set(stratum) and len(set(column)) > 1
    assert len(noised(made, made.endpoints[:1], 64, form)) == 8 - first
    alone = noised(rollout(mine=slice(5, 6)), made.endpoints[5:6], 3, form)
    again = noised(made, made.endpoints, 3, form)[15:18]
    assert all(
        torch.equal(a.x, b.x) and a.step == b.step for a, b in zip(alone, again, strict=True)
    ), "whatever the rank holds"


@pytest.mark.parametrize(
    "objective",
    [Fpo(clip=0.5), Fpo(clip=1e-3), Fpo(clip=0.5, form="eps"), Awm()],
    ids=["fpo", "clipped", "eps", "awm"],
)
def test_gradients_are_those_of_the_losses(objective):
    """Of fpo max(-A ratio, -A clip(ratio)), of awm A times the error, mean over the draws, by
    autograd in float64."""
    made = rollout()
    form = getattr(objective, "form", "v")
    states = noised(made, made.endpoints, 1, form)
    batch = batch_of(states, [2.0, -1.0, 0.5, -2.0, 1.0, 1.0, -1.0, 0.0])
    g = torch.Generator().manual_seed(1)
    before = torch.randn(8, *SHAPE, generator=g)
    v = (before + 0.02 * torch.randn(8, *SHAPE, generator=g)).requires_grad_(True)
    old = Old(objective.measure(before, batch, None).log_prob, None)
    objective.loss(v, batch, old, None, None)[0].backward()
    w = v.detach().double().requires_grad_(True)

    def errors(velocity):
        mean = (
            batch.a.double()[:, None, None] * batch.x + batch.b.double()[:, None, None] * velocity
        )
        return (mean - batch.children[:, 0]).square().flatten(1).mean(1)

    a = batch.advantage[:, 0].double()
    ratio = (errors(before.double()) - errors(w)).exp()
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    rows = (
        a * errors(w)
        if isinstance(objective, Awm)
        else torch.maximum(-a * ratio, -a * ratio.clamp(low, high))
    )
    rows.mean().backward()
    assert_close("gradient", v.grad, w.grad.float(), 1e-4)
    assert v.grad.abs().max() > 0


# -------------------------------------------------------------------------------------------- picks
def test_extremes_are_the_best_and_the_worst_of_each_group():
    """Of those whose reward is known; of equal ones the first; the same on every rank, by what it
    holds."""
    credit = advantages(0.1, np.nan, -0.5, 0.4, 0.0, 0.0, 0.0, 0.0)
    assert [e.slot for e in picked(rollout(), credit, "all")] == list(range(8))
    assert [e.slot for e in picked(rollout(), credit, "extremes")] == [2, 3, 4]
    assert [e.slot for e in picked(rollout("seed"), credit, "extremes")] == [0, 2, 3, 4, 6]
    assert [e.slot for e in picked(rollout(mine=slice(0, None, 3)), credit, "extremes")] == [3]
    assert picked(rollout(mine=slice(0, 2)), credit, "extremes") == []


@pytest.mark.parametrize(
    "objective",
    [Fpo(pick="extremes"), Fpo(form="eps", pick="extremes"), Awm(pick="extremes")],
    ids=["fpo", "eps", "awm"],
)
def test_a_rank_without_a_pick_has_something_to_pad_with(objective):
    made = rollout(mine=slice(0, 2))
    assert objective.states(made, advantages(0.1, np.nan, -0.5, 0.4, 0.0, 0.0, 0.0, 0.0)) == []
    filler = objective.filler(made)
    assert filler.x.isfinite().all() and filler.children.shape == (1, *SHAPE)


# ----------------------------------------------------------------------------------- a real rollout
@pytest.fixture(scope="module")
def iteration(policy):
    return Iteration(
        policy,
        small_config(rollout=PLAN, training={"objective": "fpo", "advantage": {"over": "prompt"}}),
    )


@pytest.mark.parametrize(
    "objective",
    [{"type": "fpo", "pick": "extremes", "draws": 2}, {"type": "awm", "draws": 1}],
    ids=["fpo", "awm"],
)
def test_an_update_of_the_shipped_model(iteration, objective):
    """A gradient that is finite, the same in micro-batches of any size; extremes forward two of
    three latents, in parts too."""
    from tempflow.training.credit import make_parts

    gradients = []
    for size in (3, 12):
        training = {
            "objective": objective,
            "advantage": {"over": "prompt"},
            "micro_batch": size,
            "updates": {"parts": 2},
        }
        session = iteration.session.variant(small_config(rollout=PLAN, training=training))
        runtime = PlainRuntime(iteration.policy, drift=0.02)
        parts = make_parts(session, iteration.rolled, iteration.advantages())
        assert sum(part.total for part in parts) == (8 if objective["type"] == "fpo" else 6)
        for part in parts:
            metrics = iteration.updater(runtime, session.config).update(part, 1.0)
            assert (
                np.isfinite(metrics["loss"])
                and "mismatch/log_prob" not in metrics
                and metrics["ratio/max_dev"] == 0
            )
        gradients.append(flat(runtime.gradient()))
    assert gradients[0].norm() > 1e-6
    assert_close("gradient", gradients[0], gradients[1], 1e-4)
