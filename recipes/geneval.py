"""GenEval's object check (arXiv 2310.11513) as a reward: whether an image has the objects, counts,
colors and positions that its prompt asks for.

Its name in a config is `geneval:GenEval`, with this folder as the working directory or on
PYTHONPATH; docs/rewards.md shows how to serve it to a training run. Mask2Former finds the objects
and CLIP tells their colors, both through transformers, while GenEval itself runs mmdet. Thresholds
and rules are GenEval's, but the detector's code is not, so take numbers for publication from
GenEval's own evaluation. What a prompt asks for is in its metadata, in the benchmark's format
(`include`, `exclude`, `tag`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Callable

import numpy as np

from tempflow.errors import UserError
from tempflow.rewards import Reward, Scores
from tempflow.rewards.base import locate

# COCO's classes in their order, under the names that GenEval's prompts use.
CLASSES = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,
cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,
baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,
broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,
computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"""
CLASSES = CLASSES.replace("\n", "").split(",")
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
PLACES = ["left of", "right of", "above", "below"]
TEMPLATES = [
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
]

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MOST_OBJECTS = 16  # of a class
SLACK = 0.1  # share of both objects' sizes by which their centers must differ to count as apart
QUERIES_KEPT = 100
GREY = 0x99  # what surrounds an object whose color is asked about


@dataclass(frozen=True)
class Found:
    """An object: its box (left, top, right, bottom) in pixels, its mask [H, W], and the detector's
    score."""

    box: np.ndarray
    mask: np.ndarray
    score: float


class GenEval(Reward):
    """The share of what a prompt's metadata asks for that the image shows. It is 1 exactly if
    GenEval calls the image correct, and NaN if the metadata is not in GenEval's format.

    Args:
        strict: score 1 or 0 instead of the share.
        detector: a folder or hub repository with a Mask2Former.
        clip: a folder or hub repository with a CLIP model.
        device: "cuda" or "cpu".
        batch: images per forward.
    """

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        strict: bool = False,
        device: str = "cuda",
        batch: int = 8,
    ):
        self._detector_path, self._clip_path = detector, clip
        self._strict, self._device, self._batch = strict, device, batch

    def check_prompts(self, prompts, metadata):
        for prompt, entry in zip(prompts, metadata):
            try:
                check_metadata(entry)
            except ValueError as error:
                raise UserError(
                    f"{locate(prompt, entry)} is no prompt of GenEval: {error}"
                ) from None

    def load(self, threads=1):
        import torch
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        from tempflow.rewards.neural.clip import ClipEncoder
        from tempflow.rewards.neural.weights import fetch

        self._processor = AutoImageProcessor.from_pretrained(self._detector_path)
        detector = Mask2FormerForUniversalSegmentation.from_pretrained(
            self._detector_path, use_safetensors=True
        )
        if detector.config.num_labels != len(CLASSES):
            raise UserError(
                f"detector: {self._detector_path} knows {detector.config.num_labels} classes, not"
                f" COCO's {len(CLASSES)}"
            )
        self._detector = detector.to(self._device).eval()
        self._clip = ClipEncoder(
            "clip", fetch("clip", self._clip_path), torch.float32, self._device
        )
        self._colour_texts = cache(self._embed_colours)

    def score(self, images, prompts, metadata):
        values, details = [], []
        for start in range(0, len(images), self._batch):
            part = slice(start, start + self._batch)
            for image, found, entry in zip(
                images[part], self.detect(images[part], metadata[part]), metadata[part]
            ):
                try:
                    check_metadata(entry)
                except ValueError as error:
                    values.append(np.nan)
                    details.append(f"not scored: {error}")
                    continue
                value, faults = judge(
                    found,
                    entry,
                    lambda name, objects, image=image: self.colours(image, name, objects),
                )
                values.append(float(not faults) if self._strict else value)
                details.append("; ".join(faults) or "all as asked")
        return Scores(np.array(values, dtype=np.float32), details)

    def detect(self, images: np.ndarray, metadata: list[dict]) -> list[dict[str, list[Found]]]:
        """The objects of each image (uint8 [n, H, W, 3]) by class, highest score first, computed
        like Mask2Former's instance inference."""
        import torch

        pixels = self._processor(
            list(images), return_tensors="pt", input_data_format="channels_last"
        )["pixel_values"]
        with torch.inference_mode():
            out = self._detector(pixel_values=pixels.to(self._device))
        results = []
        for logits, masks, entry in zip(
            out.class_queries_logits, out.masks_queries_logits, metadata
        ):
            threshold = COUNTING_THRESHOLD if entry.get("tag") == "counting" else THRESHOLD
            scores = logits.float().softmax(-1)[:, :-1]
            best, places = scores.flatten().topk(min(QUERIES_KEPT, scores.numel()))
            # the mask only lowers the score
            best, places = (best[best > threshold], places[best > threshold])
            masks = torch.nn.functional.interpolate(
                masks[places // scores.shape[1]][None].float(),
                images.shape[1:3],
                mode="bilinear",
                align_corners=False,
            )[0]
            inside = masks > 0
            best = best * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
            results.append(
                by_class(
                    best.cpu().numpy(),
                    (places % scores.shape[1]).cpu().numpy(),
                    inside.cpu().numpy(),
                    threshold,
                )
            )
        return results

    def colours(self, image: np.ndarray, name: str, objects: list[Found]) -> list[str]:
        """The color of each object according to CLIP, judged by its box with everything but the
        object gray."""
        import torch

        crops = []
        for found in objects:
            left, top, right, bottom = found.box.astype(int)
            crops.append(
                np.where(found.mask[..., None], image, np.uint8(GREY))[top:bottom, left:right]
            )
        with torch.inference_mode():
            best = (
                (self._clip.embed_images(self._clip.pixels(crops)) @ self._colour_texts(name).T)
                .argmax(1)
                .tolist()
            )
        return [COLOURS[i] for i in best]

    def _embed_colours(self, name: str):
        """The mean embedding of each color's templates, of length 1: fp32 [colors, d]."""
        import torch

        texts = self._clip.embed_texts(
            [t.format(colour=colour, name=name) for colour in COLOURS for t in TEMPLATES]
        )
        return torch.nn.functional.normalize(
            texts.reshape(len(COLOURS), len(TEMPLATES), -1).mean(1), dim=-1
        )


def by_class(
    scores: np.ndarray, labels: np.ndarray, masks: np.ndarray, threshold: float
) -> dict[str, list[Found]]:
    """The objects above the threshold by class, highest score first, at most MOST_OBJECTS of each."""
    objects: dict[str, list[Found]] = {}
    for i in np.argsort(-scores, kind="stable"):
        kept = objects.setdefault(CLASSES[labels[i]], [])
        if scores[i] > threshold and masks[i].any() and len(kept) < MOST_OBJECTS:
            rows, columns = np.flatnonzero(masks[i].any(1)), np.flatnonzero(masks[i].any(0))
            kept.append(
                Found(
                    np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float),
                    masks[i],
                    float(scores[i]),
                )
            )
    return {name: found for name, found in objects.items() if found}


def judge(
    objects: dict[str, list[Found]],
    metadata: dict,
    colours_of: Callable[[str, list[Found]], list[str]],
) -> tuple[float, list[str]]:
    """Score one image against its metadata.

    The requirements count equally. An `include` asks for a number of objects (too few count in
    part), their color (in part) and their position; an `exclude` asks for fewer objects than a
    number. Of each class, only the objects with the highest scores are considered, as many as the
    prompt asks for.

    Returns:
        The share of the requirements that are met, in [0, 1], and the others in words.
    """
    marks, faults, groups = [], [], []

    def mark(value: float, fault: str) -> bool:
        marks.append(value)
        if value < 1:
            faults.append(fault)
        return value == 1

    for wanted in metadata["include"]:
        name, count = wanted["class"], wanted["count"]
        found = objects.get(name, [])[:count]
        good = mark(len(found) / count, f"{len(found)} of {count} {name}")
        if "color" in wanted:
            right = colours_of(name, found).count(wanted["color"]) if found else 0
            good &= mark(right / count, f"{right} of {count} {wanted['color']} {name}")
        if "position" in wanted:
            place, group = wanted["position"]
            targets = groups[group]
            there = (
                good
                and targets is not None
                and all(place in places(a, b) for a in found for b in targets)
            )
            good &= mark(float(there), f"{name} not {place} {metadata['include'][group]['class']}")
        groups.append(found if good else None)
    for unwanted in metadata.get("exclude", ()):
        seen = len(objects.get(unwanted["class"], ()))
        mark(
            float(seen < unwanted["count"]),
            f"{seen} {unwanted['class']}, fewer than {unwanted['count']} asked",
        )
    return sum(marks) / len(marks), faults


def places(a: Found, b: Found) -> set[str]:
    """The positions of `a` relative to `b`: those of PLACES that agree with the direction between
    the centers, after a share of both sizes is subtracted from their distance."""
    (left_a, top_a, right_a, bottom_a), (left_b, top_b, right_b, bottom_b) = a.box, b.box
    offset = (
        np.array([left_a + right_a - left_b - right_b, top_a + bottom_a - top_b - bottom_b]) / 2
    )
    sizes = np.array([right_a - left_a + right_b - left_b, bottom_a - top_a + bottom_b - top_b])
    apart = np.maximum(np.abs(offset) - SLACK * sizes, 0) * np.sign(offset)
    if (np.abs(apart) < 1e-3).all():
        return set()
    dx, dy = apart / np.linalg.norm(offset)
    return {
        place for place, holds in zip(PLACES, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)) if holds
    }


def check_metadata(entry: dict) -> None:
    """ValueError unless `include` (not empty) and `exclude` have the form of GenEval's
    evaluation_metadata.jsonl."""
    include = entry.get("include")
    if not isinstance(include, list) or not include:
        raise ValueError('its metadata needs "include", as in [{"class": "cat", "count": 2}]')
    for i, wanted in enumerate([*include, *entry.get("exclude", [])]):
        if not isinstance(wanted, dict) or wanted.get("class") not in CLASSES:
            raise ValueError(f"{wanted!r:.80} has no class of COCO's")
        if type(wanted.get("count")) is not int or wanted["count"] < 1:
            raise ValueError(f"{wanted!r:.80} has no count of 1 or more")
        if wanted.get("color", "red") not in COLOURS:
            raise ValueError(f"{wanted!r:.80}: the color must be one of {', '.join(COLOURS)}")
        earlier = range(min(i, len(include)))
        if "position" in wanted and wanted["position"] not in [
            [place, group] for place in PLACES for group in earlier
        ]:
            raise ValueError(
                f'{wanted!r:.80}: expected a position such as ["left of", 0], 0 being an earlier'
                " entry"
            )
