"""OCR reward: does the image show the text that its prompt quotes?

The text is read with RapidOCR's shipped models on the CPU and compared with the prompt's first
quoted text (`quotes`), both in one normal form (`normal_form`): `1 - min(edit distance, len) /
len`, as in Flow-GRPO's OCR task. Images that are one line of text are read by the recogniser alone,
in batches at their natural width; the package's own call pads every line to width 320, which is
twice slower for short words. Text direction is not corrected: words upside down are not what the
prompt asked for.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tempflow.errors import UserError, shown
from tempflow.rewards.base import Reward, Scores, locate
from tempflow.rewards.normal_form import normalize, similarity
from tempflow.rewards.quotes import ACCEPTED, Unreadable, read_quotes

RECOGNISER = "PP-OCRv6_rec_small.onnx"
LINE_HEIGHT = 48  # the recogniser's fixed input height

# ms an image at 48 x 144, median of 7 runs over 96 images on an EPYC with AVX-512, batch 1, 4, 8,
# 16, 32: one thread 6.6, 5.8, 5.7, 5.9, 6.2 (larger batches leave the cache); two threads 4.4, 3.4,
# 3.1, 3.1, 3.1.
LINE_BATCH = 8

TARGET = "ocr_target"  # the metadata that names a prompt's text, where its quotation marks do not
SHOWN = 5  # targets named at the start


class OcrReward(Reward):
    """Reward in [0, 1] for showing the quoted text.

    detect: True finds text anywhere in the image and joins it in reading order; a target contained
    in what was read counts as an exact match. False takes the image as one line of text, compared
    as a whole; right for small images of words, and many times faster.
    """

    def __init__(self, detect: bool = True):
        self._detect = detect
        self._reader: SceneReader | LineReader = None  # type: ignore[assignment]  # `setup` makes it

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
        details = []
        for i, text in enumerate(self._read(images)):
            if isinstance(text, Exception):
                details.append(f"not scored: {type(text).__name__}: {text}")
                continue
            try:
                values[i] = similarity(
                    target_of(prompts[i], metadata[i])[0], text, contained=self._detect
                )
                details.append(text)
            except Unreadable as error:
                details.append(f"not scored: the prompt {error}")
        return Scores(values, details)

    def _read(self, images: np.ndarray) -> list[str | Exception]:
        """Text of each image; where a batch fails its images are read alone, to blame the right
        one."""
        results: list[str | Exception] = []
        for start in range(0, len(images), self._reader.batch):
            chunk = images[start : start + self._reader.batch]
            try:
                results += self._reader.read(chunk)
            except Exception as error:
                results += (
                    [error]
                    if len(chunk) == 1
                    else [self._read(chunk[i : i + 1])[0] for i in range(len(chunk))]
                )
        return results


def target_of(prompt: str, metadata: dict) -> tuple[str, bool]:
    """(the text that a prompt's images are to show, whether the prompt quotes others after it).
    Raises Unreadable."""
    given = metadata.get(TARGET)
    if given is None:
        return read_quotes(prompt)
    if not isinstance(given, str) or not normalize(given):
        raise Unreadable(f'has {shown(given)} as "{TARGET}", where a text is expected')
    return given.strip(), False


def _told(targets: list[str], several: int) -> str:
    more = f" and {len(targets) - SHOWN} more" if len(targets) > SHOWN else ""
    first = (
        f"; prompts that quote several texts, of which the first counts: {several}"
        if several
        else ""
    )
    return f"OCR targets: {', '.join(shown(target, 40) for target in targets[:SHOWN])}{more}{first}"


class LineReader:
    """The recogniser alone, for images that are one line of text.

    Raises `UserError` where the installed rapidocr does not carry the model.
    """

    batch = LINE_BATCH

    def __init__(self, threads: int):
        import cv2
        import onnxruntime

        cv2.setNumThreads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Idle threads must sleep, not spin: the cores belong to the training process.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = _model_file(RECOGNISER)
        self._session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        lines = self._session.get_modelmeta().custom_metadata_map["character"].splitlines()
        self._characters = np.array(["", *lines, " "], dtype=object)  # index 0 is CTC's blank
        classes = self._session.get_outputs()[0].shape[-1]
        if len(self._characters) != classes:
            raise RuntimeError(
                f"{model.name} has {classes} classes but lists {len(self._characters)} characters"
            )

    def read(self, images: np.ndarray) -> list[str]:
        """images: uint8 RGB [n, H, W, 3] -> n texts; one forward of n."""
        (probabilities,) = self._session.run(None, {self._input: self._prepare(images)})
        best = probabilities.argmax(axis=2)
        # CTC: drop repeats, then blanks (whose text is empty).
        best[:, 1:][best[:, 1:] == best[:, :-1]] = 0
        return ["".join(self._characters[row]) for row in best]

    @staticmethod
    def _prepare(images: np.ndarray) -> np.ndarray:
        """uint8 RGB [n, H, W, 3] -> float32 BGR [n, 3, 48, 48 W / H] in [-1, 1]."""
        import cv2

        height, width = images.shape[1:3]
        size = (max(1, math.ceil(LINE_HEIGHT * width / height)), LINE_HEIGHT)
        resized = np.stack([cv2.resize(image, size) for image in images])
        return (
            np.ascontiguousarray(resized[..., ::-1].transpose(0, 3, 1, 2), dtype=np.float32) / 127.5
            - 1.0
        )


class SceneReader:
    """Detection and recognition through the rapidocr package, for text anywhere in an image."""

    batch = 1

    def __init__(self, threads: int):
        import cv2
        from rapidocr import RapidOCR

        cv2.setNumThreads(threads)
        self._engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,
                # hesitant readings count too: they are where there is something to learn
                "Global.text_score": (0.0),
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )
        # The package loads each model on first use: the recogniser here, then the detector.
        blank = np.full((64, 64, 3), 255, dtype=np.uint8)
        self._engine(blank, use_det=False)
        self._engine(blank, use_det=True)

    def read(self, images: np.ndarray) -> list[str]:
        """images: uint8 RGB [n, H, W, 3] -> n texts, the lines of each joined with blanks; "" where
        there is none."""
        return [self._read_one(image) for image in images]

    def _read_one(self, image: np.ndarray) -> str:
        found = self._engine(np.ascontiguousarray(image[..., ::-1]))
        if found.txts is None or found.boxes is None:
            return ""
        return " ".join(found.txts[i] for i in reading_order(np.asarray(found.boxes)))


def reading_order(boxes: np.ndarray) -> list[int]:
    """Order of text boxes [n, 4 corners, 2 (x, y)]: lines from the top, each from the left.

    A box joins the line above it when its centre lies within half that line's first box's height.
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
    package = find_spec("rapidocr")
    if package is None:
        raise UserError("needs the package rapidocr: pip install 'rapidocr==3.10.*' onnxruntime")
    path = Path(package.origin).parent / "models" / name  # type: ignore[arg-type]  # the package is installed, so it has an origin
    if not path.exists():
        found = ", ".join(sorted(file.name for file in path.parent.glob("*.onnx"))) or "no models"
        raise UserError(f"needs {name}, which rapidocr 3.10 ships; {path.parent} holds {found}")
    return path
