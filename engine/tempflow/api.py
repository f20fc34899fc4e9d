"""The engine from Python: `train`, `evaluate` and `sample`, which `tempflow` exports. They do what
the commands of these names do."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Sequence

from tempflow import arguments, cli
from tempflow.errors import UserError, note, shown
from tempflow.run.environment import LAUNCH
from tempflow.training.signals import handlers_kept
from tempflow.training.start import start

if TYPE_CHECKING:
    import numpy as np


def train(
    config: str | Path | dict, *, resume: bool = False, overrides: Sequence[str] = ()
) -> dict:
    """Train, in this process alone unless a launcher started it; the run directory's files are
    those of the command.

    SIGINT (a notebook's interrupt), SIGTERM and SIGHUP end the run after the step in progress, with
    a checkpoint; afterwards their handlers are those of before, and so is the environment.

    Args:
        config: a JSON file, or its content as nested tables, in which `logging.name` is required.
        resume: continue the run directory from its newest checkpoint.
        overrides: `section.key=value` texts, as of --set.

    Returns "run_dir" (a Path) and what summary.json holds: base_reward, tuned_reward, minutes,
    iterations, images and more. Where a signal stopped the run, and on ranks other than 0,
    "run_dir" alone. Raises `tempflow.errors.UserError`.
    """
    before = {name: os.environ.get(name) for name in LAUNCH}
    with handlers_kept():
        try:
            return start(config, resume=resume, overrides=list(overrides))
        # a process started from here, perhaps another run, must not take itself for a rank of this
        # one
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def evaluate(
    run: str | Path,
    *,
    checkpoint: int | str | None = None,
    weights: str | None = None,
    base: bool = False,
    compare: bool = False,
    prompts: str | Path | None = None,
    count: int | None = None,
    num_steps: int | None = None,
) -> dict:
    """Score a run's model on held-out prompts, from fixed noise.

    Args:
        run: the run directory.
        checkpoint: an iteration, or "best"; None: the newest.
        weights: "raw", or "ema" or "merge" of a run that keeps it; None: the average where the run
            keeps one, else "raw".
        base: score the model before training instead.
        compare: score the model before training too.
        prompts: a prompt file; None: the run's held-out prompts.
        count: prompts used, from the top of the file; None: as in the run.
        num_steps: ODE steps; None: as in the run's evaluations.

    Returns what the command prints: the mean of each reward by its name, "reward" (their weighted
    sum) with "stderr", "scored" and "failed", "rewards" (the same of each), "prompts" (their
    number), "iteration", "weights", "num_steps" and "seed"; with `compare` also "base_reward",
    "base_stderr", "gain", "gain_stderr", "drift/color_shift", "drift/color_spread" and
    "drift/diversity". Raises `tempflow.errors.UserError`.
    """
    cli.quiet_libraries()
    from tempflow.run import tuned

    count, num_steps = (
        _read("count", arguments.positive, count),
        _read("num_steps", arguments.steps, num_steps),
    )
    file = _read("prompts", arguments.path, prompts)
    if base and compare:
        raise UserError("compare: the base cannot be compared with itself; leave base out")
    config, chosen = tuned.choose(*_checkpoint(run, checkpoint, weights), base)
    chosen_prompts = tuned.prompts_of(config, file, count or config.eval.prompts)
    return tuned.score(config, chosen, chosen_prompts, num_steps=num_steps, compare=compare).result


def sample(
    run: str | Path,
    prompts: Sequence[str],
    *,
    images: Sequence | None = None,
    checkpoint: int | str | None = None,
    weights: str | None = None,
    base: bool = False,
    num_steps: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Draw prompts with a run's model.

    Args:
        run: as of `evaluate`, and so are checkpoint, weights, base and num_steps.
        prompts: n texts.
        images: condition images, for models that edit: n entries, each an image or a list of
            images; an image is a file, a PIL image or a uint8 array [H, W, 3].
        seed: of the noise, which is a prompt's by its place.

    Returns uint8 images [n, H, W, 3], or videos [n, F, H, W, 3]. Raises
    `tempflow.errors.UserError`.
    """
    cli.quiet_libraries()
    from tempflow.data.prompts import typed_prompts
    from tempflow.run import tuned

    if (
        isinstance(prompts, str)
        or not all(isinstance(text, str) for text in prompts)
        or not len(prompts)
    ):
        raise UserError(
            f"prompts: expected a list of texts that is not empty, got {shown(prompts)}"
        )
    if images is not None and (isinstance(images, str) or len(images) != len(prompts)):
        raise UserError(
            f"images: expected a list with an entry for each of {len(prompts)} prompts, got"
            f" {shown(images)}"
        )
    given = [
        list(entry) if isinstance(entry, (list, tuple)) else [entry]
        for entry in (() if images is None else images)
    ]
    examples = typed_prompts(list(prompts), "prompts", given, "images")
    num_steps, seed = (
        _read("num_steps", arguments.steps, num_steps),
        _read("seed", arguments.seed, seed),
    )
    config, chosen = tuned.choose(*_checkpoint(run, checkpoint, weights), base)
    (drawn,), missing = tuned.draw(
        config, {"base" if base else "tuned": chosen}, examples, num_steps=num_steps, seed=seed
    )
    if missing:
        note(f"{missing} images hold NaN or infinity; a checkerboard stands for each")
    return drawn


def _checkpoint(
    run: str | Path, checkpoint: int | str | None, weights: str | None
) -> tuple[Path, int | str | None, str | None]:
    if weights not in (None, "ema", "merge", "raw"):
        raise UserError(f'weights: expected "ema", "merge" or "raw", got {shown(weights)}')
    return (
        _read("run", arguments.path, run),
        _read("checkpoint", arguments.checkpoint, checkpoint),
        weights,
    )


def _read(name: str, read: Callable[[str], Any], value) -> Any:
    """An argument as the command's option of that name reads it; None stays None. UserError."""
    try:
        return None if value is None else read(str(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from None
