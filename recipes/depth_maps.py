"""Draws a tiny dataset of depth maps, to try a config of FLUX.1 Depth: six scenes of spheres and
boxes, with prompts for each.

`python recipes/depth_maps.py` rewrites the shipped folder engine/tempflow/assets/prompts/depths: a
PNG file for each scene, in which near is bright; `train.jsonl` with the prompts of four scenes; and
`test.jsonl` with those of the two others. It is not a benchmark: train on depth maps of your own
images, such as those of Depth Anything.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent.parent / "engine/tempflow/assets/prompts/depths"
SIDE = 256
NEAR, FAR = 2.0, 9.0  # distances from the camera, which is at height 1
# Spheres (x, y, z, radius) and boxes (lowest corner, highest corner); x to the right, y up from the
# camera, z into the image.
SCENES = {
    "ball": [(0.0, -0.3, 4.0, 0.7)],
    "three": [(-1.2, -0.5, 4.5, 0.5), (0.1, -0.2, 5.5, 0.8), (1.1, -0.65, 3.5, 0.35)],
    "table": [
        ((-1.2, -0.3, 3.4), (1.2, -0.15, 4.8)),
        ((-1.1, -1.0, 3.5), (-0.95, -0.3, 3.65)),
        ((0.95, -1.0, 3.5), (1.1, -0.3, 3.65)),
    ],
    "towers": [
        ((-2.2, -1.0, 5.0), (-1.2, 1.6, 6.0)),
        ((-0.6, -1.0, 6.5), (0.4, 2.2, 7.5)),
        ((1.2, -1.0, 4.5), (2.0, 0.8, 5.5)),
    ],
    "steps": [
        ((-1.5, -1.0, 3.5), (1.5, -0.7, 6.5)),
        ((-1.5, -0.7, 4.5), (1.5, -0.4, 6.5)),
        ((-1.5, -0.4, 5.5), (1.5, -0.1, 6.5)),
    ],
    "gate": [
        ((-1.4, -1.0, 4.5), (-0.9, 1.2, 5.2)),
        ((0.9, -1.0, 4.5), (1.4, 1.2, 5.2)),
        ((-1.4, 1.2, 4.5), (1.4, 1.6, 5.2)),
    ],
}
HELDOUT = ("steps", "gate")
PROMPTS = {
    "ball": ("a glass ball on a wooden floor", "a snowball in the snow at dusk"),
    "three": ("three oranges on a kitchen counter", "three planets above a desert"),
    "table": ("a breakfast table in the garden", "an empty desk in a concrete room"),
    "towers": ("a city of skyscrapers in the fog", "three book stacks in a library"),
    "steps": ("stone steps overgrown with moss", "a wedding cake on a table"),
    "gate": ("a red torii gate by a lake", "the ruins of a temple in the jungle"),
}


def draw(scene: str) -> Image.Image:
    """The depth map of a scene in RGB with one gray level per pixel: 255 at the distance NEAR or
    less, 0 at FAR, where there is a wall."""
    across, up = np.meshgrid(*[(np.arange(SIDE) + 0.5) / SIDE * 1.1 - 0.55] * 2)
    up = -up  # rays (across, up, 1): their length along z is the depth
    depth = np.minimum(FAR, np.where(up < 0, -1 / np.minimum(up, -1e-9), FAR))
    for shape in SCENES[scene]:
        depth = np.minimum(
            depth, _sphere(across, up, *shape) if len(shape) == 4 else _box(across, up, *shape)
        )
    # depth models return the inverse of the depth
    levels = np.clip((1 / depth - 1 / FAR) / (1 / NEAR - 1 / FAR), 0, 1)
    return Image.fromarray((255 * levels).round().astype(np.uint8)).convert("RGB")


def _sphere(across, up, x, y, z, radius):
    a, b = across**2 + up**2 + 1, across * x + up * y + z
    inside = b**2 - a * (x**2 + y**2 + z**2 - radius**2)
    return np.where(inside > 0, (b - np.sqrt(np.maximum(inside, 0))) / a, np.inf)


def _box(across, up, low, high):
    hits = [
        np.sort(np.stack([low[i] / ray, high[i] / ray]), axis=0)
        for i, ray in enumerate((across, up, np.ones_like(up)))
    ]
    enter, leave = (
        combine([hit[side] for hit in hits], axis=0) for side, combine in ((0, np.max), (1, np.min))
    )
    return np.where(enter < leave, enter, np.inf)


def lines(split: str) -> list[dict]:
    """The lines of a split's file, "train" or "test"."""
    scenes = [scene for scene in SCENES if (scene in HELDOUT) == (split == "test")]
    return [
        {"prompt": prompt, "image": f"{scene}.png"} for scene in scenes for prompt in PROMPTS[scene]
    ]


def write(folder: Path = FOLDER) -> None:
    """Write the folder: the depth maps, train.jsonl and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for scene in SCENES:
        draw(scene).save(folder / f"{scene}.png", optimize=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines(split)), encoding="utf-8"
        )


if __name__ == "__main__":
    write()
    print(f"{FOLDER}: {len(SCENES)} maps, {len(lines('train'))} and {len(lines('test'))} prompts")
