"""Draws a tiny editing dataset, to try a config of an editing model: six drawn scenes, and
instructions that change one thing in each.

`python recipes/edits.py` rewrites the shipped folder engine/tempflow/assets/prompts/edits: a PNG
file for each scene, `train.jsonl` with the instructions for four scenes, and `test.jsonl` with
those for the two others. It is not a benchmark: train on your own images.
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent.parent / "engine/tempflow/assets/prompts/edits"
SUPERSAMPLE = 4
SKY, GRASS, SEA, TABLE, WALL = (
    (178, 216, 240),
    (122, 172, 92),
    (58, 116, 168),
    (150, 108, 72),
    (236, 226, 206),
)

# The image's name, its size, its background (a color above a horizon, and another below), and its
# shapes, in units of its height.
SCENES = {
    "house": (
        (256, 256),
        (SKY, 0.7, GRASS),
        [
            ("rectangle", [(0.25, 0.45), (0.75, 0.8)], (222, 200, 160)),
            ("polygon", [(0.2, 0.45), (0.5, 0.2), (0.8, 0.45)], (168, 62, 48)),
            ("rectangle", [(0.45, 0.6), (0.57, 0.8)], (96, 64, 44)),
        ],
    ),
    "boat": (
        (320, 192),
        (SKY, 0.6, SEA),
        [
            ("polygon", [(0.5, 0.62), (1.2, 0.62), (1.05, 0.8), (0.65, 0.8)], (190, 60, 50)),
            ("polygon", [(0.85, 0.12), (0.85, 0.58), (1.2, 0.58)], (250, 250, 244)),
            ("rectangle", [(0.82, 0.1), (0.85, 0.62)], (90, 66, 46)),
        ],
    ),
    "tree": (
        (192, 256),
        (SKY, 0.75, GRASS),
        [
            ("rectangle", [(0.33, 0.5), (0.42, 0.85)], (110, 76, 50)),
            ("ellipse", [(0.12, 0.12), (0.63, 0.6)], (60, 132, 60)),
        ],
    ),
    "balloon": (
        (256, 256),
        (SKY, 0.85, GRASS),
        [
            ("ellipse", [(0.3, 0.1), (0.7, 0.55)], (214, 72, 92)),
            ("polygon", [(0.36, 0.46), (0.64, 0.46), (0.56, 0.66), (0.44, 0.66)], (244, 214, 96)),
            ("rectangle", [(0.44, 0.66), (0.56, 0.75)], (130, 90, 58)),
        ],
    ),
    "cup": (
        (256, 256),
        (WALL, 0.65, TABLE),
        [
            ("ellipse", [(0.58, 0.42), (0.8, 0.68)], (66, 120, 190)),
            ("ellipse", [(0.63, 0.48), (0.74, 0.62)], WALL),
            ("rectangle", [(0.3, 0.35), (0.66, 0.78)], (66, 120, 190)),
        ],
    ),
    "car": (
        (320, 192),
        (SKY, 0.7, (120, 120, 124)),
        [
            ("polygon", [(0.5, 0.5), (0.65, 0.28), (1.05, 0.28), (1.2, 0.5)], (150, 190, 210)),
            ("rectangle", [(0.3, 0.5), (1.4, 0.75)], (236, 180, 50)),
            ("ellipse", [(0.42, 0.65), (0.64, 0.87)], (30, 30, 34)),
            ("ellipse", [(1.06, 0.65), (1.28, 0.87)], (30, 30, 34)),
        ],
    ),
}
HELDOUT = ("cup", "car")
PARTS = {
    "house": "roof",
    "boat": "sail",
    "tree": "crown",
    "balloon": "basket",
    "cup": "handle",
    "car": "wheels",
}
INSTRUCTIONS = (
    "make it night",
    "turn it into a watercolor painting",
    "paint the {thing} green",
    "put snow on the {thing}",
    "make the {part} purple",
    "add a second {thing} beside it",
)


def draw(name: str) -> Image.Image:
    """The image of a scene, in at most 64 colors."""
    (width, height), (above, horizon, below), shapes = SCENES[name]
    large = height * SUPERSAMPLE
    canvas = Image.new("RGB", (width * SUPERSAMPLE, large), above)
    pen = ImageDraw.Draw(canvas)
    pen.rectangle([(0, horizon * large), canvas.size], fill=below)
    for kind, corners, color in shapes:
        getattr(pen, kind)([(x * large, y * large) for x, y in corners], fill=color)
    return canvas.resize((width, height), Image.Resampling.LANCZOS).quantize(64).convert("RGB")


def lines(split: str) -> list[dict]:
    """The lines of train.jsonl or test.jsonl."""
    names = [name for name in SCENES if (name in HELDOUT) is (split == "test")]
    return [
        {"prompt": text.format(thing=name, part=PARTS[name]), "image": f"{name}.png"}
        for text in INSTRUCTIONS
        for name in names
    ]


def write(folder: Path = FOLDER) -> None:
    """Write the folder: the images, train.jsonl and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SCENES:
        draw(name).save(folder / f"{name}.png", optimize=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines(split))
        )


if __name__ == "__main__":
    write()
    print(f"{FOLDER}: {len(SCENES)} images, {len(lines('train'))} and {len(lines('test'))} prompts")
