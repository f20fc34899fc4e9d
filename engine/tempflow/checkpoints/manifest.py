"""Whether a checkpoint is whole: sizes and checksums in a manifest that is written last.

Checkpoints are large: when one is written, every rank reads a share of it back; when one is
checked, several threads do.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tempflow.run.logs import write_atomic
from tempflow.training import distributed

MANIFEST = "manifest.json"
# files at a time: disks and their networks serve several faster, and hashing one takes one core
READERS = 8


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def seal(draft: Path) -> None:
    """Flush every file of a finished checkpoint to the disk and list it in the manifest (a
    collective, after all have written).

    Rank 0 says which files there are. The largest are dealt first, each rank takes as many, and
    none is listed before it is read.
    """
    names: list[str] = []
    if distributed.rank() == 0:
        found = [file for file in draft.rglob("*") if file.is_file()]
        names = [
            str(file.relative_to(draft))
            for file in sorted(found, key=lambda file: (-file.stat().st_size, file))
        ]
    share = distributed.agree_on(names)[distributed.rank() :: distributed.world_size()]
    shares = distributed.gather_objects({name: _flushed(draft / name) for name in share})
    if shares is not None:
        files = {name: seen for share in shares for name, seen in share.items()}
        write_atomic(draft / MANIFEST, json.dumps(files, indent=1, sort_keys=True))


def _flushed(file: Path) -> dict:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": file.stat().st_size, "sha256": _digest(file)}


def problem_with(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    manifest = checkpoint / MANIFEST
    try:
        files = [
            (name, seen["bytes"], seen["sha256"])
            for name, seen in json.loads(manifest.read_text()).items()
        ]
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
            changed = [
                name for (name, _, digest), now in zip(files, read, strict=True) if now != digest
            ]
    except OSError as error:
        return f"{checkpoint} cannot be read: {error}"
    return f"{checkpoint / changed[0]} does not match its checksum" if changed else None
