"""What a report claims of a run: how sure it is, and what else changed."""

import json

import pytest
from report_page import page

from tempflow.run.metrics import describe
from tempflow.run.report.run import load_run


def with_evaluation(run_dir, **last):
    """The newest evaluation of a run of `make_run`, as runs write it now."""
    rows = load_run(run_dir).rows
    rows[0] |= {
        "eval/reward/stderr": 0.03,
        "eval/scored": 128,
        "eval/failed": 0,
        "eval/ocr/stderr": 0.03,
    }
    rows[-1] |= {"eval/reward/stderr": 0.02, "eval/scored": 128, "eval/failed": 0, **last}
    return rows


@pytest.mark.parametrize(
    "gain, stderr, words, tile",
    [
        (
            0.295,
            0.012,
            "rose from 0.480 to 0.775 (+0.295 ± 0.012 standard error)",
            "+0.295 ± 0.012",
        ),
        (
            0.295,
            0.2,
            "went from 0.480 to 0.775 (+0.295 ± 0.200 standard error)",
            "+0.295 ± 0.200",
        ),
        (
            0.004,
            0.001,
            "hardly changed: from 0.480 to 0.775 (+0.004 ± 0.001 standard error)",
            "+0.004 ± 0.001",
        ),
    ],
)
def test_the_verdict_says_how_sure_it_is(run_factory, row_writer, gain, stderr, words, tile):
    """The change is the one that was measured prompt by prompt."""
    run_dir = run_factory(iterations=20, total=20, sets=())
    summary = json.loads((run_dir / "summary.json").read_text()) | {
        "base_reward": 0.48,
        "tuned_reward": 0.775,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    row_writer(
        run_dir,
        with_evaluation(
            run_dir,
            **{"eval/gain": gain, "eval/gain/stderr": stderr, "eval/failed": 3, "eval/scored": 125},
        ),
    )
    found = page(run_dir)
    assert f"Held-out reward {words} in " in found.text and tile in found.text
    assert ("chance alone can explain" in found.text) == (stderr == 0.2)
    assert "In the newest evaluation 3 of the 128 images could not be scored." in found.text
    assert "125 of 128" in found.text
    held = found.chart("Reward")["series"][0]
    assert held["error"] == [0.03, None, 0.02] and len(held["y"]) == 3
    assert found.chart("Failed held-out images") and not any(
        "stderr" in chart["title"] for chart in found.data["charts"]
    )


@pytest.mark.parametrize(
    "drift, gain, said",
    [
        (
            {"drift/color_shift": 38.2, "drift/color_spread": 0.71, "eval/recall": 0.4},
            0.295,
            (
                "The images also drifted from the base's: the mean color moved by 38 of 255"
                " gray levels, colors vary only 0.71 times as much as the base's and only 40% of"
                " the base's images are like some of the current ones."
            ),
        ),
        (
            {"drift/color_spread": 0.89},
            0.01,
            (
                "The images also drifted from the base's: colors vary only 0.89 times as much as"
                " the base's."
            ),
        ),
        (
            {
                "drift/color_shift": 15.0,
                "drift/color_spread": 0.9,
                "eval/recall": 0.5,
                "drift/diversity": 0.2,
            },
            0.295,
            None,
        ),
    ],
)
def test_the_remarks_say_what_else_changed(run_factory, row_writer, drift, gain, said):
    run_dir = run_factory(iterations=20, total=20, sets=())
    rows = with_evaluation(run_dir, **{"eval/gain": gain, "eval/gain/stderr": 0.012}, **drift)
    rows[0] |= {key: float(key != "drift/color_shift") for key in drift}
    row_writer(run_dir, rows)
    found = page(run_dir)
    assert (said is None and "drift" not in found.text.split("Drift from")[0]) or said in found.text
    for title, key in (
        ("Color shift", "drift/color_shift"),
        ("Color spread", "drift/color_spread"),
        ("Recall", "eval/recall"),
    ):
        chart = found.chart(title)
        assert (chart is not None) == (key in drift)
        if chart:
            assert (
                chart["series"][0]["y"][-1] == drift[key]
                and chart["level"]["y"] == describe(key).limit
            )
    assert not any(chart["title"] in drift for chart in found.data["charts"]), (
        "nor among the others"
    )
    lost = [attrs for attrs in found.all("div") if attrs.get("class") == "lost"]
    assert len(lost) == sum(describe(key).beyond(value) for key, value in drift.items())


@pytest.mark.parametrize("error, told", [(0.01, True), (0.03, False), (None, True)])
def test_a_higher_evaluation_is_one_beyond_the_errors(run_factory, row_writer, error, told):
    """0.835 at iteration 10 and 0.775 at the end: of 0.03 each that is no difference."""
    run_dir = run_factory(iterations=20, total=20, sets=())
    rows = with_evaluation(
        run_dir, **{"eval/gain": 0.295, "eval/gain/stderr": 0.012, "eval/reward": 0.775}
    )
    for row in (rows[10], rows[20]):
        row |= {
            "eval/reward": {10: 0.835}.get(row["iteration"], 0.775),
            "eval/reward/stderr": error,
        }
    row_writer(run_dir, rows)
    assert ("The highest evaluation was 0.835, at iteration 10." in page(run_dir).text) == told


def test_no_gain_is_claimed_where_no_prompt_has_one(run_factory, row_writer):
    """What was scored before training and what after are other prompts."""
    run_dir = run_factory(iterations=20, total=20, sets=())
    summary = json.loads((run_dir / "summary.json").read_text()) | {
        "base_reward": 0.48,
        "tuned_reward": 0.775,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    row_writer(run_dir, with_evaluation(run_dir, **{"eval/failed": 64, "eval/scored": 64}))
    found = page(run_dir).text
    assert (
        "No held-out prompt was scored both before training (0.480) and after (0.775): the gain is"
        " unknown" in found
    )
    assert "+0.295" not in found


def test_failed_images_are_told_of_without_a_count_of_all(run_factory, row_writer):
    """Rows of earlier versions have `eval/failed` alone."""
    run_dir = run_factory(iterations=20, total=20, sets=())
    row_writer(run_dir, with_evaluation(run_dir, **{"eval/failed": 3, "eval/scored": None}))
    text = page(run_dir).text
    assert " 3 images could not be scored." in text and "3 of the" not in text


@pytest.mark.parametrize(
    "minutes, stopped, badge",
    [
        (5.0, None, "finished: 5 minutes of training"),
        (50.0, None, "stopped at 20 of 40"),
        (5.0, "eval.stop", "stopped at 20 of 40"),
        (None, None, "stopped at 20 of 40"),
    ],
)
def test_a_run_that_used_its_minutes_has_finished(run_factory, minutes, stopped, badge):
    run_dir = run_factory(iterations=20, total=40, sets=())
    for name, section, key, value in (
        ("config", "training", "minutes", minutes),
        ("summary", None, "stopped", stopped),
    ):
        file = run_dir / f"{name}.json"
        content = json.loads(file.read_text())
        (content[section] if section else content)[key] = value
        file.write_text(json.dumps(content))
    assert badge in page(run_dir).text


def test_counts_are_drawn_from_zero_in_whole_numbers(run_factory, row_writer):
    run_dir = run_factory(iterations=20, total=20, sets=())
    row_writer(run_dir, with_evaluation(run_dir, **{"eval/failed": 3, "eval/scored": 125}))
    found = page(run_dir)
    for title, counts in (("Failed held-out images", True), ("Gradient norm", False)):
        assert found.chart(title)["whole"] == found.chart(title)["from_zero"] == counts
