"""What a run writes down as it goes: metrics.jsonl, TensorBoard events, a W&B run.

metrics.jsonl is the record: one JSON object per iteration, on disk before the next iteration starts, and strict
JSON (NaN and infinity become null). The trackers are copies of it for people who have such a server open. Nothing
here imports torch, tensorboard or wandb before a run asks for them.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import uuid
import warnings
from pathlib import Path

from tempflow.errors import UserError, shown

METRICS_FILE = "metrics.jsonl"
GRID_COLUMNS, GRID_PICTURES, GRID_SIDE = 8, 32, 256


class MetricsLog:
    """The metrics file of one run, open for appending.

    A last line that a crash cut short is removed on opening, so that the next row starts a line of its own.
    """

    def __init__(self, run_dir):
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._mend_last_line()
        self._file = open(self.path, "a", encoding="utf-8")

    def append(self, metrics: dict) -> None:
        """Write one row and wait until it is on the disk; values are numbers, 0-d arrays or tensors, strings or None."""
        self._file.write(_line(metrics))
        self._file.flush()
        os.fsync(self._file.fileno())

    def truncate_after(self, iteration: int) -> None:
        """Drop the rows past `iteration`, at which a resumed run takes up again; all or nothing."""
        rows = [row for row in read_metrics(self.path.parent) if row.get("iteration", 0) <= iteration]
        self._file.close()
        write_atomic(self.path, "".join(map(_line, rows)))
        self._file = open(self.path, "a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _mend_last_line(self) -> None:
        if not self.path.exists():
            return
        whole, newline, last = self.path.read_bytes().rpartition(b"\n")
        if not last:
            return
        # A strict prefix of a one-line JSON object is never JSON: what parses is whole and lacks only its newline.
        keep = last + b"\n" if _parse(last) is not None else b""
        write_atomic(self.path, whole + newline + keep)


def read_metrics(run_dir) -> list[dict]:
    """The rows of a run's metrics.jsonl, [] where there is none yet.

    A half-written last line, which a crash leaves, is left out with a warning that names it; a bad line
    anywhere else is a UserError.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    last = max((n for n, line in enumerate(lines) if line.strip()), default=-1)
    rows = []
    for number, line in enumerate(lines[: last + 1]):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number == last:
            warnings.warn(f"{path}, line {number + 1}: half-written last line left out: {shown(line)}", stacklevel=2)
        else:
            raise UserError(f"{path}, line {number + 1} is not a JSON object: {shown(line)}")
    return rows


class Trackers:
    """Copies of metrics and sample pictures to TensorBoard and to W&B; with neither, every call does nothing.

    run_dir      the run directory; events go to its tensorboard/ folder
    tensorboard  write TensorBoard events
    wandb        None, or keyword arguments of wandb.init ({"project": "..."}); the run's name, folder and config
                 are filled in, and a resumed run continues its W&B run
    resume_after the last iteration kept on resume: later TensorBoard events of the earlier attempt are hidden
    """

    def __init__(self, run_dir, tensorboard: bool = False, wandb: dict | None = None, resume_after: int | None = None):
        self.run_dir = Path(run_dir)
        self._board = self._open_tensorboard(resume_after) if tensorboard else None
        self._wandb = self._open_wandb(wandb) if wandb is not None else None

    def log(self, metrics: dict) -> None:
        """Write the finite numbers of one row of metrics.jsonl."""
        step = int(metrics["iteration"])
        scalars = {key: value for key, value in _plain_row(metrics).items() if _is_number(value) and key != "iteration"}
        if self._board:
            for key, value in scalars.items():
                self._board.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log({"iteration": step, **scalars})

    def samples(self, folder) -> None:
        """Write one sample set (a folder with samples.json and its pictures) as a grid, prompts as its caption."""
        if not (self._board or self._wandb):
            return
        info = json.loads((Path(folder) / "samples.json").read_text(encoding="utf-8"))
        items = info["items"][:GRID_PICTURES]
        if not items:
            return
        grid = picture_grid([Path(folder) / item["file"] for item in items])
        caption = "\n".join(f"{n + 1}. {item['prompt']}" for n, item in enumerate(items))
        if self._board:
            self._board_grid(grid, caption, info["iteration"])
        if self._wandb:
            image = importlib.import_module("wandb").Image(grid, caption=caption)
            self._wandb.log({"iteration": info["iteration"], "samples": image})

    def close(self) -> None:
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _board_grid(self, grid, caption: str, step: int) -> None:
        import numpy

        self._board.add_image("samples", numpy.asarray(grid), step, dataformats="HWC")
        self._board.add_text("samples/prompts", caption.replace("\n", "  \n"), step)
        self._board.flush()

    def _open_tensorboard(self, resume_after: int | None):
        module = _load("torch.utils.tensorboard", "logging.tensorboard", "tensorboard")
        purge = None if resume_after is None else resume_after + 1
        return module.SummaryWriter(log_dir=str(self.run_dir / "tensorboard"), purge_step=purge, flush_secs=10)

    def _open_wandb(self, options: dict):
        module = _load("wandb", "logging.wandb", "wandb")
        config_file = self.run_dir / "config.json"
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
        defaults = {"name": self.run_dir.name, "dir": str(self.run_dir), "config": config, "resume": "allow"}
        run = module.init(**{**defaults, "id": self._wandb_id(), **options})
        # A resumed run logs some iterations again; W&B refuses a step that goes back, not a metric that does.
        run.define_metric("iteration")
        run.define_metric("*", step_metric="iteration")
        return run

    def _wandb_id(self) -> str:
        path = self.run_dir / "wandb_id.txt"
        if not path.exists():
            write_atomic(path, uuid.uuid4().hex[:12])
        return path.read_text(encoding="utf-8").strip()


def picture_grid(paths: list, columns: int = GRID_COLUMNS, side: int = GRID_SIDE):
    """One PIL image with the pictures of `paths` in rows, each at most `side` pixels a side."""
    from PIL import Image

    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
            picture.thumbnail((side, side), Image.Resampling.LANCZOS)
            pictures.append(picture)
    width, height = (2 + max(getattr(p, axis) for p in pictures) for axis in ("width", "height"))
    columns = min(columns, len(pictures))
    grid = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for n, picture in enumerate(pictures):
        grid.paste(picture, (n % columns * width, n // columns * height))
    return grid


def write_atomic(path, content: str | bytes) -> Path:
    """Replace a file by `content` so that a crash leaves either the old one or the new one, whole."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(scratch, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
    return path


def _load(module: str, key: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"{key} is set, but {module} cannot be imported ({error}): pip install {package}, or unset {key}"
        raise UserError(message) from error


def _line(metrics: dict) -> str:
    return json.dumps(_plain_row(metrics), allow_nan=False, ensure_ascii=False) + "\n"


def _plain_row(metrics: dict) -> dict:
    return {str(key): _plain(value) for key, value in metrics.items()}


def _plain(value):
    if hasattr(value, "item"):  # numpy scalar or 0-d tensor
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parse(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:  # covers bad UTF-8 as well
        return None
    return row if isinstance(row, dict) else None
