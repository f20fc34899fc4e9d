"""Copies of a run's metrics and images for TensorBoard and W&B.

They are by-products: a failure after the start is reported once, and the run goes on. Events are
written synchronously. TensorBoard's own writer uses a thread, which prints a traceback when the
disk is full and never writes again. Nothing here imports torch, tensorboard or wandb before a run
asks for them.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import time
import uuid
from pathlib import Path
from types import ModuleType

from tempflow.errors import UserError
from tempflow.run.byproducts import ByProducts
from tempflow.run.logs import AppendFile, plain_row, write_atomic

GRID_COLUMNS, GRID_IMAGES, GRID_SIDE = 8, 32, 256  # the last in pixels
GRID_FRAMES = 4  # of a video, side by side


class Trackers:
    """Copies of metrics and sample images to TensorBoard and to W&B; with neither, every call does
    nothing.

    Args:
        run_dir: the run directory; events go to its tensorboard/ folder.
        tensorboard: write TensorBoard events.
        wandb: None, or keyword arguments of wandb.init ({"project": "..."}). The run's name, folder
            and config are filled in, and a resumed run continues its W&B run.
        byproducts: reports what fails later.

    Raises:
        UserError: where a package is missing or W&B cannot start.
    """

    def __init__(
        self,
        run_dir,
        tensorboard: bool = False,
        wandb: dict | None = None,
        byproducts: ByProducts | None = None,
    ):
        self._try = (byproducts or ByProducts()).attempt
        self._wandb = Wandb(Path(run_dir), wandb) if wandb is not None else None
        self._board = Board(Path(run_dir) / "tensorboard") if tensorboard else None
        self._all = {"logging.tensorboard": self._board, "logging.wandb": self._wandb}

    def begin(self, after: int) -> None:
        """Hide what an earlier attempt wrote after the iteration `after`; -1: everything."""
        if self._board:
            self._try("logging.tensorboard", self._board.begin, after + 1)

    def log(self, metrics: dict) -> None:
        """Write the finite numbers of one row of metrics.jsonl."""
        step = int(metrics["iteration"])
        scalars = {
            key: value
            for key, value in plain_row(metrics).items()
            if _is_number(value) and key != "iteration"
        }
        self._each("log", scalars, step)

    def samples(self, folder) -> None:
        """Write one sample set (a folder with samples.json and its images) as a grid, with the
        prompts as its caption."""
        if not (self._board or self._wandb):
            return
        info = json.loads((Path(folder) / "samples.json").read_text(encoding="utf-8"))
        items = info["items"][:GRID_IMAGES]
        if not items:
            return
        # Only if all have one: pairs of condition image and result would get out of step otherwise.
        keys = ("condition", "file") if all("condition" in item for item in items) else ("file",)
        grid = image_grid([Path(folder) / item[key] for item in items for key in keys])
        caption = "\n".join(f"{n + 1}. {item['prompt']}" for n, item in enumerate(items))
        self._each("samples", grid, caption, info["iteration"])

    def close(self) -> None:
        self._each("close")

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _each(self, method: str, *arguments) -> None:
        for name, tracker in self._all.items():
            if tracker:
                self._try(name, getattr(tracker, method), *arguments)


class Board:
    """A TensorBoard event file. It is made with its first event, so that a start that fails leaves
    no empty file."""

    def __init__(self, folder: Path):
        self._summary = _load(
            "torch.utils.tensorboard.summary", "logging.tensorboard", "tensorboard"
        )
        self._events = _load(
            "tensorboard.compat.proto.event_pb2", "logging.tensorboard", "tensorboard"
        )
        self._framed = _load(
            "tensorboard.summary.writer.record_writer", "logging.tensorboard", "tensorboard"
        ).RecordWriter(self)
        self._path = (
            folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        )
        self._file: AppendFile | None = None

    def begin(self, purge_step: int) -> None:
        """Start the file. TensorBoard does not show events of older files from `purge_step` on."""
        self._add(purge_step, file_version="brain.Event:2")
        self._add(
            purge_step, session_log=self._events.SessionLog(status=self._events.SessionLog.START)
        )

    def log(self, scalars: dict, step: int) -> None:
        for key, value in scalars.items():
            self._add(step, summary=self._summary.scalar(key, value))

    def samples(self, grid, caption: str, step: int) -> None:
        import numpy

        self._add(
            step, summary=self._summary.image("samples", numpy.asarray(grid), dataformats="HWC")
        )
        # Two spaces before the line break: TensorBoard shows texts as Markdown.
        self._add(
            step, summary=self._summary.text("samples/prompts", caption.replace("\n", "  \n"))
        )

    def write(self, record: bytes) -> None:
        """Called by the RecordWriter, for which this object is the file, with a whole record."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = AppendFile(self._path)
        self._file.append(record)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _add(self, step: int, **content) -> None:
        self._framed.write(
            self._events.Event(wall_time=time.time(), step=step, **content).SerializeToString()
        )


class Wandb:
    """A W&B run; the one that the run directory names is continued."""

    def __init__(self, run_dir: Path, options: dict):
        self._module = _load("wandb", "logging.wandb", "wandb")
        config_file = run_dir / "config.json"
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
        defaults = {
            "name": run_dir.name,
            "dir": str(run_dir),
            "config": config,
            "resume": "allow",
            "id": _wandb_id(run_dir),
        }
        # `options` of the user win over the defaults.
        try:
            self._run = self._module.init(**{**defaults, **options})
            # A resumed run logs some iterations again. W&B drops steps that go back, so the
            # iteration is logged as a metric, and the charts use it as their x axis.
            self._run.define_metric("iteration")
            self._run.define_metric("*", step_metric="iteration")
        # Of any type: no login, no network, an argument that wandb.init does not take.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500].rstrip(".: ")
            advice = "log in with `wandb login`, set WANDB_MODE=offline, or set it null"
            raise UserError(
                f"logging.wandb: wandb.init failed: {reason}. Its keys are arguments of wandb.init;"
                f" {advice}"
            ) from None

    def log(self, scalars: dict, step: int) -> None:
        self._run.log({"iteration": step, **scalars})

    def samples(self, grid, caption: str, step: int) -> None:
        self._run.log({"iteration": step, "samples": self._module.Image(grid, caption=caption)})

    def close(self) -> None:
        self._run.finish()


def _wandb_id(run_dir: Path) -> str:
    path = run_dir / "wandb_id.txt"
    # Kept in the run directory, so that a resume continues the same W&B run.
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()


def image_grid(paths: list, columns: int = GRID_COLUMNS, side: int = GRID_SIDE):
    """One PIL image with the images of `paths` in rows.

    Args:
        paths: of images, or of videos, of which some frames are shown side by side.
        columns: images in a row; fewer where videos take several places each.
        side: largest height and width of an image, in pixels.
    """
    from PIL import Image

    from tempflow.run.files import strip_of_file

    strips = [strip_of_file(path, side, GRID_FRAMES) for path in paths]
    images, columns = (
        [strip for strip, _ in strips],
        max(1, columns // max(frames for _, frames in strips)),
    )
    width, height = (2 + max(getattr(p, axis) for p in images) for axis in ("width", "height"))
    columns = min(columns, len(images))
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for n, image in enumerate(images):
        grid.paste(image, (n % columns * width, n // columns * height))
    return grid


def _load(module: str, key: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = (
            f"{key} is set, but {module} cannot be imported ({error}): pip install {package}, or"
            f" unset {key}"
        )
        raise UserError(message) from error


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
