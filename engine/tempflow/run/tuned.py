"""Score and sample a run's model, before or after training, in one process without DeepSpeed.

`choose` finds the run's config and a checkpoint. `score` and `draw` open the model as a training
session does (models/opened.py), but only with the embeddings of their prompts, and without the
training engine and a float8 copy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Iterator

import numpy as np
from rich.progress import Progress

from tempflow.checkpoints import load
from tempflow.config import Config
from tempflow.data.prompts import load_prompts
from tempflow.errors import UserError, note
from tempflow.models.opened import Opened, open_model
from tempflow.rewards import RewardPool, check_prompts, parse_rewards, probe
from tempflow.run import drift, evaluation
from tempflow.run.directory import read_config
from tempflow.run.failures import check_failed
from tempflow.run.means import gain_of
from tempflow.types import Example

NO_HELDOUT = "--prompts: the run has no held-out prompts; name a prompt file"


def choose(
    run: Path, checkpoint: int | str | None, weights: str | None, base: bool = False
) -> tuple[Config, load.Tuned | None]:
    """Find a run's config and its trained weights.

    Args:
        run: the run directory.
        checkpoint: as `load_tuned` takes it.
        weights: as `load_tuned` takes it.
        base: do not look for trained weights.

    Returns:
        The config, and the weights, None with `base`.

    Raises:
        UserError: as `load_tuned`.
    """
    chosen = None if base else load.load_tuned(run, checkpoint, weights)
    return (chosen.config if chosen else read_config(run)), chosen


def not_finite(count: int) -> str:
    """What to say of that many images without finite values; at least one."""
    return (
        "1 image contains NaN or infinity; a checkerboard replaces it"
        if count == 1
        else f"{count} images contain NaN or infinity; a checkerboard replaces each"
    )


def prompts_of(
    config: Config, file: Path | None, count: int, otherwise: str = NO_HELDOUT
) -> list[Example]:
    """The first `count` prompts of a file, or of the run's held-out prompts.

    Args:
        config: of the run.
        file: None: the run's held-out prompts.
        count: how many at most.
        otherwise: the message where there is neither.

    Raises:
        UserError: without prompts.
    """
    source = file or config.data.heldout
    if not source:
        raise UserError(otherwise)
    return load_prompts(source, "--prompts" if file else "data.heldout")[:count]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of a run's model."""

    result: dict
    """JSON values: the mean of each reward under its name; iteration, num_steps, seed, weights,
    prompts, reward, stderr, scored, failed; rewards (mean, standard error and counts by name). With
    a base also base_reward, base_stderr, gain, gain_stderr and the drift metrics."""
    scored: evaluation.Scored
    prompts: list[Example]
    facts: dict
    """Entries of samples.json on the whole set."""
    base: Evaluated | None = None
    """The evaluation of the model before training, on the same prompts and noise, if asked for."""

    def write(self, folder: Path) -> None:
        """Write the kept images and samples.json into a new or empty folder; with a base, into its
        subfolders base/ and tuned/."""
        evaluation.write_samples(
            folder / "tuned" if self.base else folder, self.scored, self.prompts, self.facts
        )
        if self.base:
            self.base.write(folder / "base")


def score(
    config: Config,
    chosen: load.Tuned | None,
    prompts: list[Example],
    *,
    num_steps: int | None,
    keep: bool = False,
    compare: bool = False,
) -> Evaluated:
    """Score the model on prompts, from fixed noise.

    Args:
        config: of the run.
        chosen: the trained weights; None scores the model before training.
        prompts: n of them.
        num_steps: ODE steps; None: as in the run's evaluations.
        keep: keep the images, as files in memory.
        compare: score the model before training too, and add gain and drift.

    Raises:
        UserError: where the model or the rewards cannot be used.
        TooManyFailed: where more rewards fail than the run allows.
    """
    # Prompts and rewards are checked before the model is loaded, which may take minutes.
    specs = parse_rewards(config.rewards)
    texts, metadata = [p.text for p in prompts], [p.for_rewards for p in prompts]
    for line in check_prompts(specs, texts, metadata):
        note(line)
    model, base = open_model(config, prompts), None
    with (
        RewardPool(specs, **config.reward_pool.pool()) as scorers,
        Progress(transient=True) as progress,
    ):
        # Before the first image is made: a reward that cannot score fails now, not in minutes.
        probe(scorers, specs, texts, metadata, model.sampler.size)

        def scored(name: str, which: load.Tuned | None) -> Evaluated:
            drawn = _drawn(model, prompts, num_steps, progress, name)
            # drawn is a generator: the workers score while the model makes the next images.
            found = evaluation.evaluate(
                scorers, specs, prompts, drawn, keep=len(prompts) if keep else 0
            )
            check_failed(
                "this evaluation",
                *found.counts(),
                config.reward_pool.max_failed,
                scorers.last_error,
            )
            return _evaluated(found, prompts, which, model.eval_steps(num_steps))

        if compare:  # before the trained weights are put into the same model
            base = scored("base", None)
        if chosen:
            load.apply(chosen, model.policy)
        done = scored("sampling", chosen)
    return _beside(base, done, config.eval.precision_recall) if base else done


def _evaluated(
    scored: evaluation.Scored, prompts: list[Example], chosen: load.Tuned | None, steps: int
) -> Evaluated:
    facts = {
        "iteration": chosen.iteration if chosen else 0,
        "num_steps": steps,
        "seed": evaluation.EVAL_SEED,
        "weights": chosen.which if chosen else "base",
    }
    total, alone = scored.mean(), scored.means()
    result = {
        # First, so that a reward with a name such as "seed" cannot hide a fact of the evaluation.
        **{name: mean.value for name, mean in alone.items()},
        **facts,
        "prompts": len(prompts),
        "reward": total.value,
        "stderr": total.stderr,
        "scored": total.scored,
        "failed": total.failed,
        "rewards": {name: asdict(mean) for name, mean in alone.items()},
    }
    return Evaluated(result, scored, prompts, facts)


def _beside(base: Evaluated, done: Evaluated, neighbors: int | None) -> Evaluated:
    """The evaluation with gain and drift from the base's, under the names of summary.json."""
    gain = gain_of(base.scored.reward, done.scored.reward)
    found = {
        "base_reward": base.result["reward"],
        "base_stderr": base.result["stderr"],
        "gain": gain.value,
        "gain_stderr": gain.stderr,
        **drift.metrics(base.scored.looks, done.scored.looks, neighbors),
    }
    # On the right, for the same reason: no name of a reward hides one of these.
    return replace(done, result=done.result | found, base=base)


def draw(
    config: Config,
    variants: dict[str, load.Tuned | None],
    prompts: list[Example],
    *,
    num_steps: int | None,
    seed: int,
) -> tuple[list[np.ndarray], int]:
    """Draw the prompts from the same noise with each variant of the model.

    Args:
        config: of the run.
        variants: weights by the name that the progress display shows. None is the model before
            training and has to come first, since weights are put into the model in place.
        prompts: n of them.
        num_steps: ODE steps; None: as in the run's evaluations.
        seed: of the noise.

    Returns:
        For each variant uint8 images [n, H, W, 3] or videos [n, F, H, W, 3], and the number of
        images with NaN or infinity, for which a checkerboard is returned.

    Raises:
        UserError: where the model cannot be opened.
    """
    model, made, missing = open_model(config, prompts), [], 0
    with Progress(transient=True) as progress:
        for name, chosen in variants.items():
            if chosen:
                load.apply(chosen, model.policy)
            parts = list(_drawn(model, prompts, num_steps, progress, name, seed))
            # Prompts are drawn shape by shape; the caller gets them in their own order.
            order = np.argsort(np.concatenate([indices for indices, _, _ in parts]))
            made.append(np.concatenate([images for _, images, _ in parts])[order])
            missing += sum(int((~finite).sum()) for _, _, finite in parts)
    return made, missing


def _drawn(
    model: Opened,
    prompts: list[Example],
    num_steps: int | None,
    progress: Progress,
    name: str,
    seed: int = evaluation.EVAL_SEED,
) -> Iterator:
    """What `evaluation.draw` yields for all prompts, shown as a task of the progress display."""
    task, indices = progress.add_task(name, total=len(prompts)), list(range(len(prompts)))
    return evaluation.draw(
        model,
        prompts,
        indices,
        num_steps=num_steps,
        seed=seed,
        advance=lambda n: progress.advance(task, n),
    )
