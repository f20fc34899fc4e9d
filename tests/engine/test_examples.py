"""The examples of docs/extending.md: a user's own plan, advantage, objective and reward, by dotted
path."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from engine_cases import ROOT, dense
from PIL import Image
from run_cases import Run, file_apart

sys.path.append(str(ROOT / "examples"))

from advantage import RankAdvantage  # noqa: E402
from plan import LateBranches  # noqa: E402
from reward import Kept  # noqa: E402

from tempflow.errors import UserError  # noqa: E402
from tempflow.sampling.layout import iteration_units  # noqa: E402
from tempflow.training.update import Part  # noqa: E402

EXAMPLES = ROOT / "examples"


@pytest.mark.slow
def test_own_parts_train(tmp_path):
    """From Python, by the example; and the command finds the parts in its folder, so that it can
    name the key of a wrong option."""
    changes = [
        f"logging.dir={tmp_path}",
        "training.iterations=2",
        "data.prompts_per_iteration=1",
        "rollout.num_steps=5",
        "eval.every=2",
        "eval.prompts=4",
        "reward_pool.workers=1",
    ]
    done = file_apart(EXAMPLES / "train.py", *changes, cwd=EXAMPLES)
    found = Run(tmp_path / "own_parts", done)
    assert [row["iteration"] for row in found.rows] == [0, 1, 2]
    assert found.rows[1]["ratio/max_dev"] > 0 and found.rows[1]["images"] == 2 * (1 + 3 * 4), (
        "two passes; a trunk and 3 x 4 children"
    )
    saved = json.loads((found.folder / "config.json").read_text())
    assert saved["rollout"]["plan"] == {
        "type": "plan:LateBranches",
        "seeds": 2,
        "children": 4,
        "size": 3,
        "every": 10,
    }
    with Image.open(found.folder / "before_after.png") as image:
        assert image.size == (2 * 96, 2 * 32)
    assert "gain" in done.stdout
    command = [ROOT / "engine/train.py", "--config", "own_parts.json"]
    refused = file_apart(*command, "--set", "rollout.plan.size=9", cwd=EXAMPLES)
    assert refused.returncode == 2
    assert "rollout.plan.size: 9; there are only 7 steps" in refused.stderr


def test_the_steps_move():
    plan = LateBranches(size=2, every=3)
    plan.prepare(6, 0)
    assert [plan.steps(i) for i in (0, 2, 3, 100)] == [[0, 1], [0, 1], [1, 2], [3, 4]]
    rows = plan.rows(iteration_units([0], 1)[0], 0)
    assert len(rows) == 1 + 2 * 4 and len({(row.start, row.path) for row in rows[1:]}) == 8


def test_ranks_see_the_order_alone():
    rewards = np.array(
        [[[[1.0, 2.0, 4.0, np.nan]]], [[[1.0, 2.0, 400.0, np.nan]]], [[[3.0, 3.0, 3.0, 3.0]]]]
    )
    found = dense(RankAdvantage(), rewards)
    np.testing.assert_allclose(found.values[0], found.values[1])
    np.testing.assert_allclose(found.values[0, 0, 0], [-1.2247, 0, 1.2247, 0], atol=1e-3)
    assert (found.values[2] == 0).all() and found.zero_spread.tolist() == [False, False, True]


def test_what_an_edit_keeps():
    """1 where nothing has changed, whatever the size; less the more has."""
    before = np.zeros((40, 60, 3), np.uint8)
    before[:, :30] = 200
    same, half, none = before[::2, ::2], before[::2, ::2] // 2, 200 - before[::2, ::2]
    found = (
        Kept(16).score(np.stack([same, half, none]), [""] * 3, [{"images": [before]}] * 3).values
    )
    assert found[0] == 1 and 0.6 < found[1] < 0.8 and found[2] < 0.3


@pytest.mark.slow
@pytest.mark.cpu
def test_the_notebook(monkeypatch):
    """Its cells in order, without Jupyter: the claims of its text, and what is stored with it."""
    notebook = json.loads((EXAMPLES / "branching.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert len(json.dumps(notebook)) < 150_000, "stored outputs stay small"
    monkeypatch.chdir(EXAMPLES)
    threads, found = torch.get_num_threads(), {}
    try:
        for cell in cells:
            exec("".join(cell["source"]), found)
    finally:
        torch.set_num_threads(threads)
        if "walk" in found:
            found["walk"].close()
    made, rewards = found["branching"], found["branching"].child_rewards.reshape(5, 6)
    assert len(made.images) == 1 + 5 * 6 and (made.parent[1:] == 0).all()
    apart = made.images[made.row].reshape(5, 6, -1).astype(float).std(1).mean(1)
    assert (np.diff(apart) < 0).all(), "late decisions change the images less"
    np.testing.assert_allclose(
        made.advantages.reshape(5, 6),
        np.clip((rewards - rewards.mean(1)[:, None]) / (rewards.std(1)[:, None] + 1e-4), -5, 5),
        atol=1e-5,
    )
    assert made.weights[[0, 1, 2, 4, 6]].mean() == pytest.approx(1)
    assert found["first"]["loss"] == pytest.approx(found["by_hand"], abs=1e-6)
    assert found["first"]["ratio/max_dev"] == 0 < found["second"]["ratio/max_dev"]
    assert found["second"]["loss"] < 0 and found["change"].any()
    with pytest.raises(UserError, match="weights have changed"):
        found["walk"].update(dataclasses.replace(made, _parts=fresh_parts(made)))


def fresh_parts(made):
    return [Part.of(part.batches, part.total) for part in made._parts]
