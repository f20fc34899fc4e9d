"""What adapts a rollout from iteration to iteration: its grid, its branch steps and its noise."""

import pytest
import torch
from engine_cases import Iteration, small_config

from tempflow.sampling.steps import Flow
from tempflow.training.credit import loss_weights

ROLLOUT = {"num_steps": 4, "plan": {"seeds": 1, "children": 2, "branch_steps": [0, 2]}}


# -------------------------------------------------------------------------------------------------------- jitter
def test_a_rollout_follows_the_grid_of_its_iteration(policy):
    run = Iteration(policy, small_config(rollout=ROLLOUT | {"jitter": 0.9}), [0])
    grid, fixed = run.session.grid_of(0), run.session.sampler.sigmas(4)
    assert torch.equal(run.session.grid.sigmas, fixed), "the grid of evaluations"
    assert (grid.sigmas != fixed).tolist() == [False, True, True, True, False]
    assert not torch.equal(grid.sigmas, run.session.grid_of(1).sigmas)
    exact = Flow(0.7).coefficients(grid.sigmas)
    for state in run.states:
        scalars = (grid.sigmas, exact.a, exact.b, exact.tau)
        assert (state.sigma, state.a, state.b, state.tau) == tuple(values[state.step].item() for values in scalars)
        noise = (state.children - state.a * state.x - state.b * _velocity(run, state)) / state.tau
        assert noise.std().item() == pytest.approx(1, abs=0.1), "children took this grid's step"
    tau = exact.tau[[0, 2]]
    assert torch.equal(loss_weights(run.session, run.rolled)[[0, 2]], tau / tau.mean())


@torch.no_grad()
def _velocity(run, state):
    s = run.session
    return s.sampler.velocity(s.policy.denoiser(), state.x[None], torch.tensor([state.sigma]), s.embed([state.unit]))[0]


def test_without_jitter_every_iteration_has_the_checkpoints_grid(policy):
    run = Iteration(policy, small_config(rollout=ROLLOUT), [0])
    assert run.session.grid_of(7) is run.session.grid is run.rolled.kept.grid
