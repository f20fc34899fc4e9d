"""A run's model, before or after training, scored and sampled in one process without DeepSpeed.

`choose` finds the run's config and a checkpoint; `score` and `draw` open the model as a session does (models/opened.py), with
embeddings of their prompts alone, and without what training adds: reward workers, the engine, a float8 copy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
from tempflow.run import evaluation
from tempflow.run.directory import read_config
from tempflow.run.failures import check_failed
from tempflow.types import Example

NO_HELDOUT = "--prompts: the run has no held-out prompts; name a prompt file"


def choose(run: Path, checkpoint: int | str | None, weights: str | None, base: bool = False) -> tuple[Config, load.Tuned | None]:
    """The run's config and trained weights, None of the base. UserError as `load_tuned`."""
    chosen = None if base else load.load_tuned(run, checkpoint, weights)
    return (chosen.config if chosen else read_config(run)), chosen


def prompts_of(config: Config, file: Path | None, count: int, otherwise: str = NO_HELDOUT) -> list[Example]:
    """The first `count` prompts of a file, by default the run's held-out prompts; `otherwise` is the UserError without either."""
    if not (file or config.data.heldout):
        raise UserError(otherwise)
    return load_prompts(file or config.data.heldout, "--prompts" if file else "data.heldout")[:count]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of a run's model."""

    result: dict
    """JSON values: each reward's mean by its name, and iteration, num_steps, seed, weights, prompts, reward, stderr, scored, failed,
    rewards (mean, standard error and counts by name)."""
    scored: evaluation.Scored
    prompts: list[Example]
    facts: dict
    """What samples.json says of all images."""

    def write(self, folder: Path) -> None:
        """Write the images that were kept, and samples.json, into a folder that is new or empty."""
        evaluation.write_samples(folder, self.scored, self.prompts, self.facts)


def score(config: Config, chosen: load.Tuned | None, prompts: list[Example], *, num_steps: int | None, keep: bool = False) -> Evaluated:
    """Score the model on prompts, from fixed noise.

    Args:
        config: of the run.
        chosen: the trained weights; None scores the model before training.
        prompts: n of them.
        num_steps: ODE steps; None: as in the run's evaluations.
        keep: keep the images.

    Raises UserError, also where more rewards fail than the run allows.
    """
    specs = parse_rewards(config.rewards)
    texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
    for line in check_prompts(specs, texts, metadata):
        note(line)
    model = open_model(config, prompts)
    if chosen:
        load.apply(chosen, model.policy)
    with RewardPool(specs, **config.reward_pool.pool()) as scorers, Progress(transient=True) as progress:
        probe(scorers, specs, texts, metadata, model.sampler.size)
        drawn = _drawn(model, prompts, num_steps, progress, "sampling")
        scored = evaluation.evaluate(scorers, specs, prompts, drawn, keep=len(prompts) if keep else 0)
        check_failed("this evaluation", *scored.counts(), config.reward_pool.max_failed, scorers.last_error)
    facts = {
        "iteration": chosen.iteration if chosen else 0,
        "num_steps": model.eval_steps(num_steps),
        "seed": evaluation.EVAL_SEED,
        "weights": chosen.which if chosen else "base",
    }
    total, alone = scored.mean(), scored.means()
    result = {
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


def draw(
    config: Config, variants: dict[str, load.Tuned | None], prompts: list[Example], *, num_steps: int | None, seed: int
) -> tuple[list[np.ndarray], int]:
    """Draw the prompts from the same noise with each variant of the model.

    Args:
        config: of the run.
        variants: by the name that the progress display shows; None is the model before training and comes first.
        prompts: n of them.
        num_steps: ODE steps; None: as in the run's evaluations.
        seed: of the noise.

    Returns for each variant uint8 images [n, H, W, 3] or videos [n, F, H, W, 3], and how many hold NaN or infinity: a checkerboard
    stands for each of these. Raises UserError.
    """
    model, made, missing = open_model(config, prompts), [], 0
    with Progress(transient=True) as progress:
        for name, chosen in variants.items():
            if chosen:
                load.apply(chosen, model.policy)
            drawn = _drawn(model, prompts, num_steps, progress, name, seed)
            parts = [(images, finite) for _, images, finite in drawn]
            made.append(np.concatenate([images for images, _ in parts]))
            missing += sum(int((~finite).sum()) for _, finite in parts)
    return made, missing


def _drawn(
    model: Opened, prompts: list[Example], num_steps: int | None, progress: Progress, name: str, seed: int = evaluation.EVAL_SEED
) -> Iterator:
    """What `evaluation.draw` yields for all prompts, shown as a task of the progress display."""
    task, indices = progress.add_task(name, total=len(prompts)), list(range(len(prompts)))
    return evaluation.draw(model, prompts, indices, num_steps=num_steps, seed=seed, advance=lambda n: progress.advance(task, n))
