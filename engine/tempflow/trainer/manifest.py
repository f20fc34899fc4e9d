"""Which checkpoints of a run are whole: sizes and checksums in a manifest that is written last."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from tempflow.logs import read_metrics, write_atomic

MANIFEST = "manifest.json"


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
    """Flush every file of a finished checkpoint to the disk and list it in the manifest."""
    files = {}
    for file in sorted(p for p in draft.rglob("*") if p.is_file()):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
        files[str(file.relative_to(draft))] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
    write_atomic(draft / MANIFEST, json.dumps(files, indent=1))


def fault(checkpoint: Path) -> str | None:
    """What makes a checkpoint unusable, or None."""
    manifest = checkpoint / MANIFEST
    try:
        files = [(name, seen["bytes"], seen["sha256"]) for name, seen in json.loads(manifest.read_text()).items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        files = []
    if not files:
        return f"{manifest} is missing or damaged"
    for name, size, digest in files:
        file = checkpoint / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes, not {size}"
        if _digest(file) != digest:
            return f"{file} does not match its checksum"
    return None


def best(run_dir: Path) -> Path | None:
    """Of the checkpoints whose iteration was evaluated, the one with the highest held-out reward; None without any."""
    seen = {row["iteration"]: row["eval/reward"] for row in read_metrics(run_dir) if row.get("eval/reward") is not None}
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
