"""Drift: how far images are from those that the base made from the same prompts and noise.

Three properties are compared, none of which needs a model: the color of what an image shows, how
much these colors vary from prompt to prompt, and how different the images are from each other (see
`diversity`). A reward that does not depend on one of them does not protect it, so training may
change it freely while the reward rises. A change of meaning is not detected here; a watched reward
can do that.

The base's images come from the evaluation before training. Their statistics, `Looks`, are stored in
the checkpoints: to draw the images again, a resumed run would need the weights from before
training, and another machine would not produce the same bits.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from tempflow.errors import UserError
from tempflow.media import some_frames
from tempflow.run.diversity import FRAMES, distances, precision_and_recall, thumbnails
from tempflow.run.files import CONDITION, SUFFIXES, frames_of_file

# A pixel is ink where a channel is more than APART gray levels, a quarter of the range, from the
# background.
APART = 64
FEWEST = 0.0025  # smallest share of ink; an image with less has its INK_OF counted as ink instead
INK_OF = 0.05  # share of the pixels that are farthest from the background
LARGEST = 512  # pixels a side; larger images are subsampled, since their mean color needs no more
PLAIN = 0.9  # share of the border that is near one color where an image has a plain background


@dataclass(frozen=True)
class Looks:
    """The statistics of n images or videos from which drift is computed. A missing image has NaN in
    `ink` and `whole`."""

    ink: np.ndarray
    """fp32 [n, 3], in levels 0 to 255: mean color of the ink, the pixels that are not background.
    The background is the median color of the image's border, by channel; a pixel that is farther
    than APART from it in any channel is ink. Where less than FEWEST of an image is ink, the share
    INK_OF of its pixels that is farthest from the background is used."""
    whole: np.ndarray
    """fp32 [n, 3], in levels 0 to 255: mean color of all pixels."""
    plain: np.ndarray
    """bool [n]: whether the border is background, at least PLAIN of it."""
    thumbnails: np.ndarray
    """uint8 [n, D], as of `diversity.thumbnails`, in levels."""

    def __len__(self) -> int:
        return len(self.ink)

    @property
    def there(self) -> np.ndarray:
        """bool [n]: which images are not missing."""
        return np.isfinite(self.whole).all(1)

    def pick(self, places) -> Looks:
        """The statistics of some images. places: an index array, a mask or a slice."""
        return Looks(*(getattr(self, field.name)[places] for field in fields(self)))

    def colors(self, of_ink: bool) -> np.ndarray:
        """float64 [n, 3]: mean colors of the ink, or of the whole images."""
        # fp32 is kept, for small checkpoints; differences of means are taken in fp64.
        return (self.ink if of_ink else self.whole).astype(np.float64)

    def pack(self) -> str:
        """Text (base64) from which `unpack` makes the same arrays; a checkpoint's state is JSON."""
        file = io.BytesIO()
        np.savez_compressed(
            file, **{field.name: getattr(self, field.name) for field in fields(self)}
        )
        return base64.b64encode(file.getvalue()).decode()

    @classmethod
    def unpack(cls, text: str) -> Looks:
        # No pickle: a checkpoint from somebody else must not be able to run code.
        with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as arrays:
            return cls(*(arrays[field.name] for field in fields(cls)))


def look(media: np.ndarray, finite: np.ndarray | None = None) -> Looks:
    """The statistics of images or videos; of a video, a few frames are used.

    Args:
        media: uint8 [n, H, W, 3] or [n, F, H, W, 3].
        finite: bool [n], False for a missing image; None: none is missing.
    """
    seen = [_colors(frames) for frames in some_frames(media, FRAMES)]
    ink, whole = (np.array([one[n] for one in seen], dtype=np.float32) for n in (0, 1))
    if finite is not None:
        ink[~finite], whole[~finite] = np.nan, np.nan
    # Whole gray levels: a quarter of the bytes in a checkpoint, and `distances` is exact for them.
    small = np.rint(thumbnails(media) * 255).astype(np.uint8)
    return Looks(ink, whole, np.array([one[2] for one in seen]), small)


def join(parts: list[Looks]) -> Looks:
    """Concatenate statistics in their order."""
    return Looks(
        *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Looks))
    )


def metrics(base: Looks, now: Looks, neighbors: int | None = None) -> dict[str, float]:
    """How far images are from the base's, over the prompts that have both; what cannot be said is
    left out.

    Colors are those of the ink where most of the base's images have a plain background, as words on
    paper do, and of whole images elsewhere: a photo's border says nothing of what it shows.

    Args:
        base: of n prompts' images before training.
        now: of the same n prompts' images, from the same noise.
        neighbors: of a ball's radius in precision and recall, which are left out without it, or
            without more prompts than that.

    Returns "drift/color_shift" (Euclidean distance of the two mean colors, in levels),
    "drift/color_spread" (root mean square distance of the colors from their mean, over the base's),
    "drift/diversity" (mean distance of two prompts' thumbnails, over the base's), and where asked
    for "eval/precision" and "eval/recall".
    """
    # Pairs only: an image that failed once must not count as a change of the others' mean.
    both = base.there & now.there
    base, now = base.pick(both), now.pick(both)
    if not len(base):
        return {}
    # Decided by the base alone, so that the measure stays the same when the backgrounds change.
    of_ink = bool(base.plain.mean() > 0.5)
    before, after = base.colors(of_ink), now.colors(of_ink)
    found = {
        "drift/color_shift": float(np.linalg.norm(after.mean(0) - before.mean(0))),
        "drift/color_spread": _ratio(_spread(after), _spread(before)),
        "drift/diversity": _ratio(
            *(float(distances(one.thumbnails, one.thumbnails).sum()) for one in (now, base))
        ),
    }
    if neighbors and len(base) > neighbors:
        found["eval/precision"], found["eval/recall"] = precision_and_recall(
            base.thumbnails, now.thumbnails, neighbors
        )
    return {key: value for key, value in found.items() if value is not None}


def between_folders(base: Path, now: Path, neighbors: int | None = None) -> dict[str, float]:
    """`metrics` of two folders' PNG or WebP files, paired by name, as two sample sets of a run have
    them. UserError without such a pair."""
    before, after = (_of_folder(Path(folder)) for folder in (base, now))
    common = sorted(before.keys() & after.keys())
    if not common:
        raise UserError(f"{base} and {now} hold no PNG or WebP files of the same names")
    if len({images[name].shape for images in (before, after) for name in common}) > 1:
        raise UserError(f"{base} and {now} hold images of different sizes")
    base_looks, looks = (
        look(np.stack([images[name] for name in common])) for images in (before, after)
    )
    return metrics(base_looks, looks, neighbors)


def _of_folder(folder: Path) -> dict[str, np.ndarray]:
    """The images of a folder by name, uint8 [H, W, 3], and of its videos FRAMES frames, [FRAMES, H,
    W, 3]; no condition images."""
    files = [
        file
        for suffix in SUFFIXES
        for file in folder.glob(f"*{suffix}")
        if not file.stem.endswith(CONDITION)  # these are inputs, equal in both folders
    ]
    return {file.name: _of_file(file) for file in files}


def _of_file(file: Path) -> np.ndarray:
    frames = frames_of_file(file)
    if file.suffix == ".png":
        return np.asarray(frames[0])
    # Always FRAMES of them, so that shapes agree; a shorter video gives some frames twice.
    places = np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
    return np.stack([np.asarray(frames[place]) for place in places])


def _colors(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """(ink, whole, plain) of one image's or video's frames, uint8 [f, H, W, 3]; see `Looks`."""
    # 0.07 s for an image of 1024 x 1024 instead of 0.2 s.
    stride = -(-max(frames.shape[1:3]) // LARGEST)
    pixels = frames[:, ::stride, ::stride].astype(np.float32)
    sides = pixels[:, [0, -1]], pixels[:, :, [0, -1]]
    border = np.concatenate([side.reshape(-1, 3) for side in sides])
    # The median: text or an object that touches the border does not change it.
    background = np.median(border, axis=0)
    apart = np.abs(pixels - background).max(-1)
    ink = apart > APART
    if ink.mean() < FEWEST:
        # A pale or empty image has a color too: it must not become NaN, which means missing.
        ink = apart >= np.quantile(apart, 1 - INK_OF)
    plain = (np.abs(border - background).max(-1) <= APART).mean() >= PLAIN
    return (
        pixels[ink].mean(0, dtype=np.float64),
        pixels.reshape(-1, 3).mean(0, dtype=np.float64),
        bool(plain),
    )


def _spread(colors: np.ndarray) -> float:
    return float(np.sqrt(((colors - colors.mean(0)) ** 2).sum(1).mean()))


def _ratio(now: float, base: float) -> float | None:
    return now / base if base > 0 else None
