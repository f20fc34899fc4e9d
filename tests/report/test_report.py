"""report.html of synthetic runs: says what happened, loads nothing, survives what crashes and users
leave behind."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from report_page import Page, page

from tempflow.errors import UserError
from tempflow.run.files import FRAME_MS, encoded
from tempflow.run.report import write_report
from tempflow.run.report.charts import thin
from tempflow.run.report.page import flatten
from tempflow.run.report.readings import compare
from tempflow.run.report.run import load_run
from tempflow.run.report.samples import match
from tempflow.run.report.thumbnails import FRAMES, Thumbnails


def test_whole_run_says_what_happened(run_factory):
    found = page(run_factory("demo"))
    assert (
        "Held-out reward rose from 0.480 to 0.775 in 9.4 minutes of training and 38,880 rewarded"
        " images." in found.text
    )
    assert "+0.295" in found.text and "finished" in found.text and "tiny-flux" in found.text
    assert (
        "not picked by result" in found.text
        and "8 more prompts" in found.text
        and "Exact words:" in found.text
    )
    titles = {chart["title"] for chart in found.data["charts"]}
    assert titles >= {
        "Reward",
        "KL to the reference",
        "Clip fraction",
        "Largest ratio deviation",
        "Gradient norm",
        "Loss",
        "Reward spread by branch step",
        "Groups without spread",
        "Failed rewards",
        "Seconds per iteration",
        "Transformer forwards so far",
        "ratio/min",
    }


def test_curves_hold_the_numbers_of_the_metrics(run_factory):
    run_dir = run_factory()
    found, rows = page(run_dir), load_run(run_dir).rows
    held = next(
        series for series in found.chart("Reward")["series"] if series["name"] == "held-out"
    )
    assert held["y"] == [row["eval/reward"] for row in rows if "eval/reward" in row]
    assert found.data["frames"]["eval"]["iteration"] == list(range(0, 91, 10))
    assert found.data["frames"]["eval"]["minutes"][1] == pytest.approx(6.3 * 10 / 60)
    heat = found.chart("Reward spread by branch step")
    assert [series["name"] for series in heat["series"]] == [f"step {k}" for k in range(9)]
    assert heat["series"][3]["y"][0] == pytest.approx(rows[1]["reward_std/step_3"], rel=1e-4)
    assert found.chart("Transformer forwards so far")["series"][0]["y"][-1] == 90 * 2240


def test_guards(run_factory, row_writer):
    """Watched rewards and diversity in a section of their own, the bound drawn in, and why the run
    stopped."""
    folder = run_factory(iterations=3, every=1)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "rewards": {"ocr": 1.0, "jpeg": {"weight": 0, "goal": "large"}},
        "eval": {"stop": {"metric": "eval/jpeg", "patience": None, "below": 2.0}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        {**row, "eval/jpeg": 3.0 - row["iteration"] / 2, "diversity/seeds": 0.2}
        for row in load_run(folder).rows
    ]
    row_writer(folder, rows)
    (folder / "summary.json").write_text(
        json.dumps({"iterations": 3, "stopped": "eval.stop: eval/jpeg 1.5 is below 2"})
    )
    found = page(folder)
    watched = found.chart("jpeg, watched")
    assert watched["series"][0]["y"] == [3.0, 2.5, 2.0, 1.5] and watched["level"] == {
        "name": "stop below",
        "y": 2.0,
    }
    assert found.chart("Difference between seeds")["series"][0]["y"] == [0.2] * 4
    assert found.chart("Difference between children") is None
    assert found.chart("ocr, held-out") is None  # the only trained one: the reward chart shows it
    assert "Training was stopped early by eval.stop: eval/jpeg 1.5 is below 2." in found.text
    assert all(
        chart["title"] not in ("eval/jpeg", "diversity/seeds") for chart in found.data["charts"]
    )


@pytest.mark.parametrize("evaluated", [True, False])
def test_each_of_several_rewards_has_an_axis_of_its_own(run_factory, row_writer, evaluated):
    """Held-out where it is evaluated, else of the training; once on the page."""
    folder = run_factory(iterations=3, every=1)
    config = json.loads((folder / "config.json").read_text())
    config["rewards"] = {"ocr": 1.0, "hps": {"weight": 0.1}, "jpeg": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    prefix = "eval/" if evaluated else "reward/"
    values = {f"{prefix}ocr": 0.5, f"{prefix}hps": 20.0, f"{prefix}jpeg": -30.0}
    for row in (rows := load_run(folder).rows):
        row.pop("reward/ocr", None), row.pop("eval/ocr", None)
    row_writer(folder, [row | values for row in rows])
    found, frame = page(folder), "held-out" if evaluated else "training"
    for name in ("ocr", "hps"):
        (series,) = found.chart(f"{name}, {frame}")["series"]
        assert series["y"] == [values[f"{prefix}{name}"]] * 4
    titles = [chart["title"] for chart in found.data["charts"]]
    assert f"jpeg, {frame}" not in titles and not {f"{prefix}ocr", f"{prefix}hps"} & {*titles}


def test_page_loads_nothing(run_factory):
    text = write_report(run_factory()).read_text(encoding="utf-8")
    found = Page(text)
    assert "default-src 'none'" in next(
        a["content"] for a in found.all("meta") if "http-equiv" in a
    )
    assert (
        not found.all("link")
        and not found.all("iframe")
        and not any("src" in a for a in found.all("script"))
    )
    assert found.all("img") and all(a["src"].startswith("data:image/") for a in found.all("img"))
    assert (
        "http:" not in text
        and "https:" not in text
        and "url(" not in text
        and "@import" not in text
    )
    assert all(len(a.get("alt", "")) > 4 and int(a["width"]) > 0 for a in found.all("img"))


@pytest.mark.parametrize(
    "hostile",
    [
        '</script><script>alert("x")</script>',
        '<img src=x onerror="alert(1)"> "AB"',
        "a & b <!-- 'q'",
    ],
)
def test_prompts_and_config_stay_text(run_factory, hostile):
    run_dir = run_factory("r", prompts=[hostile] * 3)
    config = json.loads((run_dir / "config.json").read_text())
    config["model"]["path"] = config["rewards"][hostile] = hostile
    (run_dir / "config.json").write_text(json.dumps(config))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 91, hostile: 1.0, "reward/mean": 0.5}) + "\n")
    plain, found = page(run_factory("plain", prompts=["p"] * 3)), page(run_dir)
    assert len(found.all("script")) == len(plain.all("script")) == 2
    assert not any("onerror" in attrs for _, attrs in found.elements)
    assert hostile in "".join(found.visible) and found.chart(hostile) is not None


def test_unfinished_run(run_factory):
    found = page(run_factory(iterations=7, total=50, every=5, sets=(0, 5), summary=False))
    assert "unfinished: iteration 7 of 50" in found.text
    assert (
        "So far, held-out reward rose from 0.480" in found.text
        and "in 32 seconds of training and 2,160 rewarded images" in found.text
    )


def test_one_iteration_without_evaluation(run_factory):
    found = page(run_factory(iterations=1, total=50, evaluate=False, sets=(), summary=False))
    assert "Too early to tell: 1 iteration recorded." in found.text and "Samples" not in found.text
    assert found.chart("Reward")["series"][0]["y"] and not found.all("fieldset")


def test_training_reward_alone_is_not_called_held_out(run_factory):
    found = page(run_factory(iterations=30, evaluate=False, sets=(), summary=False))
    assert (
        "Training reward went from" in found.text
        and "no trained model has been evaluated" in found.text
    )


def test_falling_reward_is_said(run_factory):
    run_dir = run_factory(iterations=20, sets=())
    (run_dir / "summary.json").write_text(json.dumps({"base_reward": 0.5, "tuned_reward": 0.41}))
    found = page(run_dir)
    assert "Held-out reward fell from 0.500 to 0.410" in found.text and "−0.090" in found.text
    assert re.search(r"The highest evaluation was 0\.\d+, at iteration 20", found.text)


def test_empty_directory_and_missing_directory(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "0 iterations recorded" in page(tmp_path / "empty").text
    with pytest.raises(UserError, match="no run directory at .*absent"):
        write_report(tmp_path / "absent")


def test_missing_keys_and_nulls(run_factory, row_writer):
    run_dir = run_factory(iterations=4, sets=(), summary=False)
    row_writer(
        run_dir,
        [
            {"iteration": 1, "reward/mean": None, "loss": None},
            {"iteration": 2, "reward/mean": 0.4, "kl": None},
            {"iteration": 3, "reward/mean": float("nan"), "eval/reward": None},
            {"iteration": 4, "reward/mean": 0.6},
        ],
    )
    found = page(run_dir)
    training = found.chart("Reward")["series"][0]["y"]
    assert (
        training == [None, 0.4, None, 0.6]
        and found.chart("KL to the reference") is None
        and found.chart("Loss") is None
    )


def test_resumed_run_counts_each_iteration_once_and_carries_the_clock(run_factory, row_writer):
    run_dir = run_factory(iterations=2, sets=(), summary=False)
    clock = [(1, 60, 0.1), (2, 120, 0.2), (3, 180, 0.3), (3, 60, 0.35), (4, 120, 0.4)]
    row_writer(
        run_dir,
        [{"iteration": i, "time/elapsed": t, "reward/mean": r, "images": 10} for i, t, r in clock],
    )
    run = load_run(run_dir)
    assert [row["iteration"] for row in run.rows] == [1, 2, 3, 4]
    assert run.column("reward/mean") == [0.1, 0.2, 0.35, 0.4]
    assert run.minutes == [1, 2, 3, 4] and run.images == [10, 20, 30, 40]
    page(run_dir)


def test_leftovers_of_an_earlier_attempt_do_not_count(run_factory, row_writer):
    run_dir = run_factory(iterations=20, sets=(0, 10, 20))
    rows = load_run(run_dir).rows
    row_writer(run_dir, rows[:13])
    assert [sample.iteration for sample in load_run(run_dir).samples] == [0, 10]
    row_writer(run_dir, [*rows, {**rows[-1], "iteration": 21}])
    assert load_run(run_dir).summary is None


def test_evaluation_time_is_beside_the_total(run_factory, row_writer):
    run_dir = run_factory(iterations=2, sets=())
    times = {"time/rollout": 3.0, "time/eval": 9.0, "time/reward_busy": 7.0, "time/total": 5.0}
    row_writer(run_dir, [{"iteration": n, **times} for n in (1, 2)])
    found = page(run_dir)
    series = found.chart("Seconds per iteration")["series"]
    assert found.chart("time/reward_busy")
    assert {s["name"]: s["y"] for s in series} == {
        "rollout": [3, 3],
        "eval": [9, 9],
        "other": [2, 2],
    }


def test_half_written_files_are_not_taken_for_whole(run_factory):
    run_dir = run_factory(iterations=6, sets=(0, 6), summary=False)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 7, "reward/me')
    (run_dir / "samples/000007").mkdir()
    (run_dir / "samples/000007/samples.json").write_text('{"iteration": 7, "items": [')
    (run_dir / "samples/000006/0000.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    with pytest.warns(UserWarning, match="line 8"):
        found = page(run_dir)
    assert "the base model, iteration 6" in found.text and "1 more not included" in found.text


def test_large_pictures_become_small(run_factory):
    run_dir = run_factory(
        iterations=5,
        every=5,
        sets=(0, 5),
        size=(1024, 768),
        details=False,
        rewards=("pick", "hps"),
        prompts=["a photograph of a llama"] * 6,
    )
    found = page(run_dir)
    assert len(found.all("img")) == 12
    assert all(
        (a["width"], a["height"]) == ("256", "192") and a["src"].startswith("data:image/jpeg")
        for a in found.all("img")
    )
    assert "pick 0.000 · hps 0.000" in found.text and "Exact words" not in found.text


def test_an_edit_is_shown_after_its_condition_image(run_factory):
    """Condition, before, after; and with the prompts over training."""
    run_dir = run_factory(
        iterations=20,
        sets=(0, 10, 20),
        prompts=["make it night"] * 4,
        details=False,
        rewards=("kept",),
        conditions=True,
    )
    found = page(run_dir)
    alts = [image["alt"] for image in found.all("img")]
    assert alts[:3] == [
        "condition image: make it night",
        "base: make it night",
        "iteration 20: make it night",
    ]
    assert sum(alt.startswith("condition image") for alt in alts) == 4 + 4
    assert "From left to right: the condition image, the base model, iteration 20" in found.text
    (run_dir / "samples/000020/0000_condition.png").unlink()
    assert len(page(run_dir).all("img")) == len(alts) - 1, (
        "a lost condition image takes nothing else with it"
    )


def test_edits_of_one_instruction_are_told_apart_by_their_images(run_factory):
    """Where the two sets do not have the same prompts in the same places."""
    run_dir = run_factory(iterations=5, sets=(0, 5), prompts=["make it night"] * 3, conditions=True)
    path = run_dir / "samples/000005/samples.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "items": info["items"][::-1]}))
    run = load_run(run_dir)
    assert [(pair.base["file"], pair.tuned["file"]) for pair in match(*run.samples)] == [
        (f"000{n}.png",) * 2 for n in (2, 1, 0)
    ]


def test_size_budget_drops_pictures_and_says_so(run_factory, monkeypatch):
    monkeypatch.setattr("tempflow.run.report.page.Thumbnails", lambda: Thumbnails(budget=20_000))
    run_dir = run_factory()
    found = page(run_dir)
    assert "more not included" in found.text and (run_dir / "report.html").stat().st_size < 120_000


def test_failed_rewards_are_not_zeros(run_factory):
    run_dir = run_factory(iterations=5, sets=(0, 5))
    path = run_dir / "samples/000005/samples.json"
    info = json.loads(path.read_text())
    info["items"][0].update(
        reward=None, rewards={"ocr": None}, details={"ocr": "not scored: timeout"}
    )
    path.write_text(json.dumps(info))
    text = page(run_dir).text
    assert "failed" in text and "ocr: not scored: timeout" in text and "Of 31 images" in text


def test_sample_sets_of_other_noise_are_not_called_the_same(run_factory, sample_writer):
    run_dir = run_factory(iterations=5, sets=(0,))
    folder = sample_writer(run_dir, 5, ['the word "AB"', "new prompt"], quality=1)
    info = json.loads((folder / "samples.json").read_text())
    (folder / "samples.json").write_text(json.dumps({**info, "seed": 8}))
    assert "another seed or step count" in page(run_dir).text


@pytest.mark.parametrize(
    "reading, target, marks",
    [
        ("HELLO", "hello", "rrrrr"),
        ("HELO", "HELLO", "rrmrr"),
        ("HEXLO", "HELLO", "rrwrr"),
        ("HELLOO", "HELLO", "rrrrrw"),
        ("", "AB", "mm"),
        ("H I", "HI", "rr"),
        ("XJLG", "XVZJ", "rwww"),
        ("QQ", "ABC", "wwm"),
        ("Don't", "Don’t", "rrrrr"),
        ("½", "1/2", "rrr"),
        ("ＡＢ", "abc", "rrm"),
        ("cafe\u0301", "Café", "rrrr"),
        ("a\u200bb", "AB", "rr"),
    ],
)
def test_letters_are_marked_by_edit_distance(reading, target, marks):
    found = "".join(state[0] for _, state in compare(reading, target))
    assert sorted(found) == sorted(marks) and found.count("r") == marks.count("r")


def test_scene_text_that_contains_the_target_is_right(run_factory):
    run_dir = run_factory(iterations=5, sets=(0,), prompts=['a sign "OPEN"'])
    path = run_dir / "samples/000000/samples.json"
    info = json.loads(path.read_text())
    info["items"][0].update(reward=1.0, rewards={"ocr": 1.0}, details={"ocr": "CAFE OPEN 24H"})
    path.write_text(json.dumps(info))
    found = page(run_dir)
    assert "CAFE OPEN 24H" in found.text and not found.all("mark")


def test_a_target_that_the_metadata_names_is_marked(run_factory):
    run_dir = run_factory(iterations=5, sets=(0,), prompts=['a "7 inch" sleeve'])
    path = run_dir / "samples/000000/samples.json"
    info = json.loads(path.read_text())
    info["items"][0].update(
        reward=0.5, rewards={"ocr": 0.5}, details={"ocr": "SIDX"}, ocr_target="SIDE"
    )
    path.write_text(json.dumps(info))
    found = page(run_dir)
    assert len(found.all("mark")) == 1 and "SIDX" in found.text.replace(" ", "")


def test_long_runs_are_thinned_over_all_iterations(run_factory):
    run_dir = run_factory(iterations=3000, every=100, sets=())
    found = page(run_dir)
    assert (
        len(found.data["frames"]["fine"]["iteration"]) <= 600
        and found.data["frames"]["fine"]["iteration"][-1] == 3000
    )
    assert len(found.data["frames"]["eval"]["iteration"]) == 31
    assert (run_dir / "report.html").stat().st_size < 600_000
    assert thin([1.0, 3.0, None, 5.0, None, None], 3) == [2.0, 5.0, None]


def test_config_is_flattened_for_search():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}) == [
        ("a.b", 1),
        ("a.c", {}),
        ("d", [1, {"e": 2}]),
    ]


def test_report_replaces_the_old_one_and_leaves_no_scratch(run_factory):
    run_dir = run_factory(iterations=2, sets=())
    write_report(run_dir)
    assert write_report(run_dir) == run_dir / "report.html"
    assert [path.name for path in run_dir.iterdir() if "report" in path.name] == ["report.html"]


def test_samples_of_videos_move(run_factory):
    """In the cards, unless the reader has asked for reduced motion; in the table over training
    stands one frame of each."""
    folder = run_factory(prompts=["a ball that rolls"], sets=(0, 45, 90))
    config = json.loads((folder / "config.json").read_text())
    config["rollout"]["frames"] = 40
    (folder / "config.json").write_text(json.dumps(config))
    for path in sorted(folder.glob("samples/*/samples.json")):
        info = json.loads(path.read_text())
        for n, item in enumerate(info["items"]):
            frames = np.zeros((40, 180, 300, 3), np.uint8)
            for t in range(40):
                frames[t, 60:120, 6 * t : 6 * t + 50] = 80
            item["file"] = encoded(frames).write(path.parent, f"{n:04d}")
        path.write_text(json.dumps(info))
    found = page(folder)
    kinds = [a["src"].partition(";")[0].removeprefix("data:image/") for a in found.all("img")]
    assert kinds == ["webp"] * 2 + ["jpeg"] * 3
    stills = found.all("source")
    assert len(stills) == 2 and all(
        a["media"] == "(prefers-reduced-motion: reduce)" and "image/jpeg" in a["srcset"]
        for a in stills
    )
    content = base64.b64decode(found.all("img")[0]["src"].partition(",")[2])
    with Image.open(io.BytesIO(content)) as shown:
        assert shown.size == (256, 154) and shown.n_frames == FRAMES
        assert sum(duration_of(shown, n) for n in range(FRAMES)) == pytest.approx(
            40 * FRAME_MS, rel=0.05
        ), "as long as the video"
    assert (
        "Of 1 videos" in found.text
        and "rewarded videos" in found.text
        and "40 frames" in found.text
    )
    assert len(content) < 40_000


def duration_of(image, frame):
    image.seek(frame)
    image.load()
    return image.info["duration"]
