"""The terminal's view: one plain line per iteration through a pipe, a live display at a terminal,
silence off rank 0."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from tempflow.run.console import Console, duration

ROW = {
    "iteration": 2,
    "reward/mean": 0.512,
    "reward/std": 0.2,
    "kl": 1e-4,
    "grad_norm": 0.5,
    "time/total": 5.1,
}


def recorded(terminal, total=10, width=120, **options):
    out = io.StringIO()
    rich = RichConsole(
        file=out,
        force_terminal=terminal,
        width=width,
        highlight=False,
        soft_wrap=True,
        color_system=None,
    )
    return Console(total, output=rich, **options), out


def test_plain_output_is_one_line_per_iteration():
    console, out = recorded(terminal=False)
    with console:
        console.iteration({"iteration": 0, "eval/reward": 0.48})
        with console.phase("rollout", total=4) as advance:
            advance(2)
        console.iteration({**ROW, "eval/reward": 0.561})
        console.iteration({"iteration": 10, "reward/mean": float("nan"), "kl": None})
    lines = out.getvalue().splitlines()
    assert lines[0] == "iteration  0/10  held-out 0.480"
    assert re.fullmatch(
        r"iteration  2/10  reward 0.512  std 0.200  kl 1.00e-04  grad 5.00e-01  seconds 5.1  "
        r"left \d+s  held-out 0.561 \(\+0.081\)",
        lines[1],
    )
    assert lines[2] == "iteration 10/10" and len(lines) == 3
    assert "\x1b" not in out.getvalue()


def test_live_output_shows_iteration_phase_and_reward():
    console, out = recorded(terminal=True, base_reward=0.48)
    with console:
        with console.phase("rollout", total=4) as advance:
            advance()
            advance(2)
            console._display.refresh()
        console.iteration({**ROW, "eval/reward": 0.561})
        console._display.refresh()
        console.note("saved [a]")
    text = out.getvalue()
    assert "rollout" in text and "3/4" in text and "2/10" in text and "reward 0.512" in text
    assert "held-out 0.561 (+0.081)" in text and "left" in text and "saved [a]" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_watched_rewards_stand_beside_the_held_out_one(terminal):
    console, out = recorded(terminal, watched=["jpeg", "clip"])
    with console:
        console.iteration(
            {**ROW, "eval/reward": 0.561, "eval/jpeg": -2.5, "eval/clip": float("nan")}
        )
        console.iteration({**ROW, "iteration": 3})
    shown = [line for line in out.getvalue().splitlines() if "jpeg" in line]
    assert len(shown) == 1 and "jpeg -2.500" in shown[0] and "clip" not in out.getvalue()


BASE = {
    "iteration": 0,
    "eval/reward": 0.48,
    "eval/reward/stderr": 0.01,
    "eval/scored": 128,
    "eval/failed": 0,
}
EVALUATED = {
    "eval/reward": 0.561,
    "eval/reward/stderr": 0.012,
    "eval/scored": 125,
    "eval/failed": 3,
    "eval/gain": 0.079,
    "eval/gain/stderr": 0.015,
    "eval/jpeg": -2.5,
    "eval/jpeg/stderr": 0.125,
    "eval/jpeg/failed": 0,
    "eval/clip/failed": 128,
}


@pytest.mark.parametrize("terminal", [False, True])
def test_an_evaluation_is_shown_with_what_it_is_made_of(terminal):
    """The gain is the one measured prompt by prompt, not the difference of the means; a watched
    reward that failed is told of."""
    console, out = recorded(terminal, watched=["jpeg", "clip"])
    with console:
        console.iteration(BASE)
        console.iteration({**ROW, **EVALUATED})
    text = out.getvalue()
    assert "0.480 ± 0.010  128 scored, 0 failed" in text
    assert (
        "0.561 ± 0.012 (+0.079 ± 0.015)  125 scored, 3 failed  jpeg -2.500 ± 0.125  clip (128"
        " failed)" in text
    )


@pytest.mark.parametrize(
    "gain, stderr, words",
    [
        (0.31, 0.021, "+0.310 ± 0.021 "),
        (0.03, 0.021, "+0.030 ± 0.021, within two standard"),
        (-0.31, 0.021, "-0.310 ± 0.021 "),
        (0.0, 0.0, "+0.000 ± 0.000, within"),
    ],
)
def test_the_summary_says_whether_the_gain_is_beyond_its_error(tmp_path, gain, stderr, words):
    console, out = recorded(terminal=False)
    console.summary(
        {
            "base_reward": 0.48,
            "base_stderr": 0.01,
            "tuned_reward": 0.79,
            "tuned_stderr": 0.02,
            "scored": 125,
            "failed": 3,
            "gain": gain,
            "gain_stderr": stderr,
        },
        tmp_path,
    )
    assert (
        words in out.getvalue()
        and "0.790 ± 0.020 on 125 prompts (3 failed)" in out.getvalue()
        and "0.480 ± 0.010" in out.getvalue()
    )


def test_no_gain_is_shown_where_no_prompt_has_one(tmp_path):
    """Each of two prompts was scored once: the first before training, the second after it."""
    console, out = recorded(terminal=False)
    with console:
        console.iteration({"iteration": 0, "eval/reward": 0.2, "eval/scored": 1, "eval/failed": 1})
        console.iteration({"iteration": 1, "eval/reward": 0.9, "eval/scored": 1, "eval/failed": 1})
        console.summary(
            {"base_reward": 0.2, "tuned_reward": 0.9, "scored": 1, "failed": 1}, tmp_path
        )
    assert (
        "held-out 0.900  1 scored" in out.getvalue()
        and "unknown: no prompt" in out.getvalue()
        and "0.700" not in out.getvalue()
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_the_final_evaluation_does_not_repeat_the_last_iteration(terminal):
    console, out = recorded(terminal)
    with console:
        console.iteration({**ROW, "iteration": 10})
        console.final({**ROW, **EVALUATED, "iteration": 10})
    text = out.getvalue()
    assert text.count("reward 0.512") == 1 and text.count("grad") <= 1
    assert (
        "final evaluation, iteration 10:  held-out 0.561 ± 0.012 (+0.079 ± 0.015)  125 scored, 3"
        " failed" in text
    )


def test_the_bases_reward_has_no_gain():
    """Nor does an iteration that was not evaluated turn the base's evaluation into its own."""
    console, out = recorded(terminal=True)
    with console:
        console.iteration(BASE)
        console.iteration(ROW)
        console._display.refresh()
    assert "held-out 0.480 ± 0.010" in out.getvalue() and "(+" not in out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_lines_fit_the_terminal(width):
    """Nothing is cut off, and the numbers of an evaluation stay whole where its text is wrapped."""
    console, out = recorded(True, total=400, minutes=10, width=width, watched=["jpeg", "clip"])
    row = {**ROW, **EVALUATED, **DRIFTED, "reward/failed": 7, "time/elapsed": 150}
    with console:
        console.iteration(row)
        console._display.refresh()
        console.note("words " * 30)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    lines = re.split(r"[\r\n]+", text)
    assert max(map(len, lines)) <= width and "…" not in text
    for whole in (
        "25% of 10 minutes",
        "left ",
        "held-out 0.561 ± 0.012 (+0.079 ± 0.015)",
        "7 rewards failed",
        "color shift 38.2 (limit 15)",
        "jpeg -2.500 ± 0.125",
    ):
        assert any(whole in line for line in lines), whole


def test_what_needs_attention_is_not_cut_off():
    """The live lines alone, as rich shows them at 60 columns; brackets are no markup."""
    console, _ = recorded(True, width=60)
    with console:
        console.iteration({**ROW, **EVALUATED, **DRIFTED, "reward/failed": 7})
        shown = io.StringIO()
        RichConsole(file=shown, width=60, color_system=None).print(console._lines())
    text = shown.getvalue()
    assert "7 rewards failed" in text and "color shift 38.2 (limit 15)" in text
    assert "color spread 0.71 (limit 0.9)" in text and "[" not in text
    assert len(text.splitlines()) == 4 and max(map(len, text.splitlines())) <= 60


@pytest.mark.parametrize(
    "facts, words",
    [
        ({"iterations": 10}, "10"),
        ({"iterations": 4, "minutes": 5.2}, "4 of 10, ended by training.minutes: 5"),
        ({"iterations": 4, "minutes": 3, "stopped": "x"}, "4 of 10, stopped by x"),
    ],
)
def test_the_summary_says_what_ended_the_run(tmp_path, facts, words):
    console, out = recorded(terminal=False, minutes=5)
    console.summary(facts, tmp_path)
    row = next(line for line in out.getvalue().splitlines() if "iterations" in line)
    assert row.split("│")[2].strip() == words


def test_nested_and_failing_phases_are_taken_away():
    console, _ = recorded(terminal=True)
    with console:
        with (
            pytest.raises(RuntimeError),
            console.phase("rollout"),
            console.phase("reward", total=2),
        ):
            raise RuntimeError
        assert console._phases.tasks == []


@pytest.mark.parametrize("terminal", [True, False])
def test_disabled_console_is_silent(terminal, tmp_path):
    console, out = recorded(terminal=terminal, enabled=False)
    with console:
        with console.phase("train", total=2) as advance:
            advance()
        console.iteration(ROW)
        console.note("x")
        console.summary({"base_reward": 0.1}, tmp_path)
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    "environment, clone, command",
    [
        ("active", True, "python engine/{}.py"),
        ("active", False, "tempflow-{}"),
        ("none", True, "python engine/{}.py"),
        ("in the folder", True, ".venv/bin/python engine/{}.py"),
        ("elsewhere", False, "{there}/bin/tempflow-{}"),
    ],
)
def test_summary_names_gain_report_and_next_commands(
    tmp_path, monkeypatch, environment, clone, command
):
    """The commands are the scripts of a clone, and elsewhere the installed ones; with the path of
    this process's environment where the user's shell has not activated it."""
    monkeypatch.chdir(tmp_path)  # a path as short as a user's: lines do not break
    there = "/v" if environment == "elsewhere" else str(tmp_path / ".venv")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix if environment == "none" else there)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    if environment == "active":
        monkeypatch.setenv("VIRTUAL_ENV", there)
    if clone:
        Path("engine").mkdir()
        for name in ("sample", "export"):
            Path(f"engine/{name}.py").touch()
    run_dir = Path("runs/tiny_ocr")
    run_dir.mkdir(parents=True)
    (run_dir / "report.html").touch()
    console, out = recorded(terminal=False)
    console.summary(
        {
            "base_reward": 0.48,
            "tuned_reward": 0.79,
            "minutes": 9.41,
            "iterations": 90,
            "images": 38880,
        },
        run_dir,
    )
    text = out.getvalue()
    for expected in (
        "0.480",
        "0.790",
        "+0.310",
        "9.4 minutes",
        "38,880",
        f"  {command.format('sample', there=there)} --run",
        f"  {command.format('export', there=there)} --run",
    ):
        assert expected in text
    assert "report.html" in text


def test_summary_of_an_unevaluated_run(tmp_path):
    console, out = recorded(terminal=False)
    console.summary({"minutes": 1.0, "base_reward": float("nan"), "tuned_reward": None}, tmp_path)
    assert (
        "gain" not in out.getvalue()
        and "1.0 minutes" in out.getvalue()
        and "report" not in out.getvalue()
    )


def test_resumed_run_estimates_from_its_own_iterations(monkeypatch):
    now = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr("tempflow.run.console.time.monotonic", lambda: next(now))
    console, out = recorded(terminal=False, total=100, start=90)
    with console:
        console.iteration({"iteration": 92})
    assert out.getvalue().strip() == "iteration  92/100  left 40s"


@pytest.mark.parametrize(
    "minutes, elapsed, trained, left",
    [
        (None, 0, 50, "15m00s"),  # 10 of 100 iterations in 100 s
        (1000, 0, 50, "15m00s"),
        (2, 0, 60, "1m40s"),  # half of the training time in 100 s, evaluations and all
        (2, 60, 90, "1m40s"),  # 60 s of it were before this process, which took half of the rest
        (1, 0, 60, None),
        (1, 70, 75, None),
    ],
)
def test_time_left_knows_the_limit_in_minutes(monkeypatch, minutes, elapsed, trained, left):
    now = iter([0.0, 0.0, 100.0])
    monkeypatch.setattr("tempflow.run.console.time.monotonic", lambda: next(now))
    console, out = recorded(terminal=False, total=100, minutes=minutes, elapsed=elapsed)
    with console:
        console.iteration({"iteration": 10, "time/elapsed": trained})
    assert out.getvalue().strip() == "  ".join(
        ["iteration  10/100", *([f"left {left}"] if left else [])]
    )


@pytest.mark.parametrize(
    "minutes, elapsed, trained, percent",
    [
        (None, 0, 50, 10),
        (1000, 0, 50, 10),  # iterations end the run sooner
        (2, 0, 60, 50),
        (2, 30, 90, 75),  # of the whole run, 30 s of which were before this process
        (1, 0, 60, 100),
        (1, 0, 75, 100),
    ],
)
def test_the_bar_follows_what_ends_the_run_first(minutes, elapsed, trained, percent):
    console, out = recorded(terminal=True, total=100, minutes=minutes, elapsed=elapsed)
    with console:
        console.iteration({"iteration": 10, "time/elapsed": trained})
        console._display.refresh()
    assert console._iterations.tasks[0].percentage == pytest.approx(percent)
    assert re.search(rf"iteration  10/100 \S+ +{percent}%", out.getvalue())


def test_the_bases_evaluation_is_not_expected_again(monkeypatch):
    """60 s for the base, then 10 s for each of 100 iterations."""
    now = iter([0.0, 0.0, 60.0, 70.0])
    monkeypatch.setattr("tempflow.run.console.time.monotonic", lambda: next(now))
    console, out = recorded(terminal=False, total=100)
    with console:
        console.iteration({"iteration": 0, "eval/reward": 0.5})
        console.iteration({"iteration": 1})
    assert out.getvalue().splitlines()[1] == "iteration   1/100  left 16m30s"


DRIFTED = {"drift/color_shift": 38.24, "drift/color_spread": 0.71, "drift/diversity": 0.95}


@pytest.mark.parametrize("terminal", [False, True])
def test_drift_stands_beside_the_reward(terminal, tmp_path):
    console, out = recorded(terminal, width=200)
    with console:
        console.iteration({**BASE, "drift/color_shift": 0.0, "drift/color_spread": 1.0})
        console.iteration({**ROW, **EVALUATED, **DRIFTED})
        console.summary({"base_reward": 0.48, "tuned_reward": 0.561, **DRIFTED}, tmp_path)
    text = " ".join(out.getvalue().split())
    assert (
        "color shift 38.2 (limit 15) color spread 0.71 (limit 0.9) diversity 0.95" in text
        and "color shift 0.0" not in text
    )
    assert (
        "the mean color moved by 38 of 255 gray levels; colors vary only 0.71 times as much"
        in text.replace("│", "").replace("  ", " ")
    )


@pytest.mark.parametrize("name", ["a b", "it's", "$(rm -rf x)", "ä;b", "line\nend", "-r"])
def test_the_next_commands_can_be_pasted(tmp_path, name):
    console, out = recorded(terminal=False)
    console.summary({"minutes": 1.0}, tmp_path / name)
    quoted = re.findall(r"--run (.*?) --out", out.getvalue(), re.DOTALL)
    assert [shlex.split(text) for text in quoted] == [[str(tmp_path / name)]] * 2


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0s"), (45.4, "45s"), (400, "6m40s"), (3599.6, "1h00m"), (11100, "3h05m"), (-1, "0s")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
