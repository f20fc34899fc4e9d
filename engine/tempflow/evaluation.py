"""Held-out evaluation: ODE pictures of fixed prompts from fixed noise, scored, with the first ones kept.

The noise of a prompt depends on the evaluation seed and the prompt's place in the file alone, so base and tuned pictures,
runs and numbers of ranks compare like with like.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tempflow.logs import write_atomic
from tempflow.policy import Policy
from tempflow.policy.embeddings import EmbeddingCache
from tempflow.prompts import Prompt
from tempflow.rewards import RewardPool, RewardSpec, combine
from tempflow.rollout.noise import INITIAL, key_tensor, noise_key
from tempflow_kernels import normal

EVAL_SEED = 0
EVAL_ITERATION = -1  # no training iteration has this number, so evaluation noise is never trained on


@dataclass(frozen=True)
class Scored:
    """Prompts by index, the weighted reward [n], each reward alone, and its readings; pictures, uint8 [H, W, 3], of some of them."""

    indices: list[int]
    pictures: dict[int, np.ndarray]
    reward: np.ndarray
    parts: dict[str, np.ndarray]
    details: dict[str, list[str] | None]


def fixed_noise(indices: list[int], shape: tuple[int, ...], device, seed: int = EVAL_SEED) -> torch.Tensor:
    """Initial latents of evaluation prompts by their place in the file, fp32 [n, *shape]."""
    keys = key_tensor([noise_key(seed, EVAL_ITERATION, i, 0, INITIAL, 0) for i in indices], device)
    return normal(keys, torch.Size(shape).numel()).reshape(len(indices), *shape)


def draw(
    policy: Policy, embeddings: EmbeddingCache, prompts: list[Prompt], indices: list[int], *,
    height: int, width: int, num_steps: int, guidance_scale: float, micro_batch: int, decode_batch: int, seed: int = EVAL_SEED,
    advance=lambda n: None,
):  # fmt: skip
    """Yield (indices, uint8 pictures) of the prompts at `indices`: `micro_batch` are integrated together, and at most
    `decode_batch` of them decoded and yielded together."""
    shape = policy.latent_shape(height, width)
    for first in range(0, len(indices), micro_batch):
        part = indices[first : first + micro_batch]
        conditioning = embeddings.get([prompts[i].text for i in part], [prompts[i].negative for i in part])
        latents = policy.integrate(fixed_noise(part, shape, policy.device, seed), conditioning, height=height, width=width,
                                   num_steps=num_steps, guidance_scale=guidance_scale)  # fmt: skip
        for start in range(0, len(part), decode_batch):
            some = slice(start, start + decode_batch)
            yield part[some], policy.decode(latents[some], height, width)
            advance(len(part[some]))


def evaluate(pool: RewardPool, specs: list[RewardSpec], prompts: list[Prompt], drawn, keep: int) -> Scored:
    """Score what `draw` yields while it goes on drawing; pictures of the first `keep` prompts are kept."""
    indices, pictures, tickets = [], {}, []
    for part, images in drawn:
        chosen = [prompts[i] for i in part]
        tickets.append(pool.submit(images, [p.text for p in chosen], [p.metadata for p in chosen]))
        indices += part
        pictures |= {i: image for i, image in zip(part, images, strict=True) if i < keep}
    scores = pool.gather(tickets)
    combined = [combine(score, specs) for score in scores]
    details = {}
    for spec in specs:
        texts = [score[spec.name].details for score in scores]
        details[spec.name] = None if any(t is None for t in texts) else [text for t in texts for text in t]
    return Scored(
        indices, pictures, np.concatenate([c.values for c in combined]),
        {spec.name: np.concatenate([c.parts[spec.name] for c in combined]) for spec in specs}, details,
    )  # fmt: skip


def merge(parts: list[Scored]) -> Scored:
    """The evaluations of several ranks as one, in the order of the prompts."""
    order = np.argsort(np.concatenate([p.indices for p in parts]))

    def join(arrays):
        return np.concatenate(arrays)[order]

    details = {}
    for name in parts[0].details:
        whole = all(p.details[name] is not None for p in parts)
        details[name] = list(join([np.array(p.details[name], dtype=object) for p in parts])) if whole else None
    return Scored(
        np.concatenate([p.indices for p in parts])[order].tolist(), {i: picture for p in parts for i, picture in p.pictures.items()},
        join([p.reward for p in parts]), {n: join([p.parts[n] for p in parts]) for n in parts[0].parts}, details,
    )  # fmt: skip


def write_samples(folder: Path, scored: Scored, prompts: list[Prompt], facts: dict) -> None:
    """Write the pictures and samples.json with `facts` into `folder`, all or nothing."""
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    items = []
    for n, index in enumerate(scored.indices):
        if index not in scored.pictures:
            continue
        file = f"{n:04d}.png"
        Image.fromarray(scored.pictures[index]).save(draft / file)
        items.append({
            "prompt": prompts[index].text, "file": file, "reward": _number(scored.reward[n]),
            "rewards": {name: _number(values[n]) for name, values in scored.parts.items()},
            "details": {name: texts[n] for name, texts in scored.details.items() if texts is not None},
            **{key: prompts[index].metadata[key] for key in ("ocr_target",) if key in prompts[index].metadata},
        })  # fmt: skip
    content = {**facts, "reward": _number(np.nanmean(scored.reward)), "items": items}
    write_atomic(draft / "samples.json", json.dumps(content, indent=1, ensure_ascii=False))
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def _number(value) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
