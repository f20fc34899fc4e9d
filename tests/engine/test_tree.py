"""BranchGRPO's tree: its shape, its noise, and what its nodes are worth."""

import numpy as np
import pytest
from engine_cases import Iteration, small_config
from rollout_cases import GRID, layout_of
from run_cases import train

from tempflow.errors import UserError
from tempflow.sampling.layout import iteration_units, states_of
from tempflow.sampling.plans.tree import Tree
from tempflow.sampling.suffix import count_forwards

STEPS = len(GRID) - 1


def plan(num_steps=STEPS, **options) -> Tree:
    made = Tree(**options)
    made.prepare(num_steps, 0)
    return made


@pytest.mark.parametrize("width, splits", [(2, [0, 3, 6]), (3, [1, 2]), (2, [8]), (4, [0])])
def test_rows_are_the_leaves_of_a_tree(width, splits):
    """Every state before the last step is trained on; at a split it has `width` children, elsewhere
    one; all noise differs."""
    unit = iteration_units([3], 1)[0]
    rows = plan(width=width, split_steps=splits).rows(unit, 0)
    assert len(rows) == width ** len(splits)
    states, nodes = states_of(rows), {}
    for (_, step), children in states.items():
        nodes[step] = nodes.get(step, 0) + 1
        assert len(children) == (width if step in splits else 1)
    assert nodes == {step: width ** sum(split < step for split in splits) for step in range(9)}
    keys = [(step, row.path) for row in rows for step in row.noise]
    assert len(set(keys)) == len(keys)
    assert count_forwards(rows, 10, None) == sum(nodes.values()) + len(rows), (
        "each node once, and each leaf's last step"
    )


def test_a_node_is_worth_the_mean_of_its_leaves_against_its_depth():
    """Two trees of four leaves: each depth of a tree is a group, as in the paper's code."""
    found = layout_of(plan(width=2, split_steps=[0, 4]), iteration_units([5], 2))
    slots, labels = found.slots, found.slots.groups("seed")
    # rows 0 and 2 share the first half, and 1 and 3
    rewards = np.array([1.0, 3.0, 5.0, 11.0, 0.0, 0.0, 0.0, 4.0])
    worth = slots.means(rewards[None])[0]
    by_depth = {
        step: sorted(worth[(slots.step == step) & (slots.seed == 0)].tolist())
        for step in (0, 3, 4, 8)
    }
    assert by_depth == {0: [3, 7], 3: [3, 7], 4: [1, 3, 5, 11], 8: [1, 3, 5, 11]}
    sizes = {
        (int(slots.step[labels == g][0]), int(slots.seed[labels == g][0])): int((labels == g).sum())
        for g in set(labels.tolist())
    }
    assert sizes == {(step, seed): 2 if step < 4 else 4 for step in range(9) for seed in (0, 1)}


def test_one_rollout_and_its_advantages(policy):
    """On the shipped model: the images are the leaves, and groups sum to nothing."""
    table = {
        "plan": {"type": "tree", "seeds": 1, "width": 2, "split_steps": [0, 2]},
        "num_steps": 4,
    }
    found = Iteration(policy, small_config(rollout=table))
    assert found.scored.images == 2 * 4 and len(found.states) == 2 * (1 + 2 + 2)
    credit, labels = found.advantages(), found.slots.groups("seed")
    assert credit.values.any() and np.allclose(
        np.bincount(labels, weights=credit.values), 0, atol=1e-3
    )
    assert {len(state.children) for state in found.states} == {1, 2}


def test_options_are_checked():
    with pytest.raises(UserError, match="split_steps: step 9 is outside the grid"):
        plan(split_steps=[0, 9])
    with pytest.raises(UserError, match="width"):
        Tree(width=1)


@pytest.mark.slow
def test_it_trains(tmp_path):
    """States of one child and of two share micro-batches; the run goes on from its checkpoint."""
    run = train(
        tmp_path,
        "tree",
        processes=None,
        rollout={"plan": {"type": "tree", "split_steps": [0, 2]}, "num_steps": 4},
        training={"iterations": 2},
    )
    last = run.rows[-1]
    assert (
        last["images"] == 2 * 4
        and last["forwards/train"] == 2 * (1 + 2 + 2)
        and last["loss"] == pytest.approx(0, abs=0.5)
    )
    assert last["grad_norm"] > 0 and {f"reward_std/step_{k}" for k in range(3)} <= last.keys()
