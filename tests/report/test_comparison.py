"""Several runs on one page, and the command that draws it: what is said of them, and what is
refused."""

import json

import pytest
from report_page import Page

from tempflow.commands.report import main
from tempflow.errors import UserError
from tempflow.run.report import write_comparison
from tempflow.run.report.components import VERIFIED, components
from tempflow.run.report.run import load_run


def evaluated(run_dir, row_writer, gain, stderr=0.01, **more):
    """The run, with errors, drift and a final reward of 0.48 + gain."""
    rows = load_run(run_dir).rows
    for row in rows:
        if "eval/reward" in row:
            row["eval/reward"] = 0.48 + gain * row["iteration"] / rows[-1]["iteration"]
            row |= {"eval/reward/stderr": stderr, "eval/scored": 32, "eval/failed": 0}
            row |= {"drift/color_shift": 20.0} if row["iteration"] else {}
            row |= more
    row_writer(run_dir, rows)
    (run_dir / "summary.json").unlink()
    return run_dir


@pytest.fixture
def pair(run_factory, row_writer):
    first, second = (
        evaluated(run_factory(name, iterations=20), row_writer, gain)
        for name, gain in (("slow", 0.1), ("fast", 0.3))
    )
    config = json.loads((second / "config.json").read_text())
    config["training"]["seed"] = 7
    config["logging"] = {"name": "fast"}
    (second / "config.json").write_text(json.dumps(config))
    return [first, second]


def test_the_page(pair, tmp_path):
    """Curves over each other with their errors, on every axis; numbers, differences and samples."""
    found = Page(write_comparison(pair, tmp_path / "both.html").read_text(encoding="utf-8"))
    assert (
        "fast ends with 0.780 ± 0.010, slow with 0.580 ± 0.010: more beyond two standard errors."
        in found.text
    )
    curves = found.chart("Held-out reward")["series"]
    assert [curve["name"] for curve in curves] == ["slow", "fast"]
    assert curves[1]["y"] == pytest.approx([0.48, 0.63, 0.78]) and curves[1]["error"] == [0.01] * 3
    assert set(found.data["frames"]["eval1"]) == {"iteration", "minutes", "images", "forwards"}
    assert found.data["frames"]["eval1"]["forwards"] == [0, 10 * 2456, 20 * 2456]
    assert found.chart("Color shift")["level"] == {"name": "limit", "y": 15.0}
    assert found.chart("Seconds: iteration") and found.chart("KL to the reference")
    assert "20.0, past its limit" in found.text
    assert "training.seed 0 7" in found.text and "logging.name" not in found.text
    assert [image["alt"] for image in found.all("img")][:3] == [
        f'{label}: the word "{found_word(found)}"' for label in ("base", "slow", "fast")
    ]
    assert not found.all("link") and all(
        image["src"].startswith("data:") for image in found.all("img")
    )


def found_word(found):
    return found.all("img")[0]["alt"].split('"')[1]


def test_no_more_is_claimed_than_the_errors_allow(run_factory, row_writer, tmp_path):
    runs = [
        evaluated(run_factory(name, iterations=20), row_writer, gain, stderr=0.02)
        for name, gain in (("a", 0.10), ("b", 0.14))
    ]
    text = Page(write_comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8")).text
    assert "no difference beyond two standard errors" in text
    config = json.loads((runs[0] / "config.json").read_text()) | {"rewards": {"jpeg": 1.0}}
    (runs[0] / "config.json").write_text(json.dumps(config))
    text = Page(write_comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8")).text
    assert "different rewards" in text and "ends with" not in text


def test_what_cannot_be_compared(pair, run_factory, row_writer, tmp_path):
    out = tmp_path / "c.html"
    empty = tmp_path / "empty"
    empty.mkdir()
    fewer = evaluated(run_factory("fewer", iterations=20), row_writer, 0.1, **{"eval/scored": 16})
    other = evaluated(
        run_factory("other", iterations=20, prompts=['a sign "NO"'] * 32), row_writer, 0.1
    )
    for runs, words in (
        ([pair[0], tmp_path / "none"], ["no run directory", "none"]),
        ([pair[0], empty], ["empty", "metrics.jsonl"]),
        ([pair[0], fewer], ["slow", "32", "fewer", "16", "eval.prompts"]),
        ([pair[0], other], ["different prompts", "number 1", "a sign"]),
        ([pair[0], pair[0]], ["named twice"]),
        (pair * 5, ["10 runs", "at most 8"]),
    ):
        with pytest.raises(UserError) as error:
            write_comparison(runs, out)
        assert all(word in str(error.value) for word in words), error.value
    assert not out.exists()
    out.write_text("my own notes")
    with pytest.raises(UserError, match="no comparison page"):
        write_comparison(pair, out)
    assert out.read_text() == "my own notes"


def test_the_command(pair, tmp_path, capsys, monkeypatch):
    """One run: its report; several: comparison.html, which a second call replaces."""
    monkeypatch.chdir(tmp_path)
    assert main([str(pair[0])]) == 0
    assert capsys.readouterr().out == f"{pair[0]}/report.html\n"
    for _ in range(2):
        assert main([str(run) for run in pair]) == 0
        assert capsys.readouterr().out == "comparison.html\n"
    with pytest.raises(UserError, match="one run"):
        main([str(pair[0]), "--out", "x.html"])


def test_runs_of_one_name_are_told_apart(pair, run_factory, row_writer, tmp_path):
    twin = evaluated(run_factory("elsewhere/slow", iterations=20), row_writer, 0.2)
    page = Page(write_comparison([pair[0], twin], tmp_path / "c.html").read_text(encoding="utf-8"))
    assert [one["name"] for one in page.chart("Held-out reward")["series"]] == [
        f"{tmp_path.name}/slow",
        "elsewhere/slow",
    ]


def test_what_ran_and_how_far_it_is_verified(run_factory):
    """Each part that has an entry says its level; one that has none, and a user's own, claim
    nothing."""
    run = load_run(run_factory())
    run.config["training"]["advantage"] = {"type": "advantage:RankAdvantage"}
    levels = {entry["path"]: entry["status"] for entry in json.loads(VERIFIED.read_text())}
    found = {part: (chosen, level) for part, chosen, level in components(run)}
    assert levels["full fine-tuning"] == "simulated GPU" and levels["plans"] == "unit"
    assert found["trained weights"] == ("all weights", "tests on a CPU and on a simulated GPU")
    assert found["plan"] == ("tempflow", "tests on a CPU")
    assert found["advantage"] == ("advantage:RankAdvantage", "")
    assert found["DeepSpeed"] == ("ZeRO stage 0", "") and "penalty" not in found
    assert found["reward ocr"] == ("weight 1.0", "tests on a CPU")
    assert "optimizer" not in found and "frozen weights in" not in found


def test_levels_of_what_fits_one_card(run_factory):
    run = load_run(run_factory())
    run.config["model"] |= {"lora": {"rank": 4}, "quantize": "4bit"}
    run.config["deepspeed"]["optimizer"] = {"type": "AdamW8bit"}
    found = {part: (chosen, level) for part, chosen, level in components(run)}
    simulated = "tests on a CPU and on a simulated GPU"
    assert found["trained weights"] == ("LoRA of rank 4", simulated)
    assert found["frozen weights in"] == ("4bit", simulated)
    assert found["optimizer"] == ("AdamW8bit", "tests on a CPU")
