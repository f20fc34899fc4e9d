"""The sampling step's scalars: against docs/method.md in float64, and against what each kind
promises."""

import numpy as np
import pytest
import torch
from engine_cases import step_scalars
from hypothesis import given
from hypothesis import strategies as st

from tempflow.sampling.steps import Cps, Dance, Flow, Precise, jittered, ode_coefficients

FP32 = 1.2e-7  # one rounding to fp32
KINDS = {"flow": Flow, "dance": Dance, "cps": Cps, "precise": Precise}


def shifted(steps, shift):
    s = np.linspace(1.0, 0.0, steps + 1)
    return torch.tensor(shift * s / (1 + (shift - 1) * s), dtype=torch.float32)


def dynamic(steps, mu):
    s = np.linspace(1.0, 1 / steps, steps)
    return torch.tensor([*np.exp(mu) / (np.exp(mu) + (1 / s - 1)), 0.0], dtype=torch.float32)


GRIDS = {
    "even-10": shifted(10, 1.0),
    "even-2": shifted(2, 1.0),
    "even-50": shifted(50, 1.0),
    "shift-3": shifted(10, 3.0),
    "shift-0.5": shifted(7, 0.5),
    "dynamic": dynamic(10, 0.85),
}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def coefficients(grid, kind, eta):
    return ode_coefficients(grid) if kind == "ode" else KINDS[kind](eta).coefficients(grid)


@grids
@pytest.mark.parametrize("eta", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("kind", [*KINDS, "ode"])
def test_formulas(kind, eta, grid):
    found = coefficients(grid, kind, eta)
    expected = np.array([step_scalars(kind, grid, k, eta) for k in range(len(grid) - 1)]).T
    for name, values in zip(("a", "b", "tau"), expected):
        got = getattr(found, name)
        assert got.dtype == torch.float32 and got.shape == (len(grid) - 1,)
        np.testing.assert_allclose(
            got.double().numpy(), values, rtol=FP32, atol=1e-12, err_msg=name
        )


@pytest.mark.parametrize(
    "kind, a, b, tau",
    [
        # s = 0.5, s' = 0.25, eta = 0.8, worked out by hand: flow's std = 0.8 sqrt(0.5 / 0.5) = 0.8
        # as dance's
        ("flow", 0.84, -0.33, 0.4),
        ("dance", 0.84, -0.33, 0.4),
        # tau = 0.25 sin(0.4 pi), q = 0.25 cos(0.4 pi)
        ("cps", 0.8272542, -0.3363729, 0.2377641),
        # rho = (0.25 0.5) / (0.5 0.75) = 1/3, rho^0.64 = 0.4950424: tau = 0.25 sqrt(0.5049576), q =
        # 0.25 sqrt(0.4950424)
        ("precise", 0.9258981, -0.2870509, 0.1776509),
        ("ode", 1.0, -0.25, 0.0),
    ],
)
def test_by_hand(kind, a, b, tau):
    found = coefficients(torch.tensor([1.0, 0.5, 0.25, 0.0]), kind, 0.8)
    np.testing.assert_allclose([found.a[1], found.b[1], found.tau[1]], [a, b, tau], rtol=1e-6)


def test_flow_at_pure_noise_takes_the_next_sigma():
    found = Flow(0.5).coefficients(torch.tensor([1.0, 0.8, 0.4, 0.0]))
    std = 0.5 * np.sqrt(1 / (1 - 0.8))
    np.testing.assert_allclose(found.tau[0], std * np.sqrt(0.2), rtol=1e-6)
    np.testing.assert_allclose(found.a[0], 1 - std**2 * 0.2 / 2, rtol=1e-6)
    np.testing.assert_allclose(found.b[0], -0.2, rtol=1e-6)


@pytest.mark.parametrize("first", [1 - 2**-24, 1 + 2**-23], ids=["below", "above"])
def test_flow_at_pure_noise_up_to_rounding(first):
    """diffusers' static shift makes such first sigmas (0.35 and 0.4 do); 1 - s would be a rounding
    error, or negative."""
    grid = torch.tensor([first, 0.8, 0.4, 0.0])
    exact = Flow(0.7).coefficients(torch.tensor([1.0, 0.8, 0.4, 0.0]))
    found = Flow(0.7).coefficients(grid)
    assert grid[0] != 1
    np.testing.assert_allclose(found.tau, exact.tau, rtol=1e-6)
    np.testing.assert_allclose(found.a, exact.a, rtol=1e-6)


falling = (
    st.lists(st.floats(0.02, 0.98), min_size=1, max_size=12, unique=True)
    .map(lambda inner: torch.tensor([1.0, *sorted(inner, reverse=True), 0.0]))
    .filter(lambda grid: (grid.diff() < -1e-3).all())
)
etas = st.floats(0.05, 1.0)


@given(falling, etas, st.sampled_from([*KINDS, "ode"]))
def test_data_part_follows_the_flow(grid, eta, kind):
    """x = (1 - s) x_0 + s e and v = e - x_0 hold x_0 with weight a (1 - s) - b, which must be 1 -
    s'."""
    found, s = coefficients(grid, kind, eta), grid.double()
    data = found.a.double() * (1 - s[:-1]) - found.b.double()
    scale = found.a.abs().double() + found.b.abs().double() + 1
    assert ((data - (1 - s[1:])).abs() <= 3 * FP32 * scale).all()


@pytest.mark.parametrize("first", [1 - 2**-24, 1 + 2**-23], ids=["below", "above"])
def test_precise_at_pure_noise_takes_fresh_noise_alone(first):
    """rho = 0 there, also up to rounding: rho^0.01 of a rounding error would keep a sixth of the
    old noise."""
    found = Precise(0.1).coefficients(torch.tensor([first, 0.8, 0.4, 0.0]))
    np.testing.assert_allclose([found.a[0], found.b[0], found.tau[0]], [0.2, -0.2, 0.8], rtol=1e-6)
    assert found.tau[-1] == 0


@given(falling, etas, st.sampled_from(["cps", "precise"]))
def test_preserving_steps_keep_the_marginal_variance(grid, eta, kind):
    """The noise part, old and fresh together, has variance s'^2: FlowCPS's promise, exact at any
    step size."""
    found, s = KINDS[kind](eta).coefficients(grid), grid.double()
    old = found.a.double() * s[:-1] + found.b.double()
    variance = old**2 + found.tau.double() ** 2
    np.testing.assert_allclose(variance.numpy(), (s[1:] ** 2).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["flow", "dance"])
def test_langevin_keeps_the_marginal_variance_to_first_order(kind):
    """Half the step, a quarter of the error in the variance."""
    errors = []
    for dt in (0.02, 0.01):
        grid = torch.tensor([1.0, 0.6, 0.6 - dt, 0.0], dtype=torch.float64)
        found = KINDS[kind](0.7).coefficients(grid)
        old = found.a[1].double() * 0.6 + found.b[1].double()
        errors.append(abs(old**2 + found.tau[1].double() ** 2 - (0.6 - dt) ** 2).item())
    assert 3.5 < errors[0] / errors[1] < 4.5


# ------------------------------------------------------------------------------------------- jitter
@grids
def test_without_jitter_a_grid_is_itself(grid):
    assert jittered(grid, 0.0, 3, 5) is grid


@grids
def test_jitter_moves_inner_sigmas_within_their_gaps(grid):
    before = grid.clone()
    for iteration in range(20):
        found = jittered(grid, 0.9, 3, iteration)
        moved, gaps = (found - grid).double().abs(), -grid.double().diff()
        assert (
            found.dtype == torch.float32
            and found[0] == grid[0]
            and found[-1] == 0
            and (found.diff() < 0).all()
        )
        assert (
            moved[1:-1] <= 0.45 * torch.minimum(gaps[:-1], gaps[1:]) + FP32
        ).all() and moved.max() > 0
    assert torch.equal(grid, before)


def test_jitter_follows_seed_and_iteration():
    grid = GRIDS["even-10"]
    found = jittered(grid, 0.5, 3, 5)
    assert torch.equal(found, jittered(grid, 0.5, 3, 5))
    assert not torch.equal(found, jittered(grid, 0.5, 3, 6)) and not torch.equal(
        found, jittered(grid, 0.5, 4, 5)
    )
    # uniform in [-1, 1]
    u = torch.cat([(jittered(grid, 0.5, 3, i) - grid)[1:-1] for i in range(100)]) / (0.5 * 0.1 / 2)
    assert (
        u.abs().max() <= 1 + 1e-4
        and abs(u.mean()) < 0.07
        and u.std().item() == pytest.approx(3**-0.5, rel=0.1)
    )


def test_jitter_keeps_the_gradient_per_sigma():
    """b = (1 + eta^2 / 2) dt for flow on any grid, so that sums over steps stay sums over sigma."""
    grid = jittered(GRIDS["even-10"], 0.8, 0, 0)
    b = Flow(0.7).coefficients(grid).b.double()
    np.testing.assert_allclose((b / grid.double().diff())[1:], 1.245, rtol=1e-6)


@grids
@pytest.mark.parametrize("kind", KINDS)
def test_steps_take_noise_up_to_the_last(kind, grid):
    tau = KINDS[kind](0.7).coefficients(grid).tau
    assert (tau[:-1] > 0).all() and torch.isfinite(tau).all()
    assert (tau[-1] == 0) == (kind in ("cps", "precise")), (
        "only steps that preserve coefficients end without noise"
    )
