"""A run directory as the report reads it: config, rows, sample sets, summary.

Each of them may be missing or unfinished, since a report is also written while the run trains and
after it crashed. Nothing here depends on the engine's state.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tempflow.errors import UserError
from tempflow.run.logs import read_metrics


@dataclass
class SampleSet:
    """The images of one evaluation: the folder samples/ITERATION/ and its samples.json."""

    iteration: int
    folder: Path
    info: dict

    @property
    def items(self) -> list[dict]:
        return self.info["items"]

    @property
    def reward(self) -> float | None:
        return number(self.info.get("reward"))


@dataclass
class Run:
    """The content of one run directory."""

    folder: Path
    config: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    """Rows of metrics.jsonl by iteration; of several with the same one, the last that was written."""
    samples: list[SampleSet] = field(default_factory=list)
    """By iteration."""
    summary: dict | None = None
    """summary.json; None while the run is not finished."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def iterations(self) -> int:
        """The last iteration on record."""
        return self.rows[-1]["iteration"] if self.rows else 0

    def setting(self, section: str, key: str, default=None):
        """A value of the config, `default` where the section or the key is missing."""
        values = self.config.get(section)
        return values.get(key, default) if isinstance(values, dict) else default

    @property
    def things(self) -> str:
        """The word for what the model makes: images or videos."""
        return "videos" if (number(self.setting("rollout", "frames")) or 1) > 1 else "images"

    @cached_property
    def watched(self) -> list[str]:
        """Names of the rewards that are watched and not trained on."""
        rewards = self.config.get("rewards")
        weights = {
            name: value.get("weight", 1.0) if isinstance(value, dict) else value
            for name, value in (rewards or {}).items()
        }
        return [name for name, weight in weights.items() if weight == 0]

    def column(self, key: str) -> list[float | None]:
        """A metric of every row, None where a row has no finite number."""
        return [number(row.get(key)) for row in self.rows]

    @cached_property
    def keys(self) -> list[str]:
        """Every metric that has at least one number, in order of first appearance."""
        return list(
            dict.fromkeys(
                key for row in self.rows for key, value in row.items() if number(value) is not None
            )
        )

    @cached_property
    def images(self) -> list[float]:
        """Number of rewarded images up to each row."""
        total, out = 0.0, []
        for row in self.rows:
            # The count that a run keeps includes iterations whose rows a full disk has lost.
            total = number(row.get("images/total")) or total + (number(row.get("images")) or 0)
            out.append(total)
        return out

    @cached_property
    def forwards(self) -> list[float]:
        """Number of latents that went through the transformer up to each row of metrics."""
        total, out = 0.0, []
        for row in self.rows:
            total += sum(number(row.get(f"forwards/{part}")) or 0 for part in ("rollout", "train"))
            out.append(total)
        return out

    @cached_property
    def minutes(self) -> list[float]:
        """Minutes of training up to each row. Where a resume set the clock back to 0, the time
        before it is added."""
        carried = elapsed = 0.0
        out = []
        for row in self.rows:
            clock = number(row.get("time/elapsed"))
            if clock is None:
                clock = elapsed + (number(row.get("time/total")) or 0)
            elif clock < elapsed:  # training time never runs backwards, so this is a new count
                carried += elapsed
            elapsed = clock
            out.append((carried + elapsed) / 60)
        return out

    @cached_property
    def heldout(self) -> list[tuple[int, float]]:
        """(iteration, held-out reward) of every evaluation. The metrics take precedence; a sample
        set or the summary fills in an evaluation whose row is lost."""
        found = {
            sample.iteration: sample.reward for sample in self.samples if sample.reward is not None
        }
        base = number((self.summary or {}).get("base_reward"))
        if base is not None:
            found.setdefault(0, base)
        found.update(
            {
                row["iteration"]: number(row["eval/reward"])
                for row in self.rows
                if number(row.get("eval/reward")) is not None
            }
        )
        return sorted(found.items())

    def stderr(self, iteration: int) -> float | None:
        """Standard error of the held-out reward at an iteration, None where it is not known."""
        rows = (row for row in self.rows if row["iteration"] == iteration)
        return number(next(rows, {}).get("eval/reward/stderr"))

    def at(self, iteration: int) -> dict[str, float]:
        """Minutes, images and forwards up to the end of an iteration."""
        # 0 for the base, also where the first row of metrics is a later one.
        past = [n for n, row in enumerate(self.rows) if row["iteration"] <= iteration]
        spent = {"minutes": self.minutes, "images": self.images, "forwards": self.forwards}
        return {
            name: so_far[past[-1]] if past and iteration else 0.0 for name, so_far in spent.items()
        }


def load_run(run_dir) -> Run:
    """Read a run directory.

    Raises:
        UserError: where the directory is missing; missing files in it are fine.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UserError(f"no run directory at {folder}")
    rows = {}
    for position, row in enumerate(read_metrics(folder)):
        row["iteration"] = int(
            number(row.get("iteration")) or (0 if "iteration" in row else position + 1)
        )
        # Two rows of one iteration: the run was resumed from before it and repeated it.
        rows[row["iteration"]] = row
    run = Run(
        folder,
        _read_json(folder / "config.json") or {},
        [rows[key] for key in sorted(rows)],
        _sample_sets(folder / "samples"),
        _read_json(folder / "summary.json"),
    )
    return _without_leftovers(run)


def _without_leftovers(run: Run) -> Run:
    """Drop what an earlier attempt left behind after the iteration that the run was resumed from."""
    # Rows are cut when a run resumes; sample sets are only replaced one by one as it gets to them.
    if run.rows:
        run.samples = [sample for sample in run.samples if sample.iteration <= run.iterations]
    if run.summary and (number(run.summary.get("iterations")) or run.iterations) < run.iterations:
        run.summary = None  # of a run that has since been trained further
    return run


def number(value) -> float | None:
    """A finite number as float; None for everything else (null, NaN, text, true)."""
    # bool is an int in Python; as a metric it would be drawn as 0 and 1.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _sample_sets(folder: Path) -> list[SampleSet]:
    """The complete sample sets by iteration. A set without a readable samples.json was never
    finished, since that file is written last."""
    sets = []
    for path in sorted(folder.glob("*/samples.json")):
        info = _read_json(path)
        # isdigit: drafts of sets that were never finished have names with a dot.
        if info and isinstance(info.get("items"), list) and path.parent.name.isdigit():
            info["items"] = [
                item for item in info["items"] if isinstance(item, dict) and "file" in item
            ]
            sets.append(SampleSet(int(path.parent.name), path.parent, info))
    return sorted(sets, key=lambda sample: sample.iteration)


def _read_json(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
