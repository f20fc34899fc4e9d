"""Held-out evaluation: ODE images or videos of fixed prompts from fixed noise, scored, with the
first ones kept.

The noise of a prompt depends on the evaluation seed and the prompt's place in the file alone, so
base and tuned images, runs and numbers of ranks compare like with like.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import numpy as np
import torch

from tempflow.models import by_shape
from tempflow.models.opened import Opened
from tempflow.rewards import RewardPool, RewardSpec, combine
from tempflow.run import collage, drift
from tempflow.run.files import CONDITION, MediaFile, encoded
from tempflow.run.logs import write_atomic
from tempflow.run.means import Mean, gain_of, mean_of
from tempflow.sampling.noise import INITIAL, key_tensor, noise_key
from tempflow.types import Example
from tempflow_kernels import normal

EVAL_SEED = 0
# no training iteration has this number, so evaluation noise is never trained on
EVAL_ITERATION = -1


@dataclass(frozen=True)
class Scored:
    """Prompts by index, the weighted reward [n], each reward alone, and its readings; the image or
    video of some of them, as a file: a video's frames are too large to be kept, and gathered from
    all ranks, as arrays.

    reward: NaN where it failed. parts: NaN where a reward failed or does not apply. applies: bool
    [n] by reward. finite: bool [n], False where there is no image to score. looks: of all images,
    for the distance to the base's.
    """

    indices: list[int]
    files: dict[int, MediaFile]
    finite: np.ndarray
    reward: np.ndarray
    parts: dict[str, np.ndarray]
    applies: dict[str, np.ndarray]
    details: dict[str, list[str] | None]
    looks: drift.Looks

    def counts(self) -> tuple[int, int, int]:
        """Images, those without a reward, and those of them that are not finite."""
        return len(self.reward), int(np.isnan(self.reward).sum()), int((~self.finite).sum())

    def mean(self) -> Mean:
        """Of the weighted reward, over the prompts."""
        return mean_of(self.reward)

    def means(self) -> dict[str, Mean]:
        """Of each reward alone, over the prompts that are for it; rewards that no prompt is for are
        left out."""
        return {
            name: mean_of(values, self.applies[name])
            for name, values in self.parts.items()
            if self.applies[name].any()
        }


def fixed_noise(
    indices: list[int], shape: tuple[int, ...], device, seed: int = EVAL_SEED
) -> torch.Tensor:
    """Initial latents of evaluation prompts by their place in the file, fp32 [n, *shape]."""
    keys = key_tensor([noise_key(seed, EVAL_ITERATION, i, 0, INITIAL) for i in indices], device)
    return normal(keys, torch.Size(shape).numel()).reshape(len(indices), *shape)


def draw(
    model: Opened,
    prompts: list[Example],
    indices: list[int],
    *,
    num_steps: int | None = None,
    seed: int = EVAL_SEED,
    advance=lambda n: None,
):
    """Yield (indices, images or videos, which are finite) of what `final_latents` yields."""
    sampler = model.eval_sampler()
    for part, latents in final_latents(model, prompts, indices, num_steps=num_steps, seed=seed):
        yield part, *sampler.decode(latents)
        advance(len(part))


def final_latents(
    model: Opened,
    prompts: list[Example],
    indices: list[int],
    *,
    num_steps: int | None = None,
    seed: int = EVAL_SEED,
):
    """Yield (indices, latents fp32 [n, ...] at sigma 0) of the prompts at `indices`: `rollout.rows`
    are integrated together, those of each shape apart, and at most `rollout.decode_batch` of them
    yielded together. num_steps: None: as in the run's evaluations."""
    r, sampler, steps = model.config.rollout, model.eval_sampler(), model.eval_steps(num_steps)
    for part in _portions(model, prompts, indices, r.rows):
        noise = fixed_noise(part, sampler.latent_shape, model.policy.device, seed)
        latents = sampler.integrate(noise, model.embeddings.get([prompts[i] for i in part]), steps)
        for start in range(0, len(part), r.decode_batch):
            yield part[start : start + r.decode_batch], latents[start : start + r.decode_batch]


def _portions(
    model: Opened, prompts: list[Example], indices: list[int], rows: int
) -> Iterator[list[int]]:
    """The indices that are integrated together."""
    for places in by_shape(model.embeddings.shapes([prompts[i] for i in indices])):
        for first in range(0, len(places), rows):
            yield [indices[n] for n in places[first : first + rows]]


def evaluate(
    pool: RewardPool, specs: list[RewardSpec], prompts: list[Example], drawn, keep: int
) -> Scored:
    """Score what `draw` yields while it goes on drawing, in the order of the prompts; images of the
    first `keep` prompts are kept."""
    kept: dict[int, MediaFile] = {}
    indices, tickets, finite, looks = [], [], [], []
    for part, images, made in drawn:
        chosen = [prompts[i] for i in part]
        tickets.append(
            pool.submit(
                images, [p.text for p in chosen], [p.for_rewards for p in chosen], finite=made
            )
        )
        indices += part
        finite.append(made)
        looks.append(drift.look(images, made))
        kept |= {i: encoded(image) for i, image in zip(part, images, strict=True) if i < keep}
    scores = pool.gather(tickets)
    combined = [combine(score, specs) for score in scores]
    details = {}
    for spec in specs:
        texts = [score[spec.name].details for score in scores]
        known = any(t is not None for t in texts)
        details[spec.name] = (
            [text for t, made in zip(texts, finite, strict=True) for text in t or [""] * len(made)]
            if known
            else None
        )
    scored = Scored(
        indices,
        kept,
        np.concatenate(finite),
        np.concatenate([c.values for c in combined]),
        {spec.name: np.concatenate([c.parts[spec.name] for c in combined]) for spec in specs},
        {spec.name: np.concatenate([c.applies[spec.name] for c in combined]) for spec in specs},
        details,
        drift.join(looks),
    )
    return scored if indices == sorted(indices) else merge([scored])


def merge(parts: list[Scored]) -> Scored:
    """The evaluations of several ranks as one, in the order of the prompts."""
    order = np.argsort(np.concatenate([p.indices for p in parts]))

    def join(arrays):
        return np.concatenate(arrays)[order]

    def by_name(of):
        return {name: join([of(p)[name] for p in parts]) for name in parts[0].parts}

    details = {}
    for name in parts[0].details:
        known = any(p.details[name] is not None for p in parts)
        texts = [np.array(p.details[name] or [""] * len(p.indices), dtype=object) for p in parts]
        details[name] = list(join(texts)) if known else None
    return Scored(
        np.concatenate([p.indices for p in parts])[order].tolist(),
        {i: file for p in parts for i, file in p.files.items()},
        join([p.finite for p in parts]),
        join([p.reward for p in parts]),
        by_name(lambda p: p.parts),
        by_name(lambda p: p.applies),
        details,
        drift.join([p.looks for p in parts]).pick(order),
    )


def metrics(
    scored: Scored,
    base: np.ndarray | None = None,
    base_looks: drift.Looks | None = None,
    neighbors: int | None = None,
) -> dict[str, float]:
    """What a row of metrics.jsonl says of an evaluation.

    Args:
        scored: the evaluation, of n prompts.
        base: the rewards [n] before training, to which the gain is measured.
        base_looks: of the n images before training, to which the drift is measured.
        neighbors: eval.precision_recall.
    """
    total = scored.mean()
    found = {
        "eval/reward": total.value,
        "eval/reward/stderr": total.stderr,
        "eval/scored": total.scored,
        "eval/failed": total.failed,
    }
    found["eval/not_finite"] = int((~scored.finite).sum()) or None
    for name, one in scored.means().items():
        found |= {
            f"eval/{name}": one.value,
            f"eval/{name}/stderr": one.stderr,
            f"eval/{name}/scored": one.scored,
            f"eval/{name}/failed": one.failed,
        }
    if base is not None:
        gain = gain_of(base, scored.reward)
        found |= {"eval/gain": gain.value, "eval/gain/stderr": gain.stderr}
    if base_looks is not None:
        found |= drift.metrics(base_looks, scored.looks, neighbors)
    return {key: value for key, value in found.items() if value is not None}


def write_samples(folder: Path, scored: Scored, prompts: list[Example], facts: dict) -> None:
    """Write the images or videos and samples.json with `facts` into `folder`, which is new or
    empty. Beside each those that its prompt brings, in a row of its height."""
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for n, index in enumerate(scored.indices):
        if index not in scored.files:
            continue
        made = scored.files[index]
        file = made.write(folder, f"{n:04d}")
        items.append(
            {
                "prompt": prompts[index].text,
                "file": file,
                **_written_conditions(folder, file, prompts[index], made.height),
                "reward": _number(scored.reward[n]),
                "rewards": {
                    name: _number(values[n])
                    for name, values in scored.parts.items()
                    if scored.applies[name][n]
                },
                "details": {
                    name: texts[n]
                    for name, texts in scored.details.items()
                    if texts is not None and scored.applies[name][n]
                },
                **{
                    key: prompts[index].metadata[key]
                    for key in ("ocr_target",)
                    if key in prompts[index].metadata
                },
            }
        )
    total = scored.mean()
    content = {
        **facts,
        "reward": total.value,
        "stderr": total.stderr,
        "scored": total.scored,
        "failed": total.failed,
        "items": items,
    }
    write_atomic(
        folder / "samples.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    )


def _written_conditions(folder: Path, file: str, prompt: Example, height: int) -> dict:
    """The entries of a sample's item on its prompt's condition images, in a file of one row, and
    where they came from; {} without any."""
    if not prompt.images:
        return {}
    name = encoded(collage.row(collage.conditions(prompt, height))).write(
        folder, Path(file).stem + CONDITION
    )
    came = [
        digest if isinstance(image, np.ndarray) else str(image)
        for image, digest in zip(prompt.images, prompt.image_digests)
    ]
    return {"condition": name, "images": came}


def replace_samples(run_dir: Path, scored: Scored, prompts: list[Example], facts: dict) -> Path:
    """The sample set of facts["iteration"] in a run's own samples/, all or nothing; one that is
    there is replaced."""
    folder = run_dir / "samples" / f"{facts['iteration']:06d}"
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)  # by a start that was killed
    try:
        write_samples(draft, scored, prompts, facts)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder


def _number(value) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
