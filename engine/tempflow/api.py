"""The engine from Python: `train`, `evaluate` and `sample`, which `tempflow` exports.

They do what the commands of the same names do, in this process, and can be called repeatedly.
"""

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
    """Train a model, in this process alone unless a launcher started it.

    The run directory has the same files as with the command. SIGINT (a notebook's interrupt),
    SIGTERM and SIGHUP end the run after the step in progress, with a checkpoint. Afterwards signal
    handlers and environment variables are as before.

    Args:
        config: a JSON file, or its content as a dict, in which `logging.name` is required.
        resume: continue the run directory from its newest checkpoint.
        overrides: texts `section.key=value`, as for --set.

    Returns:
        "run_dir" (a Path) and the content of summary.json: base_reward, tuned_reward, minutes,
        iterations, images and more. Only "run_dir" if a signal stopped the run, and on ranks other
        than 0.

    Raises:
        tempflow.errors.UserError: for bad input, with the message that the command prints.
    """
    before = {name: os.environ.get(name) for name in LAUNCH}
    with handlers_kept():
        try:
            return start(config, resume=resume, overrides=list(overrides))
        finally:
            # The run set the variables of a launcher. A process started later from here, perhaps
            # another run, would take itself for a rank of this one.
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
        weights: "raw", or "ema" or "merge" if the run keeps that average; None: the average if the
            run keeps one, else "raw".
        base: score the model before training.
        compare: also score the model before training.
        prompts: a prompt file; None: the run's held-out prompts.
        count: number of prompts, from the first on; None: as in the run.
        num_steps: ODE steps; None: as in the run's evaluations.

    Returns:
        What the command prints: the mean of each reward by its name, "reward" (their weighted sum)
        with "stderr", "scored" and "failed", "rewards" (the same for each reward), "prompts" (their
        number), "iteration", "weights", "num_steps" and "seed"; with `compare` also "base_reward",
        "base_stderr", "gain", "gain_stderr", "drift/color_shift", "drift/color_spread" and
        "drift/diversity".

    Raises:
        tempflow.errors.UserError: for bad input, or if too many images have no reward.
    """
    # Before the libraries are imported, which read these settings once.
    cli.quiet_libraries()
    from tempflow.run import tuned

    count, num_steps = (
        _read("count", arguments.positive, count),
        _read("num_steps", arguments.steps, num_steps),
    )
    file = _read("prompts", arguments.path, prompts)
    if base and compare:
        raise UserError("compare: is not allowed with base; it scores the base too")
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
    """Sample prompts with a run's model.

    Args:
        run: the run directory.
        prompts: n texts.
        images: condition images, for models that edit: n entries, each an image or a list of
            images; an image is a file, a PIL image or a uint8 array [H, W, 3].
        checkpoint: an iteration, or "best"; None: the newest.
        weights: "raw", or "ema" or "merge" if the run keeps that average; None: the average if the
            run keeps one, else "raw".
        base: sample with the model before training.
        num_steps: ODE steps; None: as in the run's evaluations.
        seed: of the noise. A prompt's noise depends on the seed and the prompt's place in the list.

    Returns:
        uint8 images [n, H, W, 3], or videos [n, F, H, W, 3].

    Raises:
        tempflow.errors.UserError: for bad input.
    """
    cli.quiet_libraries()
    from tempflow.data.prompts import typed_prompts
    from tempflow.run import tuned

    # A single text is a sequence of texts too: of its letters.
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
    # An entry may be a single image; `typed_prompts` takes lists.
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
    # One variant only: unlike the command, which shows the base beside the tuned model.
    (drawn,), missing = tuned.draw(
        config, {"base" if base else "tuned": chosen}, examples, num_steps=num_steps, seed=seed
    )
    if missing:
        note(tuned.not_finite(missing))
    return drawn


def _checkpoint(
    run: str | Path, checkpoint: int | str | None, weights: str | None
) -> tuple[Path, int | str | None, str | None]:
    """The arguments that choose a run's weights, checked as the commands' options are."""
    if weights not in (None, "ema", "merge", "raw"):
        raise UserError(f'weights: expected "ema", "merge" or "raw", got {shown(weights)}')
    return (
        _read("run", arguments.path, run),
        _read("checkpoint", arguments.checkpoint, checkpoint),
        weights,
    )


def _read(name: str, read: Callable[[str], Any], value) -> Any:
    """Read an argument with the type of the command's option; None stays None. Raises UserError."""
    try:
        return None if value is None else read(str(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from None
