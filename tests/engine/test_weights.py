"""Loss weights of the steps: worked numbers, and the size of the gradients that they make."""

import pytest
import torch
from engine_cases import small_config
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import assert_close
from test_sde import KINDS, etas, falling, shifted

from tempflow.errors import UserError
from tempflow.sampling.steps import Coefficients, Flow, Grid
from tempflow.sampling.weights import step_weights


def grid_of(sigmas, tau=None) -> Grid:
    sigmas = torch.tensor(sigmas) if isinstance(sigmas, list) else sigmas
    if tau is None:
        return Grid(sigmas, Flow(0.7).coefficients(sigmas))
    return Grid(sigmas, Coefficients(torch.ones(len(tau)), torch.ones(len(tau)), torch.tensor(tau)))


@given(
    st.data(),
    falling,
    etas,
    st.sampled_from(list(KINDS)),
    st.sampled_from(["noise", "guard", "value"]),
    st.sampled_from(["plain", "guard"]),
)
def test_weights_have_mean_one(data, sigmas, eta, kind, weighting, ratio):
    grid = Grid(sigmas, KINDS[kind](eta).coefficients(sigmas))
    allowed = list(range(len(grid.sde.tau) - 1))
    steps = sorted(data.draw(st.sets(st.sampled_from(allowed), min_size=1)))
    weights = step_weights(grid, steps, weighting, ratio, gamma=0.9)
    assert weights.dtype == torch.float32 and (weights[steps] > 0).all()
    assert weights[steps].double().mean().item() == pytest.approx(1, abs=1e-6)
    assert (weights[[k for k in range(len(weights)) if k not in steps]] == 0).all()
    if (weighting, ratio) == ("noise", "plain"):
        tau = grid.sde.tau
        assert torch.equal(weights[steps], tau[steps] / tau[steps].mean())


def test_noise_weights_by_hand():
    grid = grid_of([1.0, 0.75, 0.5, 0.25, 0.0], tau=[4.0, 2.0, 3.0, 1.0])
    assert step_weights(grid, [0, 1, 2], "noise").tolist() == pytest.approx([4 / 3, 2 / 3, 1, 0])
    for ratio in ("plain", "guard"):
        assert step_weights(grid, [1, 3], "uniform", ratio).tolist() == [0, 1, 0, 1]
    assert step_weights(grid, [0, 1, 2], "noise", "guard").tolist() == [
        1,
        1,
        1,
        0,
    ], "that ratio has tau in it already"


@pytest.mark.parametrize(
    "sigmas, weights",
    [([1.0, 0.9, 0.8, 0.0], [1, 1]), ([1.0, 0.8, 0.75, 0.7, 0.0], [1 / 3, 4 / 3, 4 / 3])],
)
def test_guard_weights_by_hand(sigmas, weights):
    steps = list(range(len(weights)))
    assert step_weights(grid_of(sigmas), steps, "guard", "guard")[steps].tolist() == pytest.approx(
        weights, rel=1e-5
    )


@pytest.mark.parametrize(
    "gamma, weights",
    [
        (1.0, [1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6, 0.4, 0.2]),
        (0.95, [1.685, 1.534, 1.375, 1.207, 1.031, 0.845, 0.650, 0.444, 0.228]),
    ],
)
def test_value_weights_by_hand(gamma, weights):
    grid, steps = grid_of(shifted(10, 1.0)), list(range(9))
    found = step_weights(grid, steps, "value", "guard", gamma)
    assert found[:9].tolist() == pytest.approx(weights, abs=6e-4) and found[9] == 0
    plain, tau = step_weights(grid, steps, "value", "plain", gamma), grid.sde.tau[:9]
    assert_close(
        "times tau under the plain ratio",
        plain[:9] / plain[0],
        found[:9] * tau / (found[0] * tau[0]),
        1e-6,
    )
    some = step_weights(grid, [2, 5], "value", "guard", gamma)
    assert (some[2] / some[5]).item() == pytest.approx(weights[2] / weights[5], rel=2e-3), (
        "by place in the grid"
    )


@pytest.mark.parametrize(
    "shift, spread",
    [
        (1.0, {"plain-uniform": 7.9, "b": 1.25, "b/dt": 1.25}),
        (3.0, {"plain-uniform": 17.0, "b": 6.2, "b/dt": 1.25}),
    ],
    ids=["uniform", "shifted"],
)
def test_largest_over_smallest_gradient(shift, spread):
    """Of nine trained steps with eta 0.7: |b| / tau or |b| of the ratio, times the weight."""
    grid, steps = grid_of(shifted(10, shift)), list(range(9))
    base = {"plain": grid.sde.b.abs() / grid.sde.tau, "guard": grid.sde.b.abs()}

    def found(weighting, ratio):
        size = (step_weights(grid, steps, weighting, ratio) * base[ratio])[:9]
        return (size.max() / size.min()).item()

    assert found("uniform", "plain") == pytest.approx(spread["plain-uniform"], rel=0.01)
    for ratio in ("plain", "guard"):
        assert found("noise", ratio) == pytest.approx(spread["b"], rel=0.01)
        assert found("guard", ratio) == pytest.approx(spread["b/dt"], rel=0.01)


# -------------------------------------------------------------------------------------- in a config
@pytest.mark.parametrize(
    "training, words",
    [
        (
            {"weighting": "gaurd"},
            (
                'training.weighting: expected "noise", "uniform", "guard" or {"value": gamma}, got'
                " 'gaurd'$"
            ),
        ),
        ({"weighting": {"valu": 0.5}}, "training.weighting.valu: unknown key"),
        (
            {"weighting": {"value": 1.5}},
            "training.weighting.value: input should be less than or equal to 1, got 1.5",
        ),
        (
            {"weighting": "guard", "objective": "nft"},
            (
                "training.weighting: 'guard' weighs the stochastic steps.* \"nft\" learns from"
                " finished"
            ),
        ),
        (
            {"weighting": {"value": 0.9}, "objective": "nft"},
            "training.weighting: {'value': 0.9} weighs the stochastic steps",
        ),
    ],
)
def test_a_config_that_cannot_work(training, words):
    with pytest.raises(UserError, match=words):
        small_config(training={"advantage": {"over": "prompt"}, **training})


def test_profiles_of_a_config():
    profiles = [
        small_config(training={"weighting": given}).training.profile()
        for given in ("noise", "guard", {"value": 0.9})
    ]
    assert profiles == [
        {"weighting": "noise"},
        {"weighting": "guard"},
        {"weighting": "value", "gamma": 0.9},
    ]
