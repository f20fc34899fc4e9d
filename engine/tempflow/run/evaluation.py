"""Held-out evaluation: images or videos of fixed prompts, sampled by the ODE from fixed noise and
scored; those of the first prompts are kept.

The noise of a prompt depends only on the evaluation seed and the prompt's place in the file. So
images before and after training, of different runs, and on different numbers of ranks have the same
noise, and their rewards can be compared prompt by prompt.
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
# Part of the noise's key. No training iteration has this number, so evaluation noise is never
# trained on.
EVAL_ITERATION = -1


@dataclass(frozen=True)
class Scored:
    """An evaluation of n prompts, or of one rank's share of them."""

    indices: list[int]
    """The prompts' places in the file, [n]."""
    files: dict[int, MediaFile]
    """Images or videos of the first prompts, by index. Encoded files, because the frames of videos
    would be too large to keep and to gather from all ranks as arrays."""
    finite: np.ndarray
    """bool [n], False where an image holds NaN or infinity and was not scored."""
    reward: np.ndarray
    """float [n]: the weighted reward, NaN where it failed."""
    parts: dict[str, np.ndarray]
    """float [n] by reward: each reward alone, NaN where it failed or does not apply."""
    applies: dict[str, np.ndarray]
    """bool [n] by reward: whether the prompt asks for it."""
    details: dict[str, list[str] | None]
    """Text on each image by reward, such as an OCR reading; None where the reward gives none."""
    looks: drift.Looks
    """Of all n images, for the distance to the base's."""

    def counts(self) -> tuple[int, int, int]:
        """Numbers of images, of those without a reward, and of those that are not finite."""
        return len(self.reward), int(np.isnan(self.reward).sum()), int((~self.finite).sum())

    def mean(self) -> Mean:
        """Mean of the weighted reward over the prompts."""
        return mean_of(self.reward)

    def means(self) -> dict[str, Mean]:
        """Mean of each reward alone, by name, over the prompts that it applies to; a reward without
        such prompts is left out."""
        return {
            name: mean_of(values, self.applies[name])
            for name, values in self.parts.items()
            if self.applies[name].any()
        }


def fixed_noise(
    indices: list[int], shape: tuple[int, ...], device, seed: int = EVAL_SEED
) -> torch.Tensor:
    """Initial latents of evaluation prompts.

    Args:
        indices: the prompts' places in the file, n of them.
        shape: of one latent.
        device: of the result.
        seed: of the noise.

    Returns:
        fp32 [n, *shape]; a latent depends on its own index alone, not on the others.
    """
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
    """Sample and decode prompts, lazily.

    Args:
        model: opened for these prompts.
        prompts: all prompts.
        indices: the places of those to draw.
        num_steps: ODE steps; None: as in the run's evaluations.
        seed: of the noise.
        advance: called with the number of images that were made.

    Yields:
        (indices, uint8 images [n, H, W, 3] or videos [n, F, H, W, 3], bool [n] whether each is
        finite), in the order of `final_latents`, which may differ from that of `indices`.
    """
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
    """Integrate prompts to sigma 0, lazily; arguments as of `draw`.

    Yields:
        (indices, latents fp32 [n, ...]). Up to `rollout.rows` prompts of one shape are integrated
        together, and at most `rollout.decode_batch` of them are yielded together.
    """
    r, sampler, steps = model.config.rollout, model.eval_sampler(), model.eval_steps(num_steps)
    for part in _portions(model, prompts, indices, r.rows):
        noise = fixed_noise(part, sampler.latent_shape, model.policy.device, seed)
        latents = sampler.integrate(noise, model.embeddings.get([prompts[i] for i in part]), steps)
        for start in range(0, len(part), r.decode_batch):
            yield part[start : start + r.decode_batch], latents[start : start + r.decode_batch]


def _portions(
    model: Opened, prompts: list[Example], indices: list[int], rows: int
) -> Iterator[list[int]]:
    """The indices that are integrated together: of one shape, at most `rows`."""
    # A batch has one shape: prompts with condition images of several sizes differ in their tokens.
    for places in by_shape(model.embeddings.shapes([prompts[i] for i in indices])):
        for first in range(0, len(places), rows):
            yield [indices[n] for n in places[first : first + rows]]


def evaluate(
    pool: RewardPool, specs: list[RewardSpec], prompts: list[Example], drawn, keep: int
) -> Scored:
    """Score images while others are still being drawn.

    Args:
        pool: the reward workers.
        specs: the rewards.
        prompts: all prompts, to which the indices of `drawn` refer.
        drawn: what `draw` yields.
        keep: images of the first `keep` prompts are kept as files.

    Returns:
        The evaluation, in the order of the prompts.
    """
    kept: dict[int, MediaFile] = {}
    indices, tickets, finite, looks = [], [], [], []
    for part, images, made in drawn:
        chosen = [prompts[i] for i in part]
        # submit returns at once: the workers score this part while the next one is drawn.
        tickets.append(
            pool.submit(
                images, [p.text for p in chosen], [p.for_rewards for p in chosen], finite=made
            )
        )
        indices += part
        finite.append(made)
        looks.append(drift.look(images, made))
        # Encoded at once: the arrays of a part are freed when the next one is drawn.
        kept |= {i: encoded(image) for i, image in zip(part, images, strict=True) if i < keep}
    scores = pool.gather(tickets)
    combined = [combine(score, specs) for score in scores]
    details = {}
    for spec in specs:
        texts = [score[spec.name].details for score in scores]
        # A part whose images are all broken was not scored and has no texts; others may have.
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
    # Prompts of several shapes are drawn shape by shape; `merge` sorts.
    return scored if indices == sorted(indices) else merge([scored])


def merge(parts: list[Scored]) -> Scored:
    """The evaluations of several ranks as one, in the order of the prompts."""
    # By index: the ranks took the prompts in turns, and drew them shape by shape.
    order = np.argsort(np.concatenate([p.indices for p in parts]))

    def join(arrays):
        return np.concatenate(arrays)[order]

    def by_name(of):
        return {name: join([of(p)[name] for p in parts]) for name in parts[0].parts}

    details = {}
    for name in parts[0].details:
        known = any(p.details[name] is not None for p in parts)
        # dtype=object: an array of str would be as wide as its longest text.
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
    """The metrics of an evaluation, as in a row of metrics.jsonl.

    Args:
        scored: the evaluation, of n prompts.
        base: rewards [n] before training, for the gain; None leaves it out.
        base_looks: statistics of the n images before training, for the drift; None leaves it out.
        neighbors: eval.precision_recall; None leaves precision and recall out.
    """
    total = scored.mean()
    found = {
        "eval/reward": total.value,
        "eval/reward/stderr": total.stderr,
        "eval/scored": total.scored,
        "eval/failed": total.failed,
    }
    # Left out where 0, so that only reports of runs with broken images have a chart of them.
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
    """Write the kept images or videos, and samples.json, which describes them.

    Args:
        folder: new or empty.
        scored: the evaluation.
        prompts: all prompts. A prompt's condition images are written beside its image, joined in a
            row of the image's height.
        facts: entries of samples.json on the whole set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for n, index in enumerate(scored.indices):
        if index not in scored.files:  # beyond eval.keep_samples
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
                # The report marks wrong letters against this word where the prompt has no quotes.
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
    """Write a prompt's condition images as one file; returns the entries for it in the sample's
    item: the file's name, and the source of each image. {} without condition images."""
    if not prompt.images:
        return {}
    name = encoded(collage.row(collage.conditions(prompt, height))).write(
        folder, Path(file).stem + CONDITION
    )
    # Images of a data set are arrays and have no path; their digest names them.
    came = [
        digest if isinstance(image, np.ndarray) else str(image)
        for image, digest in zip(prompt.images, prompt.image_digests)
    ]
    return {"condition": name, "images": came}


def replace_samples(run_dir: Path, scored: Scored, prompts: list[Example], facts: dict) -> Path:
    """Write the sample set of facts["iteration"] into a run's samples/, whole or not at all; an
    existing one, of the same iteration before a resume, is replaced. Returns its folder."""
    folder = run_dir / "samples" / f"{facts['iteration']:06d}"
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)  # left by a process that was killed
    try:
        write_samples(draft, scored, prompts, facts)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder


def _number(value) -> float | None:
    # Six digits are enough for people, and keep samples.json short; NaN is no JSON.
    return round(float(value), 6) if np.isfinite(value) else None
