"""Embeddings of texts on disk: a safetensors file per text, found by what the embedding depends on.

A file is replaced as a whole and carries a checksum, so it is either right or known to be damaged. Nothing here encodes: who
builds a store has the text encoders (`trainer.opening`), who reads it needs none.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tempflow.errors import RankError
from tempflow.models.base import Conditioning
from tempflow.run.logs import write_atomic

FORMAT = 1  # of the files; another number finds none of the old ones


class EmbeddingStore:
    """A folder of embeddings. kind: what they depend on besides the text (JSON values): encoders, dtype, length."""

    def __init__(self, folder: str | Path, kind: dict):
        self.folder, self._kind = Path(folder), kind

    def path(self, text: str) -> Path:
        key = json.dumps([FORMAT, self._kind, text], sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def fault(self, text: str) -> str | None:
        """What is wrong with a text's file, read whole: None where nothing is, "missing", or how it is damaged."""
        try:
            self._read(text)
        except FileNotFoundError:
            return "missing"
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            return f"damaged: {error}"
        return None

    def read(self, text: str) -> Conditioning:
        """The embeddings of one text, [...] each, on the CPU. RankError where they are missing or damaged."""
        try:
            return self._read(text)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise RankError(
                f"data.embedding_cache: {self.path(text)} was whole when the run began and cannot be read now: {error}; "
                "start again, with --resume, and it is made anew"
            ) from None

    def write(self, text: str, embeddings: Conditioning) -> int:
        """Write one text's embeddings, [...] each; returns the size in bytes."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in embeddings.items()}
        content = save(tensors, metadata={"text": text, "crc32": str(_checksum(tensors))})
        file = self.path(text)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, content)
        return len(content)

    def _read(self, text: str) -> Conditioning:
        with safe_open(self.path(text), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            noted = file.metadata()
        if noted is None or noted["text"] != text or int(noted["crc32"]) != _checksum(tensors):
            raise ValueError("its checksum is wrong")
        return tensors


def _checksum(tensors: Conditioning) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), value))
    return value


def folder_hash(folders: list[Path]) -> str:
    """SHA-256 over the names and contents of all files of some folders."""
    whole = hashlib.sha256()
    for folder in sorted(folders):
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            whole.update(f"{folder.name}/{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as content:
                while block := content.read(1 << 24):
                    whole.update(block)
    return whole.hexdigest()
