"""Curation: prompts whose rewards never spread rest for a while and come back; the same again after
a resume."""

import json

import numpy as np
import pytest
from engine_cases import dense_slots
from hypothesis import given, settings
from hypothesis import strategies as st
from run_cases import timeless, train

from tempflow.config import Curation as Settings
from tempflow.data.curation import Curation, Draw
from tempflow.data.prompts import PromptOrder

SOLVED, HOPELESS = {0, 1}, {2}


def curation(count=8, size=2, rest=6, spread=0.1, seed=0, group="seed", prefer=0.0):
    return Curation(
        Settings(spread=spread, rest=rest, prefer=prefer), PromptOrder(count, size, seed), group
    )


def rewards_of(indices, iteration):
    """[P, 2, 3, 4]: the same reward for all pictures of a solved or hopeless prompt, noise for the
    others."""
    rng = np.random.default_rng([iteration, *indices])
    rewards = rng.random((len(indices), 2, 3, 4))
    for place, index in enumerate(indices):
        if index in SOLVED | HOPELESS:
            rewards[place] = 1.0 if index in SOLVED else 0.0
    return rewards


def take_up(chooser, draw, iteration, rewards):
    """rewards: [P, S, K, B]."""
    chooser.update(draw, iteration, dense_slots(rewards.shape), rewards.ravel())


def play(chooser, first, last):
    """The draws of iterations first .. last - 1, each taken up with its rewards."""
    draws = []
    for iteration in range(first, last):
        draws.append(chooser.draw(iteration))
        take_up(chooser, draws[-1], iteration, rewards_of(draws[-1].indices, iteration))
    return draws


def test_without_rest_the_order_is_the_plain_one():
    """Every prompt in turn, as long as none rests: the epochs of PromptOrder."""
    chooser = curation(count=6, size=2)
    order, drawn = PromptOrder(6, 2, 0), []
    for iteration in range(9):
        draw = chooser.draw(iteration)
        take_up(chooser, draw, iteration, np.random.default_rng(iteration).random((2, 2, 3, 4)))
        assert draw.indices == order.indices(iteration) and draw.passed == []
        drawn += draw.indices
    assert sorted(drawn) == sorted(list(range(6)) * 3)


def test_solved_and_hopeless_prompts_rest_and_return():
    chooser, last_flat = curation(rest=6), {}
    seen = []
    for iteration, draw in enumerate(play(chooser, 0, 60)):
        assert len(set(draw.indices)) == 2
        for index in set(draw.indices) & (SOLVED | HOPELESS):
            if index in last_flat:
                assert iteration - last_flat[index] > 6, "it rests for six iterations"
            last_flat[index] = iteration
            seen.append(index)
        assert not set(draw.passed) & set(draw.indices)
    assert set(seen) == SOLVED | HOPELESS and min(last_flat.values()) > 40, "they are tried again"
    assert len(seen) < 0.6 * 120 * 3 / 8, "and drawn far less often than their share"


def test_metrics_tell_solved_from_hopeless():
    chooser = curation(count=4, size=4, rest=5)
    (draw,) = play(chooser, 0, 1)
    assert chooser.metrics(draw, 0) == {
        "prompts/skipped": 0,
        "prompts/solved": 0.5,
        "prompts/hopeless": 0.25,
    }
    # One of four is awake, and four are wanted: the resting ones join it.
    assert sorted(chooser.draw(1).indices) == [0, 1, 2, 3] and chooser.draw(1).passed == []
    chooser.order.per_iteration = 1
    draw = chooser.draw(1)
    assert draw.indices == [3] and chooser.metrics(draw, 1)["prompts/skipped"] == len(
        draw.passed
    ) / (len(draw.passed) + 1)


def test_those_that_wake_first_join_where_too_few_are_awake():
    chooser = curation(count=4, size=2)
    chooser.until[:] = [9, 5, 7, 0]
    draw = chooser.draw(1)
    assert draw.indices == [3, 1] and sorted(draw.passed) == [0, 2]


def test_a_draw_counts_only_when_taken_up():
    """An iteration given up by a signal is drawn again."""
    chooser = curation()
    play(chooser, 0, 5)
    before = chooser.state()
    assert chooser.draw(5) == chooser.draw(5) and chooser.state() == before


@settings(max_examples=20)
@given(
    st.integers(1, 9),
    st.integers(0, 24),
    st.sampled_from(["seed", "prompt"]),
    st.integers(1, 12),
    st.sampled_from([0, 0.5, 1]),
)
def test_resume_goes_on_exactly(size, stop, group, rest, prefer):
    """Its state, through JSON as in a checkpoint, is all that the rest of a run depends on."""
    whole = play(curation(9, size, rest, group=group, prefer=prefer), 0, 24)
    first = curation(9, size, rest, group=group, prefer=prefer)
    play(first, 0, stop)
    second = curation(9, size, rest, group=group, prefer=prefer)
    second.load(json.loads(json.dumps(first.state())))
    assert play(second, stop, 24) == whole[stop:]


def test_spread_is_within_groups():
    """Seeds that differ, children that do not: nothing to learn for seed groups, all to learn for
    prompt groups."""
    rewards = np.stack(
        [np.broadcast_to([[[0.0]], [[1.0]]], (2, 3, 4)), np.random.default_rng(0).random((2, 3, 4))]
    )
    for group, resting in (("seed", [True, False]), ("prompt", [False, False])):
        chooser = curation(count=2, size=2, group=group)
        draw = chooser.draw(0)
        take_up(chooser, draw, 0, rewards)
        assert [chooser.until[index] > 0 for index in draw.indices] == resting


def test_failed_rewards_teach_nothing_about_a_prompt():
    chooser = curation(count=2, size=2)
    draw, rewards = chooser.draw(0), rewards_of([7, 6], 0)
    rewards[0] = np.nan
    rewards[1, 0] = np.nan
    take_up(chooser, draw, 0, rewards)
    assert np.isnan(chooser.signal[draw.indices[0]]) and chooser.signal[
        draw.indices[1]
    ] == pytest.approx(rewards[1, 1].std(1).mean())
    assert not chooser.until.any()


def test_where_nothing_spreads_nobody_rests():
    chooser = curation(count=3, size=3)
    take_up(chooser, chooser.draw(0), 0, np.ones((3, 2, 3, 4)))
    assert not chooser.until.any()


# --------------------------------------------------------------------------------------- preference
def spread_out(std, count):
    """Rewards of one group, [1, 1, 1, count], half of them `std` above their mean and half
    below."""
    return np.resize([std, -std], (1, 1, 1, count))


def test_the_prompt_of_most_spread_is_preferred():
    """By hand: signals .1, .3, .2 from six rewards each; one place goes to prompt 1."""
    chooser = curation(count=3, size=1, prefer=1.0)
    for index, std in enumerate((0.1, 0.3, 0.2)):
        take_up(chooser, Draw([index], [], index + 1), index, spread_out(std, 6))
    assert chooser.signal == pytest.approx([0.1, 0.3, 0.2]) and chooser.error == pytest.approx(
        chooser.signal / np.sqrt(10)
    )
    draw = chooser.draw(3)
    assert draw.indices == [1] and draw.preferred == 1 and draw.cursor == chooser.cursor
    assert chooser.metrics(draw, 3)["prompts/skipped"] == 0


def test_a_spread_of_few_rewards_counts_for_less():
    """.3 from two rewards less .3 / sqrt(2) is .09; .2 from six less .2 / sqrt(10) is .14. Seen
    again, .3 / 2 is the error."""
    chooser = curation(count=2, size=1, prefer=1.0)
    take_up(chooser, Draw([0], [], 1), 0, spread_out(0.3, 2))
    take_up(chooser, Draw([1], [], 2), 1, spread_out(0.2, 6))
    assert chooser.draw(2).indices == [1]
    take_up(chooser, Draw([0], [], 3), 2, spread_out(0.3, 2))
    assert chooser.signal[0] == pytest.approx(0.3) and chooser.error[0] == pytest.approx(0.3 / 2)
    assert chooser.draw(3).indices == [0]


def test_other_places_go_on_in_order():
    """Half of the places; nothing known at first. Prompts that rest are not preferred, and none
    comes twice."""
    plain, chooser = (
        curation(count=8, size=4, rest=3),
        curation(count=8, size=4, rest=3, prefer=0.5),
    )
    assert chooser.draw(0) == plain.draw(0)
    for iteration in range(12):
        draw = chooser.draw(iteration)
        assert len(set(draw.indices)) == 4 and draw.preferred == (2 if iteration else 0)
        best = draw.indices[: draw.preferred]
        assert not any(chooser.until[index] > iteration for index in best)
        assert all(chooser.signal[index] > 0 for index in best)
        take_up(chooser, draw, iteration, rewards_of(draw.indices, iteration))
    assert np.isfinite(chooser.signal).all(), "every prompt has been met"


# --------------------------------------------------------------------------------------- whole runs
@pytest.mark.slow
def test_a_resumed_run_curates_as_an_undisturbed_one(tmp_path):
    """Two prompts of four are scored alike whatever the picture; the run passes over them, before
    and after a resume."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('the word "FLAT"\nthe word "AB"\nthe word "EVEN"\nthe word "CD"\n')

    def run(name, iterations, *more):
        return train(
            tmp_path,
            name,
            *more,
            processes=None,
            rewards={"engine_rewards:contrast_of_some": 1.0},
            eval={"every": 0},
            data={
                "train": str(prompts),
                "heldout": None,
                "prompts_per_iteration": 2,
                "curation": {"rest": 4, "spread": 0.2},
            },
            rollout={"num_steps": 3, "plan": {"branch_steps": [0], "seeds": 1}},
            training={"iterations": iterations},
            checkpoint={"every": 2},
        )

    whole = run("whole", 6)
    run("resumed", 3)
    resumed = run("resumed", 6, "--resume")
    assert [timeless(row) for row in resumed.rows] == [timeless(row) for row in whole.rows]
    skipped = [row["prompts/skipped"] for row in whole.rows[1:]]
    assert (
        skipped[0] == 0
        and max(skipped) > 0
        and "Skipped prompts" in (whole.folder / "report.html").read_text()
    )
    state = json.loads((whole.folder / "checkpoints/000006/state.json").read_text())
    assert set(state["curation"]["prompts"]) == {"0", "1", "2", "3"}
