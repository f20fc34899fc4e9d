"""What adapts a rollout from iteration to iteration: its grid, its branch steps and its noise."""

import json

import numpy as np
import pytest
import torch
from engine_cases import Iteration, plan_table, small_config
from kernel_cases import assert_close
from run_cases import timeless, train

from tempflow.config import AdaptNoise
from tempflow.errors import UserError
from tempflow.estimate.costs import unit_rows
from tempflow.sampling.layout import Layout, iteration_units
from tempflow.sampling.steps import Cps, Dance, Flow, Precise
from tempflow.sampling.suffix import count_forwards
from tempflow.training.adapt import Adapt, NoiseLevels, StepChoice
from tempflow.training.credit import loss_weights, make_parts
from tempflow.training.rollout import Scored
from tempflow.types import ANY_UNIT, Advantages, Rewards, Row

PROMPT_GROUPS = {"training": {"advantage": {"over": "prompt"}}}
ROLLOUT = {"num_steps": 4, "plan": {"seeds": 1, "children": 2, "branch_steps": [0, 2]}}


# ------------------------------------------------------------------------------------------- jitter
def test_a_rollout_follows_the_grid_of_its_iteration(policy):
    run = Iteration(policy, small_config(rollout=ROLLOUT | {"jitter": 0.9}), [0])
    grid, fixed = run.session.grid_of(0), run.session.sampler.sigmas(4)
    assert torch.equal(run.session.grid.sigmas, fixed), "the grid of evaluations"
    assert (grid.sigmas != fixed).tolist() == [False, True, True, True, False]
    assert not torch.equal(grid.sigmas, run.session.grid_of(1).sigmas)
    exact = Flow(0.7).coefficients(grid.sigmas)
    for state in run.states:
        scalars = (grid.sigmas, exact.a, exact.b, exact.tau)
        assert (state.sigma, state.a, state.b, state.tau) == tuple(
            values[state.step].item() for values in scalars
        )
        noise = (state.children - state.a * state.x - state.b * _velocity(run, state)) / state.tau
        assert noise.std().item() == pytest.approx(1, abs=0.1), "children took this grid's step"
    tau = exact.tau[[0, 2]]
    assert torch.equal(loss_weights(run.session, run.rolled)[[0, 2]], tau / tau.mean())


@torch.no_grad()
def _velocity(run, state):
    s = run.session
    return s.sampler.velocity(
        s.policy.denoiser(), state.x[None], torch.tensor([state.sigma]), s.embed([state.unit])
    )[0]


def test_without_jitter_every_iteration_has_the_checkpoints_grid(policy):
    run = Iteration(policy, small_config(rollout=ROLLOUT), [0])
    assert run.session.grid_of(7) is run.session.grid is run.rolled.kept.grid


# ------------------------------------------------------------------------------------- branch steps
def choice(count=1, steps=(0, 1, 2), seed=0, **more) -> StepChoice:
    return StepChoice(count, list(steps), seed, **more)


def test_steps_are_drawn_by_where_rewards_spread():
    """By hand: spreads .3, .1, .1 without an even share are chances of .6, .2, .2; a third dealt
    evenly leaves each at least 1/9."""
    plain, shared = choice(even=0), choice()
    for one in (plain, shared):
        one.update({0: 0.3, 1: 0.1, 2: 0.1})
    assert plain.chances() == pytest.approx([0.6, 0.2, 0.2])
    assert shared.chances() == pytest.approx([1 / 9 + 0.4, 1 / 9 + 0.4 / 3, 1 / 9 + 0.4 / 3])
    drawn = np.bincount([plain.draw(iteration)[0] for iteration in range(1000)]) / 1000
    assert drawn == pytest.approx([0.6, 0.2, 0.2], abs=0.047)  # three standard errors
    assert [plain.draw(i) for i in range(20)] != [choice(seed=1, even=0).draw(i) for i in range(20)]


def test_several_steps_are_different_and_rise():
    one = choice(2, [0, 4, 8])
    for iteration in range(50):
        steps = one.draw(iteration)
        assert steps == sorted(set(steps)) and len(steps) == 2 and set(steps) <= {0, 4, 8}
        assert all(type(step) is int for step in steps)
    assert choice(3, [0, 4, 8]).draw(0) == [0, 4, 8]


def test_spread_is_remembered_by_half():
    one = choice(even=0)
    assert one.chances() == pytest.approx([1 / 3] * 3), "nothing seen"
    one.update({1: 0.2, 2: float("nan")})
    assert one.spread == {1: 0.2} and one.chances() == pytest.approx([1 / 3] * 3), (
        "those not seen count as the best"
    )
    one.update({1: 0.4, 0: 0.1})
    assert one.spread == pytest.approx({1: 0.3, 0: 0.1})
    one.spread = dict.fromkeys(range(3), 0.0)
    assert one.chances() == pytest.approx([1 / 3] * 3), "no spread anywhere"


def test_a_steps_weight_does_not_depend_on_the_others_drawn(policy):
    run = Iteration(policy, small_config(rollout=ROLLOUT), [0])
    tau = run.session.grid.sde.tau
    weights = loss_weights(run.session, run.rolled, [0, 1, 2])  # the rollout had steps 0 and 2
    assert torch.equal(weights[:3], tau[:3] / tau[:3].mean())
    (part,) = make_parts(run.session, run.rolled, run.advantages(), [0, 1, 2])
    (batch,) = part.batches
    step = {round(state.sigma, 6): state.step for state in run.states}
    assert batch.weight.tolist() == pytest.approx(
        [weights[step[round(sigma.item(), 6)]].item() for sigma in batch.sigma]
    )


def test_the_dry_run_counts_the_dearest_steps():
    """The earliest have the longest ways to go; with a suffix as coarse as this one, the number of
    children decides."""
    plan = {"children": [2, 2, 6], "branch_steps": [0, 4, 8]}
    for suffix in (None, {"stride": 9}):
        config = small_config(rollout={"plan": plan, "adapt": {"steps": 2}, "suffix": suffix})
        pairs = [
            config.plan().at_steps(pair).rows(ANY_UNIT, 0) for pair in ([0, 4], [0, 8], [4, 8])
        ]
        found, *others = (
            count_forwards(rows, 10, config.rollout.suffix) for rows in (unit_rows(config), *pairs)
        )
        assert found == max(others) > min(others)


# -------------------------------------------------------------------------------------------- noise
def levels(**settings) -> NoiseLevels:
    return NoiseLevels(AdaptNoise(**settings))


@pytest.mark.parametrize(
    "rewards, level",
    [
        ([2, 2, 2, 2, 2, 0], 0.98),  # five better than 1, one worse: by hand, one step down
        ([2, 2, 2, 0, 0, 0], 1.02),
        ([0, 0, 0, 0, 0, 0], 0.98),
        ([1, 1, 1, 1, 1, 1], 1.02),  # noise that nothing comes of
        ([2, np.nan, 0, np.nan, 1, 1], 1.02),
        ([2, 2, 1, 1, 1, 1], 0.98),  # a third apart, and not within the band
    ],
)
def test_noise_falls_where_children_go_one_way(rewards, level):
    one = levels(step=0.02, band=0.1)
    one.update(np.full(6, 4), np.ones(6), np.array(rewards, dtype=float))
    assert one.along(6) == pytest.approx([1, 1, 1, 1, level, 1])


def test_noise_moves_step_by_step_within_bounds():
    one, step = levels(step=0.3), np.array([0, 0, 2, 2, 3])
    for _ in range(9):
        one.update(step, np.ones(5), np.array([2.0, 0, 0, 0, np.nan]))
    assert one.level == {0: 2.0, 2: 0.25}, "a step whose rewards all failed keeps its noise"


@pytest.mark.parametrize("kind", [Flow, Dance])
def test_scaled_noise_is_the_sde_of_that_noise(kind):
    """Drift and all, so that the marginal is kept as well as without scaling."""
    grid = torch.linspace(1, 0, 6)
    scaled, whole, other = (
        kind(0.4).coefficients(grid, [1.5] * 4 + [1.0]),
        kind(0.4).coefficients(grid),
        kind(0.6).coefficients(grid),
    )
    for name in ("a", "b", "tau"):
        assert_close(name, getattr(scaled, name)[:4], getattr(other, name)[:4], rel=1e-6)
        assert getattr(scaled, name)[4] == getattr(whole, name)[4]


@pytest.mark.parametrize("kind", [Cps, Precise])
def test_scaled_noise_of_preserving_steps_keeps_the_marginal(kind):
    grid, plain = torch.linspace(1, 0, 6), kind(0.7).coefficients(torch.linspace(1, 0, 6))
    for level in (0.25, 0.9, 2.0):
        found, s = kind(0.7).coefficients(grid, [level] * 5), grid.double()
        assert_close("tau", found.tau, torch.minimum(level * plain.tau, grid[1:]), rel=1e-6)
        variance = (found.a * s[:-1] + found.b) ** 2 + found.tau**2
        np.testing.assert_allclose(variance.numpy(), (s[1:] ** 2).numpy(), rtol=1e-5, atol=1e-6)


def test_which_row_follows_the_ode_from_a_state():
    units = iteration_units([5, 6], 1)
    for kind, rows in (("tempflow", [0] * 4 + [5] * 4), ("flow_grpo", [-1] * 4)):
        plan = plan_table(kind, seeds=2, children=2, branch_steps=[0, 2])
        config = small_config(rollout={"num_steps": 4, "plan": plan}, **PROMPT_GROUPS)
        assert (
            Layout(units, [config.plan().rows(unit, 0) for unit in units]).completions.tolist()
            == rows
        )
    unit = units[0]
    late = [Row(unit, noise=frozenset([0])), Row(unit, 2, frozenset([2]), parent=0, path=(1,))]
    assert Layout([unit], [late]).completions.tolist() == [
        -1,
        0,
    ], "a row that took noise before step 2 only"


def test_a_path_with_values_is_compared_with_those(policy):
    """By hand: step rewards of .1 and .2 at step 0, of which both are better, and of -.1 and .1 at
    step 2."""
    config = small_config(
        rollout={
            "num_steps": 4,
            "plan": {"type": "flow_grpo", "seeds": 2, "branch_steps": [0, 2], "values": True},
            "adapt": {"noise": {}},
        },
        training={"advantage": {"type": "dense", "over": "prompt"}},
    )
    adapt, unit = Adapt(config.rollout.adapt, config.plan()), iteration_units([5], 2)
    layout = Layout(unit, [config.plan().rows(one, 0) for one in unit])
    rewards = np.zeros(len(layout))
    rewards[layout.slots.before], rewards[layout.slots.after] = (
        [0.1, 0.2, 0.2, 0.4],
        [0.2, 0.1, 0.4, 0.5],
    )
    before, after = layout.slots.values(rewards)
    given = Rewards(layout.slots.means(rewards), {}, {}, {}, before, after)
    adapt.observe(
        layout,
        Scored(given, 4, 0, 0.0, {}, {}, rewards),
        Advantages(np.zeros(4), np.ones(4, dtype=bool), np.zeros(2), {}),
    )
    assert adapt.levels == pytest.approx([0.98, 1, 1.02, 1])


# --------------------------------------------------------------------------------------- whole runs
REFUSED = [
    ({"adapt": {}}, "rollout.adapt.*set steps, noise or both"),
    ({"adapt": {"steps": 4}}, "rollout.adapt.steps: 4 of 3 branch steps"),
    (
        {"adapt": {"steps": 1}, "plan": {"branch_steps": {"random": 2}}},
        "rollout.adapt.steps: rollout.plan.branch_steps already draws steps",
    ),
    (
        {"adapt": {"steps": 1}, "plan": "flow_grpo"},
        "rollout.adapt.steps: plan flow_grpo has no branch steps",
    ),
    (
        {"adapt": {"noise": {}}, "plan": "flow_grpo"},
        "rollout.adapt.noise: plan flow_grpo does not follow the ODE",
    ),
    ({"adapt": {"noise": {"band": 1}}}, "rollout.adapt.noise.band"),
    ({"jitter": 1.0}, "rollout.jitter"),
]


@pytest.mark.parametrize("rollout, message", REFUSED)
def test_what_cannot_work_is_refused(rollout, message):
    with pytest.raises(UserError, match=message):
        small_config(rollout=rollout, **PROMPT_GROUPS)


def test_objectives_without_states_are_refused():
    with pytest.raises(UserError, match="rollout.adapt: .*nft learns from finished latents"):
        small_config(rollout={"adapt": {"steps": 1}}, training={"objective": "nft"})


@pytest.mark.slow
def test_a_resumed_run_adapts_as_an_undisturbed_one(tmp_path):
    def run(name, iterations, *more):
        return train(
            tmp_path,
            name,
            *more,
            processes=None,
            eval={"every": 0},
            rollout={
                "num_steps": 5,
                "jitter": 0.5,
                "adapt": {"steps": 3, "noise": {"step": 0.1}},
                "plan": {"branch_steps": "all", "seeds": 1},
            },
            training={"iterations": iterations},
        )

    whole = run("whole", 2)
    run("resumed", 1)
    resumed = run("resumed", 2, "--resume")
    assert [timeless(row) for row in resumed.rows] == [timeless(row) for row in whole.rows]
    first, second = whole.rows[1:]
    for row in (first, second):
        assert sum(key.startswith("reward_std/step_") for key in row) == 3
    chances = [[row[f"adapt/p_step_{k}"] for k in range(4)] for row in (first, second)]
    assert chances[0] == pytest.approx([0.25] * 4) and chances[1] != pytest.approx([0.25] * 4)
    noise = {key: value for key, value in second.items() if key.startswith("adapt/noise_")}
    assert (
        len(noise) == 3
        and {first.get(key, 1) for key in noise} == {1}
        and len({0.9, 1.1} & set(noise.values())) > 0
    )
    state = json.loads((whole.folder / "checkpoints/000002/state.json").read_text())["adapt"]
    assert set(state["noise"]) == set(state["spread"])
