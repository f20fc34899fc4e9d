"""The data of the small model: images of short words, the prompts that name them, and the word
lists.

The images are rendered with DejaVu Sans Bold as matplotlib ships it, so that no font file is in
this repository. Everything is drawn from one `numpy.random.Generator`: the same generator state
gives the same image.

`python recipes/words.py` rewrites the shipped prompt files:

    words_train.txt: 4000 words to train on
    words_heldout.txt: 512 words for evaluations during runs, and for everything that is chosen by
        them
    words_final.txt: 256 words for the final number of a comparison; nothing is chosen by them

No word is in two of the files.
"""

from __future__ import annotations

import colorsys
import string
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEIGHT, WIDTH = 32, 96
LETTERS = 3, 5  # shortest and longest word
SUPERSAMPLE = 2
TRAIN, HELDOUT, FINAL = 4000, 512, 256  # words in each prompt file
# Held-out words that were drawn before those of training. The others were added later, after
# them, so that the first ones did not change.
FIRST_HELDOUT = 128
PROMPTS = Path(__file__).parent.parent / "engine/tempflow/assets/prompts"


def prompt_of(word: str) -> str:
    """A word's prompt, in the only form on which the small model is trained."""
    return f'the word "{word}"'


def random_word(rng: np.random.Generator) -> str:
    """A word of 3 to 5 random capitals."""
    length = rng.integers(LETTERS[0], LETTERS[1] + 1)
    return "".join(rng.choice(list(string.ascii_uppercase), length))


def distinct_words(
    count: int, rng: np.random.Generator, exclude: frozenset[str] = frozenset()
) -> list[str]:
    """`count` different words, none of them in `exclude`, in the order drawn."""
    words: dict[str, None] = {}
    while len(words) < count:
        word = random_word(rng)
        if word not in exclude:
            words[word] = None
    return list(words)


def word_lists(seed: int = 0) -> dict[str, list[str]]:
    """The words of the files train, heldout and final, all different."""
    rng = np.random.default_rng(seed)
    heldout = distinct_words(FIRST_HELDOUT, rng)
    train = distinct_words(TRAIN, rng, frozenset(heldout))
    heldout += distinct_words(HELDOUT - FIRST_HELDOUT, rng, frozenset(heldout + train))
    final = distinct_words(FINAL, rng, frozenset(heldout + train))
    return {"train": train, "heldout": heldout, "final": final}


def write_prompts(folder: Path = PROMPTS, seed: int = 0) -> dict[str, list[str]]:
    """Write words_train.txt, words_heldout.txt and words_final.txt, with a prompt on each line.
    Returns the words."""
    lists = word_lists(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in lists.items():
        (folder / f"words_{name}.txt").write_text("".join(prompt_of(word) + "\n" for word in words))
    return lists


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(
        Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf", size
    )


def _fitting_size(word: str, scale: float) -> int:
    """The font size (on the supersampled canvas) at which the word takes a share `scale` of the
    available room."""
    left, top, right, bottom = _font(100).getbbox(word)
    room = min((WIDTH - 6) / (right - left), (HEIGHT - 8) / (bottom - top))
    return max(8, int(100 * room * scale * SUPERSAMPLE))


def _colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A dark ink (gray or colored) and a light paper."""
    hue, saturation = rng.random(), 0.0 if rng.random() < 0.4 else rng.uniform(0.6, 1.0)
    ink = colorsys.hsv_to_rgb(
        hue, saturation, rng.uniform(0.1, 0.3) if saturation == 0 else rng.uniform(0.35, 0.65)
    )
    paper = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.08), rng.uniform(0.94, 1.0))
    return tuple(int(255 * c) for c in ink), tuple(int(255 * c) for c in paper)


def render(word: str, rng: np.random.Generator) -> np.ndarray:
    """An image of `word`, uint8 [32, 96, 3], with random size, position and colors."""
    font = _font(_fitting_size(word, min(1.0, rng.uniform(0.88, 1.05))))
    ink, paper = _colours(rng)
    canvas = Image.new("RGB", (WIDTH * SUPERSAMPLE, HEIGHT * SUPERSAMPLE), paper)
    left, top, right, bottom = font.getbbox(word)
    slack = np.array([canvas.width - (right - left), canvas.height - (bottom - top)]) / 2
    shift = slack * rng.uniform(-0.2, 0.2, 2)
    x, y = slack + shift - (left, top)
    ImageDraw.Draw(canvas).text((x, y), word, font=font, fill=ink)
    return np.asarray(canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))


if __name__ == "__main__":
    for name, words in write_prompts().items():
        print(f"{PROMPTS / f'words_{name}.txt'}: {len(words)} words")
