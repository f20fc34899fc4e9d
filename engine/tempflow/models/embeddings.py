"""Embeddings of a run's prompts, on disk and in memory.

The key of an embedding is `Policy.identity`, everything that it depends on; each is computed once.
A negative prompt is embedded as an example of its own, so that prompts share it. With
`data.embedding_cache` the text encoders are loaded only if an embedding is missing, and are freed
before the denoiser and the VAE are loaded, so that they never occupy a device together. Without it
the text encoders stay loaded, and embed a prompt when it is first used.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Callable, cast

import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tempflow.config import Config
from tempflow.errors import RankError, UserError
from tempflow.models import (
    Conditioning,
    Conditions,
    Policy,
    Shape,
    by_shape,
    check_text_length,
    encoder_identity,
    family_of,
    resolve_dtype,
    shape_of,
)
from tempflow.models.guidance import with_negatives
from tempflow.run.logs import write_atomic
from tempflow.training import distributed
from tempflow.transfer import send
from tempflow.types import Example

# Embeddings kept in memory, without and with a store. Reading one from the store again takes
# milliseconds; encoding it again takes a good part of a second.
KEPT, KEPT_OF_STORE = (4096, 256)
# Version of the files. It is part of their names, so files of another version are not found.
FORMAT = 1
Identity = tuple[str, ...]


# ---------------------------------------------------------------------------------------- in memory
class EmbeddingCache:
    """The embeddings of one policy in host memory; those of the current iteration are on the device
    as well.

    Args:
        policy: what the embeddings are for.
        store: holds every embedding that will be asked for. Default: they are computed by the
            policy's text encoders.
        capacity: embeddings kept at most; the least recently used are dropped first. Default:
            `KEPT` or, with a store, `KEPT_OF_STORE`.
    """

    def __init__(
        self, policy: Policy, store: EmbeddingStore | None = None, *, capacity: int | None = None
    ):
        self._policy, self._store = policy, store
        self._capacity = capacity or (KEPT if store is None else KEPT_OF_STORE)
        self._held: OrderedDict[Identity, Conditioning] = OrderedDict()
        # Never dropped, unlike the embeddings: forming batches asks for all shapes again.
        self._shapes: dict[Identity, Shape] = {}
        # The rows on the device that the last call of `each` made, by `_key`.
        self._there: dict[tuple, Conditioning] = {}

    def get(self, examples: list[Example]) -> Conditioning:
        """The conditioning of n examples of one shape, [n, ...] on the policy's device, as
        `Policy.encode` returns it. If all of them were in the last call of `each`, nothing is
        copied to the device."""
        keys = [self._key(example) for example in examples]
        if all(key in self._there for key in keys):
            rows = [self._there[key] for key in keys]
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return self._encoded(examples)

    def _key(self, example: Example) -> tuple:
        """Everything that an example's conditioning depends on: its identity, and that of the
        example that it is guided away from."""
        opposed = self._policy.opposed(example)
        return self._policy.identity(example), opposed and self._policy.identity(opposed)

    def _encoded(self, examples: list[Example]) -> Conditioning:
        opposed = [
            other for example in examples if (other := self._policy.opposed(example)) is not None
        ]
        # Embeddings are dropped only at the end, because one call may need more than `capacity`.
        self._hold([*examples, *opposed])
        found = self._rows(examples)
        if opposed:
            found = with_negatives(found, self._rows(opposed))
        self._let_go()
        return found

    def each(self, examples: list[Example]) -> Conditions:
        """The conditionings of n examples whose shapes may differ, on the policy's device. They
        stay there until the next call, because training uses those of the rollout again in every
        micro-batch."""
        self._there = {}  # first, so that old and new rows are not on the device together
        shapes, stacks = self.shapes(examples), {}
        for places in by_shape(shapes):
            stack = stacks[shapes[places[0]]] = self._encoded([examples[n] for n in places])
            for n, place in enumerate(places):
                row = {name: tensor[n] for name, tensor in stack.items()}
                self._there[self._key(examples[place])] = row
        return Conditions(shapes, stacks)

    def shapes(self, examples: list[Example]) -> list[Shape]:
        """The shape of each example's conditioning: None for all examples of a family with one
        shape."""
        if not self._policy.ragged:
            return [None] * len(examples)
        return [
            (self._shape(example), self._shape(self._policy.opposed(example)))
            for example in examples
        ]

    def _shape(self, example: Example | None) -> Shape:
        if example is None:
            return None
        identity = self._policy.identity(example)
        if identity not in self._shapes:
            self._hold([example])
            self._shapes[identity] = shape_of(self._held[identity])
            self._let_go()
        return self._shapes[identity]

    def _let_go(self) -> None:
        """Drop the least recently used embeddings above the capacity."""
        while len(self._held) > self._capacity:
            self._held.popitem(last=False)

    def _hold(self, examples: list[Example]) -> None:
        """Read or compute the embeddings of examples that are not in memory."""
        for identity, example in by_identity(self._policy, examples).items():
            if identity not in self._held:
                self._held[identity] = (
                    self._store.read(identity) if self._store else embed_one(self._policy, example)
                )
            self._held.move_to_end(identity)

    def _rows(self, examples: list[Example]) -> Conditioning:
        """The embeddings of examples in memory, stacked, on the policy's device."""
        held = [self._held[self._policy.identity(example)] for example in examples]
        stacked = {name: torch.stack([one[name] for one in held]) for name in held[0]}
        return send([stacked], self._policy.device)[0]


def embed_one(policy: Policy, example: Example) -> Conditioning:
    """The embedding of one example, [...] each, on the CPU."""
    # Never in a batch: matrix products of other sizes would change its last bits, and a stored
    # embedding must not depend on which others were missing with it.
    return {name: tensor[0].cpu() for name, tensor in policy.embed([example]).items()}


def by_identity(family: Policy | type[Policy], examples: list[Example]) -> dict[Identity, Example]:
    """One example for each distinct embedding, by identity."""
    found: dict[Identity, Example] = {}
    for example in examples:
        found.setdefault(family.identity(example), example)
    return found


# ------------------------------------------------------------------------------------------ on disk
class EmbeddingStore:
    """A folder of embeddings: one safetensors file for each, named by a hash of everything that it
    depends on.

    A file is replaced as a whole and holds a checksum, so damage is always noticed.

    Args:
        folder: created by the first write.
        kind: what all embeddings depend on, as JSON values: encoders, dtype, text length.
    """

    def __init__(self, folder: str | Path, kind: dict):
        self.folder, self._kind = Path(folder), kind

    def path(self, identity: Identity) -> Path:
        """The file of an embedding, which need not exist."""
        key = json.dumps([FORMAT, self._kind, *identity], sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()
        # In 256 subfolders: file systems slow down with very many files in one folder.
        return self.folder / name[:2] / f"{name}.safetensors"

    def problem_with(self, identity: Identity) -> str | None:
        """What is wrong with the file of an embedding: "missing", or how it is damaged; None if
        nothing. The whole file is read."""
        try:
            self._read(identity)
        except FileNotFoundError:
            return "missing"
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            return f"damaged: {error}"
        return None

    def read(self, identity: Identity) -> Conditioning:
        """The embedding of one example, [...] each, on the CPU.

        Raises:
            RankError: the file is missing or damaged. All files were checked at the start, so it
                changed during the run, and perhaps only this rank sees that.
        """
        try:
            return self._read(identity)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise RankError(
                f"data.embedding_cache: {self.path(identity)} was whole when the run began and"
                f" cannot be read now: {error}; start again with --resume, which writes it again"
            ) from None

    def write(self, identity: Identity, embeddings: Conditioning) -> int:
        """Write the embedding of one example, [...] each. Returns the size of the file in bytes."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in embeddings.items()}
        content = save(
            tensors, metadata={"text": "\n".join(identity), "crc32": str(_checksum(tensors))}
        )
        file = self.path(identity)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, content)
        return len(content)

    def _read(self, identity: Identity) -> Conditioning:
        with safe_open(self.path(identity), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            noted = file.metadata()
        if (
            noted is None
            or noted["text"] != "\n".join(identity)
            or int(noted["crc32"]) != _checksum(tensors)
        ):
            raise ValueError("its checksum is wrong")
        return tensors


def _checksum(tensors: Conditioning) -> int:
    value = 0
    for name in sorted(tensors):
        # Viewed as bytes, because numpy has no bfloat16.
        value = zlib.crc32(
            tensors[name].reshape(-1).view(torch.uint8).numpy().data,
            zlib.crc32(name.encode(), value),
        )
    return value


# ----------------------------------------------------------------------------- at a run's beginning
def store_of(config: Config, device: torch.device | str) -> EmbeddingStore:
    """The store in data.embedding_cache for the encoders and settings of a config (a
    collective)."""
    m, family = config.model, family_of(config.model.path)
    # On rank 0 alone, because it hashes all weights of the encoders.
    encoders = encoder_identity(m.path) if distributed.rank() == 0 else None
    return EmbeddingStore(
        cast(str, config.data.embedding_cache),  # called where a cache is configured
        {
            "family": family.__name__,
            "encoders": distributed.agree_on(encoders),
            "dtype": str(resolve_dtype(m.dtype, device)),
            "max_sequence_length": check_text_length(m.path, m.max_sequence_length),
            # Only if it matters, so that other families keep their files when the size changes.
            **({"size": str(config.rollout.size)} if family.sized else {}),
        },
    )


def write_missing(
    store: EmbeddingStore,
    examples: dict[Identity, Example],
    load: Callable[[], Policy],
    note: Callable[[str], None],
) -> None:
    """Compute the embeddings that a store lacks; each rank does its share (a collective).

    Args:
        store: on a file system that all ranks share.
        examples: by identity, the same on every rank.
        load: loads the policy with its text encoders; called only if something is missing.
        note: is told what happens.

    Raises:
        UserError: on every rank alike, with the reason of the first rank that failed.
    """
    # A rank that failed must still reach the collectives below, or the others would wait forever.
    mine, trouble = list(examples)[distributed.rank() :: distributed.world_size()], None
    try:
        missing = _missing(store, mine)
        if missing:
            _embed(store, {identity: examples[identity] for identity in missing}, load, note)
    except (UserError, OSError) as error:
        trouble = (
            str(error)
            if isinstance(error, UserError)
            else f"data.embedding_cache: {store.folder}: {error}"
        )
    found = distributed.first_of_any(trouble)
    # Every rank looks for the files of all ranks: on folders of its own it would find its own only.
    if not found and distributed.reduce(
        not all(store.path(identity).exists() for identity in examples), "max"
    ):
        found = (
            f"data.embedding_cache: {store.folder} is not the same folder for all ranks; name one"
            " on a file system that they share"
        )
    if found:
        raise UserError(found)


def _missing(store: EmbeddingStore, identities: list[Identity]) -> list[Identity]:
    """The identities without a sound file. Damaged files are reported on the console."""
    missing = []
    with _progress() as progress:
        for identity in progress.track(identities, description="checking prompt embeddings"):
            problem = store.problem_with(identity)
            if problem:
                missing.append(identity)
            if problem not in (None, "missing"):
                print(
                    f"warning: data.embedding_cache: {store.path(identity)} is {problem}; it is"
                    " written again",
                    flush=True,
                )
    return missing


def _embed(
    store: EmbeddingStore,
    examples: dict[Identity, Example],
    load: Callable[[], Policy],
    note: Callable[[str], None],
) -> None:
    note(
        f"embedding {len(examples)} texts on each rank into {store.folder}"
        if distributed.world_size() > 1
        else f"embedding {len(examples)} texts into {store.folder}"
    )
    store.folder.mkdir(parents=True, exist_ok=True)
    policy = load()
    with _progress() as progress:
        task = progress.add_task("embedding prompts", total=len(examples))
        for done, (identity, example) in enumerate(examples.items(), 1):
            size = store.write(identity, embed_one(policy, example))
            # The first file tells the size of all; running out of space later would waste hours.
            if done == 1:
                _check_space(store, size * (len(examples) - 1) * distributed.world_size())
            progress.advance(task)
    # The denoiser is loaded next, and needs the memory that reference cycles and the allocator's
    # cache would keep.
    del policy
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_space(store: EmbeddingStore, needed: int) -> None:
    free = shutil.disk_usage(store.folder).free
    if needed > free:
        raise UserError(
            f"data.embedding_cache: {store.folder} needs {needed / 1e9:.1f} GB more and has"
            f" {free / 1e9:.1f} GB free; name another folder, lower model.max_sequence_length, or"
            " set it to null to keep the text encoders loaded instead"
        )


def _progress() -> Progress:
    return Progress(transient=True, disable=distributed.rank() != 0)
