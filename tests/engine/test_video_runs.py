"""Whole runs of videos: rewards on frames and on videos in worker processes, samples that play,
resume, and two ranks."""

import json
import shutil

import numpy as np
import pytest
import torch
from pipelines_wan import wan_pipeline
from run_cases import SGD, Run, script_here, timeless, train

from tempflow.run.files import frames_of_file

pytestmark = pytest.mark.slow
FRAMES, SIDE = 5, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    wan_pipeline(root / "wan", shift=3.0)
    return root


@pytest.fixture(scope="module")
def runs(folder):
    made = {}

    def get(name, processes=None):
        if name not in made:
            made[name] = train(
                folder,
                name,
                processes=processes,
                model={"path": str(folder / "wan"), "max_sequence_length": 32},
                data={"prompts_per_iteration": 1},
                rollout={
                    "height": SIDE,
                    "width": SIDE,
                    "frames": FRAMES,
                    "num_steps": 3,
                    "plan": {"branch_steps": [0, 1]},
                    "guidance_scale": 3.0,
                    "micro_batch": 4,
                    "decode_batch": 2,
                },
                rewards={
                    "video_rewards:seen": {"weight": 1.0, "frames": 2},
                    "motion": {"type": "video_rewards:Motion", "weight": 0.5},
                    "jpeg": {"weight": 0, "frames": 3},
                },
                reward_pool={"workers": 1},
                training={"iterations": 2, "micro_batch": 4},
                eval={"every": 1, "prompts": 2},
                checkpoint={"every": 1, "keep": 2},
                deepspeed=SGD,
            )
        return made[name]

    return get


def samples_of(run, iteration):
    place = run.folder / f"samples/{iteration:06d}"
    return place, json.loads((place / "samples.json").read_text())["items"]


def test_a_run_scores_frames_and_shows_videos(runs):
    run = runs("one")
    for row in run.rows[1:]:
        assert (
            row["reward/failed"] == 0 and row["grad_norm"] > 0 and row["images"] == 2 * (1 + 2 * 2)
        )
        assert row["diversity/seeds"] > 0 and row["diversity/children"] > 0
        assert row["drift/color_shift"] > 0 and "eval/jpeg" in row and "eval/motion" in row
    for iteration in (0, 1, 2):
        place, items = samples_of(run, iteration)
        assert sorted(file.name for file in place.iterdir()) == [
            "0000.webp",
            "0001.webp",
            "samples.json",
        ]
        for item in items:
            details, shown = item["details"], frames_of_file(place / item["file"])
            assert len(shown) == FRAMES and shown[0].size == (SIDE, SIDE)
            assert (
                details["motion"] == str((FRAMES, SIDE, SIDE, 3))
                and len(details["video_rewards:seen"].split(" | ")) == 2
            )
            assert item["reward"] == pytest.approx(
                item["rewards"]["video_rewards:seen"] + 0.5 * item["rewards"]["motion"], abs=1e-5
            )
    page = (run.folder / "report.html").read_text()
    assert page.count("data:image/webp") == 4 and "5 frames" in page


def test_a_resumed_run_of_videos_is_the_same(runs, tmp_path):
    run = runs("one")
    shutil.copytree(run.folder, tmp_path / "one")
    shutil.rmtree(tmp_path / "one/checkpoints/000002")
    config = ["--config", run.folder.parent / "one.json", "--set", f"logging.dir={tmp_path}"]
    again = Run(tmp_path / "one", script_here("train", *config, "--resume"))
    assert timeless(again.rows[-1]) == timeless(run.rows[-1])
    assert all(torch.equal(again.weights()[name], weight) for name, weight in run.weights().items())
    for name in ("0000.webp", "0001.webp", "samples.json"):
        assert (again.folder / "samples/000002" / name).read_bytes() == (
            run.folder / "samples/000002" / name
        ).read_bytes()


def test_two_ranks_are_one(runs):
    one, two = runs("one"), runs("two", processes=2)
    for a, b in zip(one.rows, two.rows, strict=True):
        for key in (
            "reward/mean",
            "eval/reward",
            "eval/motion",
            "diversity/seeds",
            "diversity/children",
            "drift/color_shift",
            "grad_norm",
        ):
            assert (key in a) == (key in b) and a.get(key, 0) == pytest.approx(
                b.get(key, 0), rel=2e-3, abs=2e-4
            ), key
    for name, weight in one.weights().items():
        assert torch.allclose(
            two.weights()[name], weight, rtol=0, atol=1e-4 * float(weight.abs().max())
        ), name


def test_the_commands_draw_videos(runs, tmp_path):
    """evaluate repeats the run's own evaluation; sample and refine play base and tuned, first and
    best, beside each other."""
    run = runs("one")
    done = script_here("evaluate", "--run", run.folder, "--out", tmp_path / "evaluated")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["reward"] == pytest.approx(
        run.rows[2]["eval/reward"], abs=1e-5
    )
    assert (tmp_path / "evaluated/0001.webp").exists()
    done = script_here("sample", "--run", run.folder, "--out", tmp_path / "pairs", "--count", 1)
    assert done.returncode == 0, done.stderr
    shown = frames_of_file(tmp_path / "pairs/0000.webp")
    assert (
        len(shown) == FRAMES
        and shown[0].size == (2 * SIDE + 4, SIDE)
        and (tmp_path / "pairs/all.png").exists()
    )
    assert (tmp_path / "pairs/prompts.txt").read_text().startswith("0000.webp\t")
    done = script_here(
        "refine",
        "--run",
        run.folder,
        "--out",
        tmp_path / "best",
        "--count",
        1,
        "--rounds",
        1,
        "--children",
        2,
        "--step",
        1,
    )
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "best/rewards.json").read_text())["items"][0]["file"] == "0000.webp"
    )
    assert np.asarray(frames_of_file(tmp_path / "best/0000_best.webp")[0]).shape == (SIDE, SIDE, 3)
