"""Plans with a number of children for each branch step: their rows, their cost, and the mean over
each state's own children."""

from types import SimpleNamespace

import pytest
import torch
from engine_cases import small_config
from rollout_cases import GRID, Rollout

from tempflow.errors import UserError
from tempflow.estimate.costs import phases, unit_states
from tempflow.estimate.model import Pass
from tempflow.objectives.base import NEVER, kernel_loss
from tempflow.sampling.layout import iteration_units, states_of
from tempflow.sampling.plans.flow_grpo import FlowGrpo
from tempflow.sampling.plans.mix_grpo import MixGrpo
from tempflow.sampling.plans.tempflow import TempFlow
from tempflow.training import batches
from tempflow.training.batches import make_batches, padding_of, select
from tempflow.types import Advantages, State

STEPS = len(GRID) - 1
UNIT = iteration_units([3], 1)[0]
RSM = {"seeds": 1, "branch_steps": [0, 1, 2, 3], "children": [6, 6, 8, 10]}


def prepared(kind=TempFlow, **options):
    made = kind(**options)
    made.prepare(STEPS, 0)
    return made


def counts(plan) -> dict[int, int]:
    return {step: len(children) for (_, step), children in states_of(plan.rows(UNIT, 0)).items()}


def test_each_step_has_its_number():
    assert counts(prepared(**RSM)) == {0: 6, 1: 6, 2: 8, 3: 10} and prepared(**RSM).children == 10
    assert counts(prepared(children=[1, 2, 3, 4, 5, 6, 7, 8, 9])) == {k: k + 1 for k in range(9)}


def test_one_number_is_a_list_of_equal_ones():
    assert prepared(children=3).rows(UNIT, 0) == prepared(children=[3] * 9).rows(UNIT, 0)
    keys = [(step, row.path) for row in prepared(**RSM).rows(UNIT, 0) for step in row.noise]
    assert len(set(keys)) == len(keys) == 30


def test_numbers_stay_with_their_steps():
    """A plan narrowed to some of its steps has their children, noise and all."""
    plan = prepared(**RSM)
    narrowed = plan.at_steps([3, 1])
    assert narrowed.steps(7) == [1, 3] and counts(narrowed) == {1: 6, 3: 10}
    assert set(narrowed.rows(UNIT, 7)) < set(plan.rows(UNIT, 7)), (
        "the noise of a child depends on neither"
    )
    assert counts(plan) == {0: 6, 1: 6, 2: 8, 3: 10}, "the plan itself stays as it is"
    with pytest.raises(ValueError, match=r"\[4\] of \[0, 1, 2, 3\]"):
        plan.at_steps([4])


def test_other_plans_narrowed():
    assert prepared(branch_steps={"random": 2}).at_steps([8]).steps(0) == [8]
    assert prepared(FlowGrpo).at_steps([2, 5]).rows(UNIT, 0)[0].noise == {2, 5}
    with pytest.raises(UserError, match="MixGrpo does not allow its steps"):
        prepared(MixGrpo).at_steps([0])


def test_forwards_of_the_rollout_and_of_the_forecast():
    """A trunk of 10, and children whose first step is their parent's: 6 x 9 + 6 x 8 + 8 x 7 + 10 x
    6."""
    config = small_config(rollout={"plan": RSM}, data={"prompts_per_iteration": 1})
    run = Rollout(config, [UNIT])
    assert run.stats.forwards == 10 + 54 + 48 + 56 + 60 and len(run.finished) == 31
    assert [len(run.states[0, k].children) for k in range(4)] == [6, 6, 8, 10]
    one = Pass(1, 1)
    model = SimpleNamespace(
        ragged=False,
        forward=lambda rows, guidance=None: one,
        decode=lambda: one,
        training=lambda rows: one,
    )
    forwards = {phase.name: phase.forwards for phase in phases(config, model, 1, 1.0)}
    assert (forwards["rollout"], forwards["decode"], forwards["training"]) == (228, 31, 4)
    assert unit_states(config) == [6, 6, 8, 10]


@pytest.mark.parametrize("padding, trained", [(5, 3), (2, 3)], ids=["wider", "narrower"])
def test_padding_is_as_wide_as_what_is_trained_on(monkeypatch, padding, trained):
    """Another rank has three states; this one has one, and pads with a state that itself has no
    spread."""
    monkeypatch.setattr(batches.distributed, "reduce", lambda value, op="sum": 3)
    g, states = torch.Generator().manual_seed(0), []
    for size, first in ((padding, 0), (trained, padding)):
        x, children = torch.randn(4, generator=g), torch.randn(size, 4, generator=g)
        states.append(
            State(
                UNIT,
                0,
                0.5,
                0.9,
                -0.2,
                0.3,
                x,
                children,
                first + torch.arange(size).numpy(),
                torch.zeros(size),
            )
        )
    values = torch.arange(padding + trained, dtype=torch.float32)
    values[:padding] = 0
    credit = Advantages(
        values.numpy(), torch.ones(padding + trained, dtype=torch.bool).numpy(), None, {}
    )
    (batch,) = make_batches(
        select(states, credit, None), padding_of(states), 8, torch.ones(1), "cpu"
    )
    assert (
        batch.children.shape == (3, trained, 4)
        and batch.real == 1
        and batch.weight.tolist() == [1, 0, 0]
    )
    assert batch.advantage.tolist() == [values[padding:].tolist(), [0] * trained, [0] * trained]


def test_a_state_is_a_mean_over_its_own_children():
    """In a micro-batch as wide as its widest state: the gradient is -w mean_i A_i d log p_i / dv, a
    failed child left out."""
    torch.manual_seed(0)
    a, b, tau, d = 0.9, -0.2, 0.3, 5
    sizes, values = [2, 4, 1], [0.5, -1.0, 1.0, 0.0, -2.0, 3.0, 0.7]
    valid = [True, True, True, True, True, False, True]
    states, first = [], 0
    for step, size in enumerate(sizes):
        slots = torch.arange(first, first + size).numpy()
        states.append(
            State(
                UNIT,
                step,
                0.5,
                a,
                b,
                tau,
                torch.randn(d),
                torch.randn(size, d),
                slots,
                torch.zeros(size),
            )
        )
        first += size
    credit = Advantages(
        torch.tensor(values).masked_fill(~torch.tensor(valid), 0).numpy(),
        torch.tensor(valid).numpy(),
        None,
        {},
    )
    weights = torch.tensor([1.0, 0.5, 2.0])
    (batch,) = make_batches(select(states, credit, None), padding_of(states), 8, weights, "cpu")
    assert batch.children.shape == (3, 4, d)
    velocity = torch.randn(3, d, requires_grad=True)
    kernel_loss(velocity, batch, batch.advantage, None, None, None, **NEVER)[0].backward()
    for n, state in enumerate(states):
        known = credit.valid[state.slots]
        slope = b * (state.children - a * state.x - b * velocity[n].detach()) / (tau**2 * d)
        pulls = torch.from_numpy(credit.values[state.slots])[:, None] * slope
        torch.testing.assert_close(velocity.grad[n], -weights[n] * pulls[known].mean(0) / 3)
