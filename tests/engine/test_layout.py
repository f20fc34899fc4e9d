"""Layouts: states, slots and forests of any plan; and the scheduler on trees, unequal families and
rows without noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_cases import initial_noise, small_config, step_scalars
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import assert_close
from rollout_cases import GRID, SHAPE, Units, toy_velocity

from tempflow.sampling.layout import ENDPOINT, Layout, iteration_units, states_of
from tempflow.sampling.noise import INITIAL, Noise
from tempflow.sampling.scheduler import integrate
from tempflow.sampling.steps import Flow, Grid
from tempflow.sampling.suffix import count_forwards
from tempflow.types import Row

STEPS = len(GRID) - 1
FLOW = Grid(GRID, Flow(0.7).coefficients(GRID))


def tree(unit):
    """A root with noise at steps 0 and 2, where it also splits: two branches at 2, of which one
    splits again at 5; beside them a branch off the root at 7, and a row without noise that leaves
    the root at 1."""
    return [
        Row(unit, noise=frozenset([0, 2])),
        Row(unit, 2, frozenset([2, 6]), parent=0, path=(1,)),
        Row(unit, 2, frozenset([2]), parent=0, path=(2,)),
        Row(unit, 5, frozenset([5]), parent=1, path=(1, 1)),
        Row(unit, 7, frozenset([7]), parent=0, path=(1,)),
        Row(unit, 1, parent=0, path=(9,)),
    ]


def layout(units=None, endpoints=False):
    units = units or iteration_units([4, 7], 2)
    return Layout(units, [tree(unit) for unit in units], endpoints)


# ------------------------------------------------------------------------------------------ numbers
def test_states_and_their_children():
    """A row's own noisy step is its state's first child; a row without noise is no child of any."""
    assert states_of(tree(iteration_units([0], 1)[0])) == {
        (0, 0): [0],
        (0, 2): [0, 1, 2],
        (1, 5): [3],
        (1, 6): [1],
        (0, 7): [4],
    }


def test_slots_of_a_tree():
    slots = layout().slots
    per_unit = 7
    assert len(slots) == 4 * per_unit and slots.steps() == [0, 2, 5, 6, 7]
    assert slots.step[:per_unit].tolist() == [0, 2, 2, 2, 5, 6, 7] and slots.child[
        :per_unit
    ].tolist() == [0, 0, 1, 2, 0, 0, 0]
    assert slots.state[:per_unit].tolist() == [0, 1, 1, 1, 2, 3, 4] and slots.state[per_unit] == 5
    assert (
        (slots.prompt[: 2 * per_unit] == 0).all()
        and slots.seed[per_unit] == 1
        and slots.prompt[-1] == 1
    )
    # what is below: the root's first step is under everything, its step at 2 under what leaves it
    # later
    assert slots.leaves[:per_unit] == ((0, 1, 2, 3, 4, 5), (0, 4), (1, 3), (2,), (3,), (1,), (4,))
    assert slots.leaves[per_unit][0] == 6, "the second unit's rows are numbered on"


def test_a_slot_is_worth_the_mean_of_what_is_known_below_it():
    rewards = np.array([[1.0, 2, 4, 8, np.nan, 32], [0, 0, 0, np.nan, 0, 0]])
    one = layout(iteration_units([4], 1)).slots.means(rewards)
    np.testing.assert_allclose(one[0], [47 / 5, 1, 5, 4, 8, 2, np.nan])
    np.testing.assert_allclose(one[1], [0, 0, 0, 0, np.nan, 0, 0])


def test_groups():
    slots = layout().slots
    for over, size in (
        ("state", [1, 3, 1, 1, 1]),
        ("seed", [1, 3, 1, 1, 1]),
        ("prompt", [2, 6, 2, 2, 2]),
        ("step", [4, 12, 4, 4, 4]),
    ):
        labels = slots.groups(over)
        assert sorted(np.bincount(labels).tolist()) == sorted(
            size * {"state": 4, "seed": 4, "prompt": 2, "step": 1}[over]
        )
        assert labels[0] == 0 and labels.max() + 1 == len(set(labels.tolist()))


def test_endpoints_are_slots_of_their_own():
    slots = layout(endpoints=True).slots
    assert len(slots) == 24 and (slots.step == ENDPOINT).all() and slots.leaves[7] == (7,)
    assert (
        np.bincount(slots.groups("prompt")).tolist() == [12, 12]
        and np.bincount(slots.groups("seed")).tolist() == [6] * 4
    )


def test_rows_that_no_slot_is_made_of():
    """Like a trunk: the row without noise that leaves a row without noise."""
    unit = iteration_units([3], 1)[0]
    rows = [Row(unit), Row(unit, 2, frozenset([2]), parent=0), Row(unit, 4, parent=0, path=(1,))]
    assert Layout([unit], [rows]).without_slot.tolist() == [0, 2]


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_forests_share_out_the_rows(parts):
    """Parents come before children, roots first of all, and every row and slot is in one forest."""
    whole = layout()
    forests = [whole.forest(list(range(4))[first::parts]) for first in range(parts)]
    assert sorted(n for forest in forests for n in forest.numbers) == list(range(24))
    assert sorted(
        s for forest in forests for found in forest.slots.values() for s in found
    ) == list(range(len(whole.slots)))
    rows = [row for unit in whole.rows for row in unit]
    for forest in forests:
        assert forest.depth == sorted(forest.depth)
        for place, (row, number) in enumerate(zip(forest.rows, forest.numbers, strict=True)):
            assert replace(row, parent=rows[number].parent) == rows[number]
            if row.parent is not None:
                assert (
                    row.parent < place
                    and forest.numbers[row.parent] == 6 * row.unit.index + rows[number].parent
                )


# --------------------------------------------------------------------------------- in the scheduler
def run(found: Layout, chosen=None, micro_batch=7, suffix=None):
    """Final latents by row number, and states by (unit, step, number of the first child's slot)."""
    forest = found.forest(chosen if chosen is not None else list(range(len(found.units))))
    finished, states, forwards = {}, [], 0
    for arrived in integrate(
        forest,
        Units(toy_velocity, found.units, SHAPE),
        FLOW,
        Noise(0, 0),
        micro_batch=micro_batch,
        suffix=suffix,
    ):
        latents = arrived.latents if arrived.rows else []
        finished |= {
            forest.numbers[n]: latent for n, latent in zip(arrived.rows, latents, strict=True)
        }
        states += arrived.states
        forwards += arrived.forwards
    assert forwards == count_forwards(forest.rows, STEPS, suffix)
    return finished, {int(state.slots[0]): state for state in states}


def one_at_a_time(found: Layout):
    """The same, every row on its own from the initial noise."""
    config, finished, children = small_config(), {}, {}

    noise = Noise(config.training.seed, 0)

    def step(x, unit, k, path=None):
        a, b, tau = step_scalars("ode" if path is None else "flow", GRID, k, 0.7)
        x = a * x + b * toy_velocity(x[None], GRID[k : k + 1], [unit])[0]
        return (
            x
            if path is None
            else x + tau * noise.sample([noise.key(unit, k, path)], SHAPE, "cpu")[0]
        )

    number = 0
    for unit, rows in zip(found.units, found.rows, strict=True):
        at = {}
        for n, row in enumerate(rows):
            x, first = (
                (initial_noise(config, unit, SHAPE), 0)
                if row.parent is None
                else (at[row.parent, row.start], row.start)
            )
            for k in range(first, STEPS):
                at[n, k] = x
                x = step(x, unit, k, row.path if k in row.noise else None)
                children[number, k] = x
            finished[number] = x
            number += 1
    return finished, children


def test_a_tree_equals_one_row_at_a_time():
    found = layout()
    finished, states = run(found)
    expected, children = one_at_a_time(found)
    assert finished.keys() == expected.keys()
    for number, latent in expected.items():
        assert_close(f"row {number}", finished[number], latent, 1e-5)
    assert len(states) == 5 * 4 and sorted(
        s for state in states.values() for s in state.slots
    ) == list(range(len(found.slots)))
    for state in states.values():
        rows = states_of(found.rows[state.unit.index])
        members = next(m for (_, k), m in rows.items() if k == state.step)
        assert len(state.slots) == len(state.children) == len(state.log_prob) == len(members)
        for child, n in zip(state.children, members):
            assert_close("child", child, children[6 * state.unit.index + n, state.step], 1e-5)


@pytest.mark.parametrize("micro_batch", [1, 5, 100])
def test_neither_batches_nor_shares_change_a_tree(micro_batch):
    found = layout()
    finished, states = run(found)
    others = [run(found, [0, 2], micro_batch), run(found, [1, 3], micro_batch)]
    assert all(
        torch.equal((others[0][0] | others[1][0])[number], latent)
        for number, latent in finished.items()
    )
    for slot, state in states.items():
        other = (others[0][1] | others[1][1])[slot]
        assert torch.equal(other.children, state.children) and torch.equal(
            other.log_prob, state.log_prob
        )


def test_a_row_without_noise_goes_the_way_its_parent_would():
    unit = iteration_units([5], 1)[0]
    rows = [
        Row(unit),
        Row(unit, 4, parent=0, path=(1,)),
        Row(unit, 4, frozenset([4]), parent=0, path=(2,)),
    ]
    finished, states = run(Layout([unit], [rows]))
    assert torch.equal(finished[0], finished[1]) and not torch.equal(finished[0], finished[2])
    assert [len(state.children) for state in states.values()] == [1]


@st.composite
def rows_of_a_unit(draw):
    """Any tree of up to eight rows; noise anywhere but at the last step."""
    unit = iteration_units([2], 1)[0]
    rows = [Row(unit, noise=frozenset(draw(st.sets(st.integers(0, STEPS - 2), max_size=3))))]
    for n in range(draw(st.integers(0, 7))):
        parent = draw(st.integers(0, len(rows) - 1))
        least = rows[parent].start + (rows[parent].parent is not None)
        if least > STEPS - 2:
            continue
        start = draw(st.integers(least, STEPS - 2))
        noise = draw(st.sets(st.integers(start, STEPS - 2), max_size=3))
        rows.append(Row(unit, start, frozenset(noise), parent, (*rows[parent].path, n + 1)))
    return rows


@given(rows_of_a_unit(), st.integers(1, 9))
def test_any_tree(rows, micro_batch):
    found = Layout([rows[0].unit], [rows])
    finished, states = run(found, micro_batch=micro_batch)
    expected, children = one_at_a_time(found)
    for number, latent in expected.items():
        assert_close(f"row {number}", finished[number], latent, 1e-4)
    assert sorted(s for state in states.values() for s in state.slots) == list(
        range(len(found.slots))
    )
    assert len(found.slots) == sum(len(row.noise) for row in rows)
    assert {leaf for leaves in found.slots.leaves for leaf in leaves} | set(
        found.without_slot.tolist()
    ) == set(range(len(rows)))


def test_initial_noise_has_a_step_of_its_own():
    noise, unit = Noise(3, 4), iteration_units([5], 1)[0]
    assert noise.key(unit, INITIAL) != noise.key(unit, 0) and noise.key(unit, 0) == noise.key(
        unit, 0, (0,)
    )
