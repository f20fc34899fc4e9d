"""An editing run from its prompt file to its report: the condition images reach the model, the
reward workers and people."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from engine_cases import ROOT
from family_cases import DYNAMIC
from PIL import Image
from pipelines_flux_kontext import kontext_pipeline
from run_cases import ADAMW, Run, script_here, timeless, train

import edits as edit_recipe
import tempflow
from tempflow.errors import UserError
from tempflow.run import drift

sys.path.append(str(ROOT / "examples"))

from reward import Kept  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.cpu]
SIDE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return kontext_pipeline(tmp_path_factory.mktemp("edit") / "model", **DYNAMIC)


@pytest.fixture
def run(model, tmp_path, small_condition_images):
    """Two iterations on a copy of the shipped edits, the reward in a worker process."""
    data = str(shutil.copytree(edit_recipe.FOLDER, tmp_path / "data"))
    return train(
        tmp_path,
        "edit",
        processes=None,
        model={"path": str(model), "lora": {"rank": 2, "alpha": 4}, "max_sequence_length": 32},
        data={"train": data, "heldout": data, "prompts_per_iteration": 2},
        rollout={
            "height": SIDE,
            "width": SIDE,
            "num_steps": 4,
            "plan": {"branch_steps": [0, 2]},
            "guidance_scale": 2.5,
        },
        rewards={"reward:Kept": {"side": 8}},
        reward_pool={"workers": 1},
        training={"iterations": 2},
        eval={"every": 1, "prompts": 3, "keep_samples": 3},
        checkpoint={"every": 1, "keep": 2},
        deepspeed={"optimizer": {**ADAMW, "params": {**ADAMW["params"], "lr": 1e-3}}},
    )


def test_an_editing_run(run, tmp_path):
    """One run, for it is not quick: trained and resumed; its rewards are those of its samples;
    condition, before and after are shown."""
    for row in run.rows[1:]:
        assert row["reward/std"] > 0 and row["grad_norm"] > 0 and row["reward/failed"] == 0
        assert {"drift/color_shift", "diversity/seeds", "diversity/children"} <= row.keys()
    lines = edit_recipe.lines("test")[:3]
    _check_samples(run, lines)
    page = (run.folder / "report.html").read_text()
    assert (
        "From left to right: the condition image, the base model" in page
        and page.count('alt="condition image: ') == 3
    )
    _check_resumed(run, tmp_path)
    _check_commands(run, tmp_path / "drawn")


def _check_samples(run, lines):
    folder = run.folder / "samples/000002"
    items = json.loads((folder / "samples.json").read_text())["items"]
    for item, line in zip(items, lines, strict=True):
        condition = np.asarray(Image.open(edit_recipe.FOLDER / line["image"]))
        made = np.asarray(Image.open(folder / item["file"]))
        scored = Kept(8).score(made[None], [line["prompt"]], [{"images": [condition]}]).values[0]
        assert item["prompt"] == line["prompt"] and item["reward"] == pytest.approx(
            scored, abs=1e-5
        )
        shown = Image.open(folder / item["condition"])
        assert shown.height == SIDE and shown.width == round(
            condition.shape[1] * SIDE / condition.shape[0]
        )
    assert len({item["reward"] for item in items}) == 3
    compared = drift.between_folders(run.folder / "samples/000000", folder)
    assert compared["drift/color_shift"] == pytest.approx(
        run.rows[-1]["drift/color_shift"], abs=0.1
    )


def _check_resumed(run, root):
    """The second iteration again, to the bit; with another image under a prompt's name it is
    refused."""
    again = root / "again"
    shutil.copytree(run.folder, again / "edit")
    shutil.rmtree(again / "edit/checkpoints/000002")
    given = ["--config", root / "edit.json", "--set", f"logging.dir={again}", "--resume"]
    resumed = Run(again / "edit", script_here("train", *given))
    assert timeless(resumed.rows[-1]) == timeless(run.rows[-1])
    for name, tensor in run.weights().items():
        assert torch.equal(resumed.weights()[name], tensor), name
    shutil.copy(root / "data/house.png", root / "data/tree.png")
    refused = script_here("train", *given)
    assert (
        refused.returncode == 2
        and "data.train holds other prompts than when the run was saved" in refused.stderr
    )


def _check_commands(run, out):
    """sample.py and tempflow.sample with an image of one's own; evaluate.py finds the run's reward
    again."""
    photo = out.parent / "photo.jpg"
    Image.new("RGB", (60, 40), (90, 20, 160)).save(photo)
    done = script_here(
        "sample",
        "--run",
        run.folder,
        "--out",
        out,
        "--prompt",
        "make it night",
        "--image",
        photo,
        "--num-steps",
        2,
    )
    assert done.returncode == 0 and "condition images, base, right iteration 2" in done.stdout, (
        done.stderr
    )
    shown = np.asarray(Image.open(out / "0000.png"))
    assert (
        shown.shape == (SIDE, 48 + 4 + SIDE + 4 + SIDE, 3)
        and np.abs(shown[:, :48].mean((0, 1)) - (90, 20, 160)).max() < 3
    )
    drawn = tempflow.sample(run.folder, ["make it night"], images=[photo], num_steps=2)
    other = tempflow.sample(
        run.folder, ["make it night"], images=[Image.new("RGB", (60, 40))], num_steps=2
    )
    assert np.array_equal(drawn[0], shown[:, -SIDE:]) and not np.array_equal(drawn, other)
    with pytest.raises(
        UserError, match="prompt 'make it night': has no images; FluxKontext takes 1 image"
    ):
        tempflow.sample(run.folder, ["make it night"])
    done = script_here("evaluate", "--run", run.folder)
    assert json.loads(done.stdout.splitlines()[-1])["reward"] == pytest.approx(
        run.rows[-1]["eval/reward"], abs=1e-3
    )
