"""Draws README's image of samples before and after training, from an evaluation of both:

    python engine/evaluate.py --run runs/tiny_ocr --compare --count 256 --out final \\
        --prompts engine/tempflow/assets/prompts/words_final.txt
    python docs/make_picture.py --samples final --out docs/images/before_after.png

It shows the first prompts of the file, not selected ones. Both images of a pair start from the same
noise; below each is what the OCR reward read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from tempflow.rewards.quotes import quoted_text

SCALE, PAD, CAPTION, PER_ROW = 2, 12, 20, 3  # factor, pixels, pixels, pairs


def read_samples(folder: Path) -> list[tuple[str, Image.Image, str]]:
    """(target word, image, what was read) of each sample of an evaluation."""
    items = json.loads((folder / "samples.json").read_text())["items"]
    return [
        (quoted_text(i["prompt"]), Image.open(folder / i["file"]), i["details"].get("ocr", ""))
        for i in items
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--samples", type=Path, required=True, help="folder with base/ and tuned/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=18)
    args = parser.parse_args()
    pairs = list(zip(read_samples(args.samples / "base"), read_samples(args.samples / "tuned")))[
        : args.count
    ]
    width, height = (side * SCALE for side in pairs[0][0][1].size)
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 13)
    cell = 2 * width + 3 * PAD, height + CAPTION + PAD
    rows = -(-len(pairs) // PER_ROW)
    sheet = Image.new("RGB", (PER_ROW * cell[0], rows * cell[1] + CAPTION + PAD), "white")
    draw = ImageDraw.Draw(sheet)
    for column in range(PER_ROW):
        for side, label in enumerate(("before", "after")):
            draw.text(
                (column * cell[0] + PAD + side * (width + PAD), PAD // 2), label, "#555", font
            )
    for n, pair in enumerate(pairs):
        for side, (target, picture, reading) in enumerate(pair):
            x = n % PER_ROW * cell[0] + PAD + side * (width + PAD)
            y = n // PER_ROW * cell[1] + CAPTION + PAD
            sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (x, y))
            right = reading.replace(" ", "").lower() == target.lower()
            draw.text(
                (x, y + height + 2),
                f"{target}: read {reading or '-'}",
                "#1a7f37" if right else "#b35900",
                font,
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out)


if __name__ == "__main__":
    main()
