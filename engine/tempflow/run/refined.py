"""The refine command's work: open the model of a run or a config, refine images with the reward
workers, and write images, numbers and a plot.

The search itself, which knows neither files nor workers, is in `refining`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from tempflow.checkpoints import load
from tempflow.config import Config, Suffix
from tempflow.errors import note
from tempflow.media import still
from tempflow.models import Sampler
from tempflow.models.opened import open_model
from tempflow.rewards import RewardPool, RewardSpec, check_prompts, combine, parse_rewards, probe
from tempflow.run import collage
from tempflow.run.failures import check_failed
from tempflow.run.files import encoded
from tempflow.run.refining import Round, Search, refine
from tempflow.types import Example


@dataclass
class Found:
    """The results of a refinement."""

    first_images: list[np.ndarray] = field(default_factory=list)
    """Candidate 0 of round 0 for each prompt: what the model makes without a search."""
    first_rewards: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """float64 [prompts]: their rewards, NaN where one failed."""
    rounds: list[Round] = field(default_factory=list)
    """The state of the search after each round."""

    def write(self, folder: Path, prompts: list[Example], facts: dict) -> None:
        """Write the results into a folder.

        For each prompt: its images or videos side by side (condition images, candidate 0, the best
        after each round), and the best alone. For all prompts: one image of all rows, rewards.json
        with `facts` and, where matplotlib is installed, rewards.png.
        """
        strips, names = [], []
        for n, prompt in enumerate(prompts):
            made = [
                images[n] for images in (self.first_images, *(each.images for each in self.rounds))
            ]
            before = collage.conditions(prompt, made[0].shape[-3])
            strips.append(collage.row([*before, *map(still, made)]))
            names.append(encoded(collage.row([*before, *made])).write(folder, f"{n:04d}"))
            encoded(made[-1]).write(folder, f"{n:04d}_best")
        encoded(collage.column(strips)).write(folder, "all")
        content = {
            **facts,
            "first": _number(np.nanmean(self.first_rewards)),
            "rounds": [_described(each) for each in self.rounds],
        }
        content["items"] = [self._item(n, prompt, names[n]) for n, prompt in enumerate(prompts)]
        (folder / "rewards.json").write_text(
            json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8"
        )
        # matplotlib is no requirement of this package: the numbers are in rewards.json.
        if find_spec("matplotlib"):
            _draw_plot(folder / "rewards.png", self)

    def _item(self, n: int, prompt: Example, file: str) -> dict:
        return {
            "prompt": prompt.text,
            "file": file,
            "images": int(self.rounds[-1].drawn[n]),
            "first": _number(self.first_rewards[n]),
            "rewards": [_number(each.rewards[n]) for each in self.rounds],
        }


class PoolJudge:
    """A `refining.Judge`: decodes latents and sends the images to the reward workers.

    Attributes:
        counts: int64 [3]: images, those without a reward, those of them that are not finite.
    """

    def __init__(
        self,
        sampler: Sampler,
        pool: RewardPool,
        specs: list[RewardSpec],
        prompts: list[Example],
        advance,
    ):
        self.sampler, self.pool, self.specs, self.prompts, self.advance = (
            sampler,
            pool,
            specs,
            prompts,
            advance,
        )
        self.counts = np.zeros(3, dtype=np.int64)

    def __call__(self, places: list[int], latents: torch.Tensor):
        images, finite = self.sampler.decode(latents)
        # By place: candidates of several prompts share a batch, and finished prompts have none.
        asked = [self.prompts[n] for n in places]
        ticket = self.pool.submit(
            images, [p.text for p in asked], [p.for_rewards for p in asked], finite=finite
        )

        # The caller waits later: meanwhile the model makes the next candidates.
        def wait() -> tuple[np.ndarray, np.ndarray]:
            rewards = combine(self.pool.gather([ticket])[0], self.specs).values
            self.counts += (len(places), int(np.isnan(rewards).sum()), int((~finite).sum()))
            self.advance(len(places))
            return images, rewards

        return wait


def search(
    config: Config,
    chosen: load.Tuned | None,
    prompts: list[Example],
    options: Search,
    *,
    num_steps: int | None,
    seed: int,
    suffix: Suffix | None = None,
) -> Found:
    """Refine images of prompts by the config's rewards.

    Args:
        config: of the model, with the rewards to use.
        chosen: the trained weights; None: the model before training.
        prompts: n of them.
        options: how candidates are made.
        num_steps: as for `refine`.
        seed: as for `refine`.
        suffix: as for `refine`.

    Raises:
        UserError: where the model or the rewards cannot be used.
        TooManyFailed: where more rewards fail than the config allows.
    """
    # Prompts and rewards are checked before the model is loaded, which may take minutes.
    specs = parse_rewards(config.rewards)
    texts, metadata = [p.text for p in prompts], [p.for_rewards for p in prompts]
    for line in check_prompts(specs, texts, metadata):
        note(line)
    model, found = open_model(config, prompts), Found()
    if chosen:
        load.apply(chosen, model.policy)

    def first(images: list[np.ndarray], rewards: np.ndarray) -> None:
        found.first_images, found.first_rewards = images, rewards

    with (
        RewardPool(specs, **config.reward_pool.pool()) as pool,
        Progress(transient=True) as progress,
    ):
        probe(pool, specs, texts, metadata, model.sampler.size)
        # An upper bound: prompts that reach the target leave the search.
        task = progress.add_task(
            "refining", total=len(prompts) * options.children * (options.rounds + 1)
        )
        judge = PoolJudge(
            model.eval_sampler(), pool, specs, prompts, lambda n: progress.advance(task, n)
        )
        for each in refine(
            model,
            prompts,
            judge,
            options,
            seed=seed,
            num_steps=num_steps,
            suffix=suffix,
            first=first,
        ):
            # After every round: a search whose rewards fail would go on choosing at random.
            images, failed, not_finite = judge.counts.tolist()
            check_failed(
                "this refinement",
                images,
                failed,
                not_finite,
                config.reward_pool.max_failed,
                pool.last_error,
            )
            found.rounds.append(each)
            progress.update(task, description=f"refining, reward {np.nanmean(each.rewards):.3f}")
    return found


def _described(each: Round) -> dict:
    """The entry of a round in rewards.json."""
    return {
        "round": each.number,
        "step": each.step,
        "images": float(each.drawn.mean()),
        "forwards": each.forwards,
        "reward": _number(np.nanmean(each.rewards)),
        "failed": int(np.isnan(each.rewards).sum()),
    }


def _number(value) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def _draw_plot(file: Path, found: Found) -> None:
    """Plot the reward of the best image over the number of images and over rounds, for each prompt
    and on average."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, and none opened
    from matplotlib import pyplot as plt

    rewards = np.stack([found.first_rewards, *(each.rewards for each in found.rounds)])
    # Mean over prompts: those that reached the target early were drawn less often.
    images = [1, *(each.drawn.mean() for each in found.rounds)]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, x, label in (
        (axes[0], images, "images of a prompt, mean"),
        (axes[1], [-1, *(r.number for r in found.rounds)], "round"),
    ):
        axis.plot(x, rewards, color="0.8", linewidth=0.8)
        axis.plot(x, np.nanmean(rewards, axis=1), color="tab:blue", marker="o", markersize=3)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xticks(
        [-1, *(r.number for r in found.rounds)], ["one", *(str(r.number) for r in found.rounds)]
    )
    axes[0].set_ylabel("reward of the best")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)
