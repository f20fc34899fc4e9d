"""Guards against reward hacking: how different a prompt's pictures are, watched rewards, and the
rule that stops a run."""

import itertools

import numpy as np
import pytest
import torch
from engine_cases import Iteration, naive_trajectories, plan_table, small_config
from hypothesis import given
from hypothesis import strategies as st

from tempflow.config import Stop
from tempflow.errors import UserError
from tempflow.rewards import check_watched, parse_rewards
from tempflow.run.diversity import mean_distance, thumbnails
from tempflow.run.stopping import StopRule
from tempflow.sampling.layout import iteration_units
from tempflow.types import Size


# ---------------------------------------------------------------------------------------- diversity
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (32, 96), (100, 64)])
def test_distance_of_black_and_white_is_one(shape):
    """Whatever the size: a quarter of the pixel range apart everywhere is a distance of a
    quarter."""
    pictures = np.stack([np.full((*shape, 3), level, np.uint8) for level in (0, 255, 51)])
    apart = mean_distance(thumbnails(pictures)[None])
    np.testing.assert_allclose(apart, [(1 + 0.2 + 0.8) / 3], rtol=1e-6)


def test_distance_by_hand():
    rng = np.random.default_rng(0)
    groups = rng.random((2, 3, 4, 10))
    pairs = [
        np.sqrt(((groups[..., i, :] - groups[..., j, :]) ** 2).mean(-1))
        for i, j in itertools.combinations(range(4), 2)
    ]
    np.testing.assert_allclose(mean_distance(groups), np.mean(pairs, axis=0), rtol=1e-12)
    assert (
        mean_distance(np.repeat(groups[..., :1, :], 40, axis=-2)) == 0
    ).all()  # one picture, forty times


def test_thumbnails_are_means_of_blocks():
    picture = np.random.default_rng(1).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    blocks = picture[0].reshape(32, 2, 32, 3, 3).mean((1, 3)) / 255
    np.testing.assert_allclose(
        thumbnails(picture), blocks.transpose(2, 0, 1).reshape(1, -1), rtol=1e-5
    )


@pytest.fixture(scope="module")
def rollout(policy):
    """Two rewards and a watched one; the pictures that were scored are kept."""
    rewards = {"engine_rewards:contrast": 0.5, "jpeg": -0.1, "engine_rewards:never": 0}
    return Iteration(
        policy,
        small_config(
            rewards=rewards, rollout={"num_steps": 3, "plan": {"branch_steps": [0, 1], "seeds": 3}}
        ),
    )


def test_each_reward_is_kept_alone_and_watched_ones_are_not_scored(rollout):
    rewards = rollout.scored.rewards
    assert rewards.parts.keys() == {"engine_rewards:contrast", "jpeg"}
    total = 0.5 * rewards.parts["engine_rewards:contrast"] - 0.1 * rewards.parts["jpeg"]
    np.testing.assert_allclose(rewards.total, total, rtol=1e-6)


def test_diversity_of_a_rollout(rollout, policy):
    """Against pictures of trajectories one at a time: trunks of a prompt's seeds, and children of
    each state."""
    units = iteration_units([0, 1], 3)

    def velocity(x, sigma, rows):
        return policy.velocity(
            policy.transformer, x, sigma, rollout.session.embed(rows), Size(32, 96), 0.0
        )

    with torch.no_grad():
        finished, _ = naive_trajectories(
            rollout.config,
            velocity,
            units,
            rollout.session.grid.sigmas,
            policy.latent_shape(Size(32, 96)),
        )
    small = {
        place: thumbnails(policy.decode(latent[None], Size(32, 96))[0])[0]
        for place, latent in finished.items()
    }
    trunks = [[small[unit.index, None, 0] for unit in units if unit.prompt == p] for p in (0, 1)]
    children = [[small[unit.index, k, i] for i in (0, 1)] for unit in units for k in (0, 1)]
    for name, groups in (("seeds", trunks), ("children", children)):
        expected = np.mean(
            [
                np.sqrt(((a - b) ** 2).mean())
                for group in groups
                for a, b in itertools.combinations(group, 2)
            ]
        )
        np.testing.assert_allclose(
            rollout.scored.diversity[f"diversity/{name}"], expected, rtol=1e-3
        )


@pytest.mark.parametrize(
    "plan, known", [("flow_grpo", {"diversity/seeds"}), ("tempflow", {"diversity/children"})]
)
def test_diversity_where_there_are_pairs(policy, plan, known):
    """Rows that are their own trunks, and a single seed."""
    seeds = 2 if plan == "flow_grpo" else 1
    table = {"plan": plan_table(plan, branch_steps=[0], seeds=seeds, children=2), "num_steps": 2}
    data = Iteration(
        policy, small_config(rollout=table, training={"advantage": {"over": "prompt"}}), [0]
    ).scored
    assert data.diversity.keys() == known and all(value > 0 for value in data.diversity.values())


# --------------------------------------------------------------------------------------- early stop
def verdicts(values, **rule):
    judge = StopRule(Stop(metric="eval/m", **rule))
    return [
        judge.observe({"iteration": n, "eval/reward": 0.0, "eval/m": value}) is not None
        for n, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    "values, rule, stops",
    [
        ([1, 2, 3, 4], {"patience": 1}, None),
        ([1, 2, 2, 1, 3], {"patience": 2}, 3),
        ([1, 2, 1, 3, 2, 2], {"patience": 2}, 5),
        # 1.8 is a new best, 2.2 waits
        ([1, 1.4, 1.8, 2.2], {"patience": 2, "min_delta": 0.5}, None),
        ([1, 1.4, 1.5, 9], {"patience": 2, "min_delta": 0.5}, 2),
        ([3, None, float("nan"), 2, None, 1], {"patience": 2}, 5),
        ([3, 2, 1.9, 5], {"below": 2.0}, 2),
        ([0.1, 0.3, 0.2], {"above": 0.25}, 1),
        ([5, 4, 3, 1], {"patience": 9, "below": 2.0}, 3),
        ([], {"patience": 1}, None),
    ],
)
def test_when_a_run_stops(values, rule, stops):
    found = verdicts(values, **rule)
    assert (found.index(True) if True in found else None) == stops


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, float("nan")]), min_size=1, max_size=12), st.data())
def test_a_resumed_run_judges_as_an_undisturbed_one(values, data):
    """Replayed from the record, of which the evaluation that ends a run is no regular part."""
    rows = [
        {"iteration": 2 * n, "eval/reward": 0.0, "eval/m": value} for n, value in enumerate(values)
    ]
    rule, cut = Stop(metric="eval/m", patience=2), data.draw(st.integers(0, len(rows) - 1))
    whole = StopRule(rule)
    expected = [whole.observe(row) for row in rows]
    resumed = StopRule(rule)
    between = [{"iteration": row["iteration"] + 1, "loss": 0.0} for row in rows[:cut]]
    extra = [{"iteration": 2 * cut - 1, "eval/reward": 0.0, "eval/m": 9.0}] if cut else []
    record = sorted(rows[:cut] + between + extra, key=lambda row: row["iteration"])
    last = resumed.replay(record, every=2)
    assert last == (expected[cut - 1] if cut else None)
    assert [resumed.observe(row) for row in rows[cut:]] == expected[cut:]


def test_the_reason_says_what_was_seen():
    rule = StopRule(Stop(metric="eval/m", patience=2, below=0.0))
    seen = [
        rule.observe({"iteration": 10 * n, "eval/m": value})
        for n, value in enumerate([0.25, 0.5, 0.5, 0.125])
    ]
    assert (
        seen[3] == "eval.stop: eval/m 0.125, no better than 0.5 at iteration 10 for 2 evaluations"
    )
    assert rule.observe({"iteration": 40, "eval/m": -1.0}) == "eval.stop: eval/m -1 is below 0"


@pytest.mark.parametrize(
    "stop, words",
    [
        ({"metric": "eval/reward"}, ["eval.stop", "patience, below or above"]),
        (
            {"metric": "jpeg", "patience": 1},
            ["eval.stop.metric", "'jpeg'", "eval/engine_rewards:contrast"],
        ),
        # there is none: kl_coef is 0
        ({"metric": "kl", "above": 0.1}, ["eval.stop.metric", "'kl'"]),
        ({"metric": "diversity/seeds", "below": 0.1}, ["eval.stop.metric"]),  # one seed
        ({"metric": "eval/reward", "patience": 0}, ["eval.stop.patience"]),
        ({"metric": "eval/reward", "patience": 1, "min_delta": -0.1}, ["eval.stop.min_delta"]),
    ],
)
def test_rules_that_are_refused(stop, words):
    with pytest.raises(UserError) as error:
        small_config(rollout={"plan": {"seeds": 1}}, eval={"every": 2, "stop": stop})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "stop, metric",
    [
        (None, "eval/reward"),
        ({"metric": "diversity/seeds", "patience": 2}, "diversity/seeds"),
        # a bound: it does not say that more is better
        ({"metric": "diversity/seeds", "below": 0.1}, "eval/reward"),
        ({"metric": "diversity/seeds", "below": 0.1, "patience": 2}, "diversity/seeds"),
    ],
)
def test_the_best_is_what_the_rule_waits_for(stop, metric):
    assert (
        small_config(rollout={"plan": {"seeds": 2}}, eval={"every": 2, "stop": stop}).best_metric()
        == metric
    )


@pytest.mark.parametrize("changes", [{"data": {"heldout": None}}, {"eval": {"every": 0}}])
def test_a_rule_or_a_watched_reward_without_evaluations_is_refused(changes):
    stop = {"metric": "eval/reward", "patience": 1}
    with pytest.raises(UserError, match="eval.stop: there are no evaluations"):
        small_config(**{**changes, "eval": {**changes.get("eval", {}), "stop": stop}})
    specs = parse_rewards({"jpeg": 1.0, "ocr": 0})
    check_watched(specs, evaluated=True)
    with pytest.raises(
        UserError, match="rewards.ocr: a reward of weight 0 is scored only at evaluations"
    ):
        check_watched(specs, evaluated=False)
