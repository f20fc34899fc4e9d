"""OCR reward: how well an image shows the text that its prompt quotes.

The text is read on the CPU with the models that the rapidocr package ships, and compared with the
prompt's first quoted text (`quotes`), both in a normal form (`normal_form`): `1 - min(edit
distance, len) / len`, as in Flow-GRPO's OCR task. Images that are one line of text are read by the
recognition model alone, in batches and at their natural width; the package's own call pads every
line to width 320, which takes twice as long for short words. The direction of text is not
corrected, because a prompt does not ask for words that are upside down.

The reward also says which places of an image show their letter: `letters`, and `scene_map` for text
anywhere.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import numpy as np

from tempflow.errors import UserError, shown
from tempflow.rewards.base import Reward, Scores, locate
from tempflow.rewards.letters import letter_map
from tempflow.rewards.normal_form import normalize, similarity
from tempflow.rewards.quotes import ACCEPTED, Unreadable, read_quotes
from tempflow.rewards.scene_map import scene_map, spread

RECOGNISER = "PP-OCRv6_rec_small.onnx"
LINE_HEIGHT = 48  # the model's fixed input height

# Milliseconds per image of 48 x 144, median of 7 runs over 96 images on an EPYC with AVX-512, for
# batches of 1, 4, 8, 16, 32: one thread 6.6, 5.8, 5.7, 5.9, 6.2 (large batches do not fit into the
# cache); two threads 4.4, 3.4, 3.1, 3.1, 3.1.
LINE_BATCH = 8

# A text, and where the image shows its target, [h, w]; None for prompts without a target.
Reading = tuple[str, np.ndarray | None]

TARGET = "ocr_target"  # the metadata key that names the text instead of quotation marks
SHOWN = 5  # targets that the message at the start lists


class OcrReward(Reward):
    """How well the image shows the text that its prompt quotes, in [0, 1].

    Args:
        detect: true finds text anywhere in the image and joins it in reading order; text that
            contains the target scores 1. false reads the whole image as one line of text, which is
            right for small images of words, and many times faster.
    """

    makes_maps = True

    def __init__(self, detect: bool = True):
        self._detect = detect
        self._reader: SceneReader | LineReader  # `load` makes it

    def check_prompts(self, prompts, metadata):
        targets, several = [], 0
        for prompt, entry in zip(prompts, metadata):
            try:
                target, others = target_of(prompt, entry)
            except Unreadable as error:
                raise UserError(
                    f"{locate(prompt, entry)} {error}. The 'ocr' reward looks for the first text in"
                    " quotation marks; write, for "
                    f'example: a shop sign that says "OPEN". Marks that count: {ACCEPTED}. In a'
                    " .jsonl file a line may name the "
                    f'text itself: "{TARGET}": "OPEN"'
                ) from None
            targets.append(target)
            several += others
        return _told(list(dict.fromkeys(targets)), several)

    def load(self, threads=1):
        self._reader = SceneReader(threads) if self._detect else LineReader(threads)

    def score(self, images, prompts, metadata):
        values = np.full(len(images), np.nan, dtype=np.float32)
        targets = [_target(*one) for one in zip(prompts, metadata, strict=True)]
        readings, details = self._read(images, targets), []
        for i, (target, reading) in enumerate(zip(targets, readings, strict=True)):
            if isinstance(target, Unreadable):
                details.append(f"not scored: the prompt {target}")
            elif isinstance(reading, Exception):
                details.append(f"not scored: {type(reading).__name__}: {reading}")
            else:
                values[i] = similarity(target, reading[0], contained=self._detect)
                details.append(reading[0])
        return Scores(values, details, maps=_maps(readings))

    def _read(
        self, images: np.ndarray, targets: list[str | Unreadable]
    ) -> list[Reading | Exception]:
        """What each image shows, or the exception that reading it raised. If a batch fails, its
        images are read one by one, so that only the images at fault are marked as failed."""
        results: list[Reading | Exception] = []
        for start in range(0, len(images), self._reader.batch):
            part = slice(start, start + self._reader.batch)
            chunk, wanted = images[part], targets[part]
            try:
                results += self._reader.read(chunk, wanted)
            except Exception as error:
                results += (
                    [error]
                    if len(chunk) == 1
                    else [
                        self._read(chunk[i : i + 1], wanted[i : i + 1])[0]
                        for i in range(len(chunk))
                    ]
                )
        return results


def _target(prompt: str, metadata: dict) -> str | Unreadable:
    try:
        return target_of(prompt, metadata)[0]
    except Unreadable as error:
        return error


def _maps(readings: list[Reading | Exception]) -> np.ndarray | None:
    """The maps of n images, [n, h, w], 0 where there is none; None if none has one."""
    each = [None if isinstance(one, Exception) else one[1] for one in readings]
    known = [one for one in each if one is not None]
    if not known:
        return None
    return np.stack([np.zeros_like(known[0]) if one is None else one for one in each])


def target_of(prompt: str, metadata: dict) -> tuple[str, bool]:
    """The text that a prompt's images should show.

    Args:
        prompt: the prompt.
        metadata: its metadata; an "ocr_target" takes precedence over quotation marks.

    Returns:
        The text, and whether the prompt quotes further texts, which are ignored.

    Raises:
        Unreadable: for a prompt without exactly one reading.
    """
    given = metadata.get(TARGET)
    if given is None:
        return read_quotes(prompt)
    if not isinstance(given, str) or not normalize(given):
        raise Unreadable(f'has {shown(given)} as "{TARGET}", expected a text with letters or signs')
    return given.strip(), False


def _told(targets: list[str], several: int) -> str:
    more = f" and {len(targets) - SHOWN} more" if len(targets) > SHOWN else ""
    first = (
        f"; prompts that quote several texts, of which only the first counts: {several}"
        if several
        else ""
    )
    return f"OCR targets: {', '.join(shown(target, 40) for target in targets[:SHOWN])}{more}{first}"


class LineReader:
    """The recognition model alone, for images that are one line of text.

    Args:
        threads: CPU threads.

    Raises:
        UserError: if the installed rapidocr does not ship the model.
    """

    batch = LINE_BATCH

    def __init__(self, threads: int):
        import cv2
        import onnxruntime

        cv2.setNumThreads(threads)  # OpenCV would use every core for resizing
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only
        # Idle threads must sleep instead of spinning, because the training process needs the cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = _model_file(RECOGNISER)
        self._session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        lines = self._session.get_modelmeta().custom_metadata_map["character"].splitlines()
        # The model's metadata lists its characters without CTC's blank (class 0) and without the
        # space (the last class).
        self._characters = np.array(["", *lines, " "], dtype=object)
        self._classes: dict[str, list[int]] = {}
        for n, character in enumerate(self._characters[1:], 1):
            self._classes.setdefault(normalize(character), []).append(n)
        classes = self._session.get_outputs()[0].shape[-1]
        if len(self._characters) != classes:
            raise RuntimeError(
                f"{model.name} has {classes} classes but lists {len(self._characters)} characters"
            )

    def read(self, images: np.ndarray, targets: list[str | Unreadable]) -> list[Reading]:
        """uint8 RGB [n, H, W, 3] and n targets -> n readings, with one forward for all."""
        (probabilities,) = self._session.run(None, {self._input: self._prepare(images)})
        maps = [self._map(one, target) for one, target in zip(probabilities, targets, strict=True)]
        best = probabilities.argmax(axis=2)  # [n, positions]
        # CTC's decoding drops repeated classes first and blanks after that, so that a blank between
        # two equal letters keeps both. A repeat becomes a blank here, whose text is empty.
        best[:, 1:][best[:, 1:] == best[:, :-1]] = 0
        return [("".join(self._characters[row]), one) for row, one in zip(best, maps)]

    def _map(self, probabilities: np.ndarray, target: str | Unreadable) -> np.ndarray | None:
        """Where an image shows its target, [1, positions], from probabilities [positions,
        classes]."""
        if isinstance(target, Unreadable):
            return None
        text = normalize(target)
        # Characters that count as equal: a letter's case does not matter.
        letters = [probabilities[:, self._classes.get(c, [])].sum(1) for c in text]
        return letter_map(probabilities[:, 0], np.stack(letters, 1), text)[None]

    @staticmethod
    def _prepare(images: np.ndarray) -> np.ndarray:
        """uint8 RGB [n, H, W, 3] -> float32 BGR [n, 3, 48, 48 W / H] in [-1, 1]."""
        import cv2

        height, width = images.shape[1:3]
        size = (max(1, math.ceil(LINE_HEIGHT * width / height)), LINE_HEIGHT)
        resized = np.stack([cv2.resize(image, size) for image in images])
        # PaddleOCR's models take BGR.
        return (
            np.ascontiguousarray(resized[..., ::-1].transpose(0, 3, 1, 2), dtype=np.float32) / 127.5
            - 1.0
        )


class SceneReader:
    """Detection and recognition through the rapidocr package, for text anywhere in an image."""

    batch = 1  # the package reads one image per call

    def __init__(self, threads: int):
        import cv2
        from rapidocr import RapidOCR

        cv2.setNumThreads(threads)
        self._engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,  # the model that turns text that is upside down
                # The package drops readings below a confidence. They are kept here: text that is
                # hard to read must still score more than no text.
                "Global.text_score": 0.0,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )
        # The package loads each model at its first use, which would count as the first batch's
        # time: recognition in the first call below, detection in the second.
        blank = np.full((64, 64, 3), 255, dtype=np.uint8)
        self._engine(blank, use_det=False)
        self._engine(blank, use_det=True)

    def read(self, images: np.ndarray, targets: list[str | Unreadable]) -> list[Reading]:
        """uint8 RGB [n, H, W, 3] -> n texts, the lines of each joined by spaces; "" for an image
        without text."""
        return [self._read_one(*one) for one in zip(images, targets, strict=True)]

    def _read_one(self, image: np.ndarray, target: str | Unreadable) -> Reading:
        found = self._engine(np.ascontiguousarray(image[..., ::-1]))
        # Without boxes nothing was detected.
        lines = [] if found.boxes is None else reading_order(np.asarray(found.boxes))
        text = " ".join(found.txts[i] for i in lines)
        if isinstance(target, Unreadable):
            return text, None
        letters = [letter for i in lines for letter in spread(found.txts[i], found.boxes[i])]
        return text, scene_map(target, letters, *image.shape[:2])


def reading_order(boxes: np.ndarray) -> list[int]:
    """The reading order of text boxes: lines from top to bottom, boxes of a line from left to
    right.

    A box belongs to the line before it if its center is less than half a box height below that of
    the line's first box.

    Args:
        boxes: [n, 4 corners, 2 (x, y)] in pixels.

    Returns:
        The n indices in order.
    """
    top, bottom = boxes[..., 1].min(axis=1), boxes[..., 1].max(axis=1)
    centre, left = (top + bottom) / 2, boxes[..., 0].min(axis=1)
    lines: list[list[int]] = []
    for i in np.argsort(centre, kind="stable").tolist():
        first = lines[-1][0] if lines else None
        if first is not None and centre[i] - centre[first] < (bottom[first] - top[first]) / 2:
            lines[-1].append(i)
        else:
            lines.append([i])
    return [i for line in lines for i in sorted(line, key=lambda i: left[i])]


def _model_file(name: str) -> Path:
    package = find_spec("rapidocr")  # finds the folder without importing the package
    if package is None:
        raise UserError("needs the package rapidocr: pip install 'rapidocr==3.10.*' onnxruntime")
    # The package is installed, so it has an origin.
    path = Path(cast(str, package.origin)).parent / "models" / name
    if not path.exists():
        found = ", ".join(sorted(file.name for file in path.parent.glob("*.onnx"))) or "no models"
        raise UserError(f"needs {name}, which rapidocr 3.10 ships; {path.parent} holds {found}")
    return path
