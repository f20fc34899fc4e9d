"""Tells whether a checkpoint is whole, by the sizes and checksums in a manifest that is written
last.

Checkpoints are large. When one is written, every rank reads a share of it back; when one is
checked, several threads read it.
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
# Files read at a time: network disks serve several faster than one, and each is hashed by one core.
READERS = 8


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):  # 4 MB: files larger than memory can be checked
            digest.update(block)
    return digest.hexdigest()


def seal(draft: Path) -> None:
    """Flush every file of a finished checkpoint to the disk and list it in the manifest.

    A collective, to be called after all ranks have written. The files are dealt to the ranks, the
    largest first; each is read back before it is listed.
    """
    # Rank 0 alone lists the folder, so that all ranks deal from one list, also on a network disk
    # whose listings lag behind.
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
        # Last: a checkpoint without a manifest is not whole, whatever else is in its folder.
        write_atomic(draft / MANIFEST, json.dumps(files, indent=1, sort_keys=True))


def _flushed(file: Path) -> dict:
    # fsync before the manifest is written, or a power failure could leave a manifest of files whose
    # contents never reached the disk.
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": file.stat().st_size, "sha256": _digest(file)}


def problem_with(checkpoint: Path) -> str | None:
    """The reason why a checkpoint cannot be used, or None if it is whole."""
    manifest = checkpoint / MANIFEST
    try:
        files = [
            (name, seen["bytes"], seen["sha256"])
            for name, seen in json.loads(manifest.read_text()).items()
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        files = []
    # An empty manifest would make everything below pass.
    if not files:
        return f"{manifest} is missing or damaged"
    # Sizes of all files before any checksum: that finds most damage without reading gigabytes.
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
