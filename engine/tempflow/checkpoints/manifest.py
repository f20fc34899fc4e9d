"""Which checkpoints of a run are whole: sizes and checksums in a manifest that is written last.

Checkpoints are large: when one is written, every rank reads a share of it back; when one is checked, several threads do.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tempflow.run.logs import read_metrics, write_atomic
from tempflow.training import distributed

MANIFEST = "manifest.json"
READERS = 8  # files at a time: disks and their networks serve several faster, and hashing one takes one core


def folder(run_dir: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies, or would."""
    return run_dir / "checkpoints" / f"{iteration:06d}"


def folders(run_dir: Path) -> list[Path]:
    """Every checkpoint folder of a run, oldest first, whole or not."""
    parent = run_dir / "checkpoints"
    return sorted(p for p in parent.iterdir() if p.is_dir() and p.name.isdigit()) if parent.is_dir() else []


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def seal(draft: Path) -> None:
    """Flush every file of a finished checkpoint to the disk and list it in the manifest (a collective, after all have written).

    Rank 0 says which files there are. The largest are dealt first, each rank takes as many, and none is listed before it is read.
    """
    names = None
    if distributed.rank() == 0:
        found = [file for file in draft.rglob("*") if file.is_file()]
        names = [str(file.relative_to(draft)) for file in sorted(found, key=lambda file: (-file.stat().st_size, file))]
    share = distributed.agree_on(names)[distributed.rank() :: distributed.world_size()]
    shares = distributed.gather_objects({name: _flushed(draft / name) for name in share})
    if shares is not None:
        files = {name: seen for share in shares for name, seen in share.items()}
        write_atomic(draft / MANIFEST, json.dumps(files, indent=1, sort_keys=True))


def _flushed(file: Path) -> dict:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": file.stat().st_size, "sha256": _digest(file)}


def fault(checkpoint: Path) -> str | None:
    """What makes a checkpoint unusable, or None."""
    manifest = checkpoint / MANIFEST
    try:
        files = [(name, seen["bytes"], seen["sha256"]) for name, seen in json.loads(manifest.read_text()).items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        files = []
    if not files:
        return f"{manifest} is missing or damaged"
    for name, size, _ in files:
        file = checkpoint / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes, not {size}"
    try:
        with ThreadPoolExecutor(READERS) as readers:
            read = readers.map(_digest, [checkpoint / name for name, _, _ in files])
            changed = [name for (name, _, digest), now in zip(files, read, strict=True) if now != digest]
    except OSError as error:
        return f"{checkpoint} cannot be read: {error}"
    return f"{checkpoint / changed[0]} does not match its checksum" if changed else None


def best(run_dir: Path, metric: str) -> Path | None:
    """Of the checkpoints whose iteration was evaluated, the one with the highest `metric`, the first of equals; None without any.

    An evaluation in which an image was not finite is passed over: its mean is over the prompts that the weights did not fail at.
    """
    rows = (row for row in read_metrics(run_dir) if "eval/reward" in row and row.get(metric) is not None and not row.get("eval/not_finite"))
    seen = {row["iteration"]: row[metric] for row in rows}
    evaluated = [checkpoint for checkpoint in folders(run_dir) if int(checkpoint.name) in seen]
    return max(evaluated, key=lambda checkpoint: seen[int(checkpoint.name)], default=None)


def newest(run_dir: Path, note=lambda text: None) -> Path | None:
    """The newest whole checkpoint; broken ones are named through `note` and passed over."""
    for checkpoint in reversed(folders(run_dir)):
        trouble = fault(checkpoint)
        if trouble is None:
            return checkpoint
        note(f"checkpoint {checkpoint.name} is passed over: {trouble}")
    return None
