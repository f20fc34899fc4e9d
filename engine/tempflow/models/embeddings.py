"""Embeddings of a run's prompts, on disk and in memory.

They are known by `Policy.identity`, what an embedding depends on, and encoded once for each; a
negative prompt is embedded as an example of its own, so prompts share it. With
`data.embedding_cache` the text encoders are loaded alone, only where an embedding is missing, and
are gone before the denoiser and the VAE are loaded, so the two never share a device. Without it
they stay, and embed when a prompt comes up.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Callable

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

# embeddings; reading one again takes milliseconds, encoding it again a good part of a second
KEPT, KEPT_OF_STORE = (4096, 256)
FORMAT = 1  # of the files; another number finds none of the old ones
Identity = tuple[str, ...]


# ---------------------------------------------------------------------------------------- in memory
class EmbeddingCache:
    """Embeddings of one policy on the CPU, up to `capacity` of them; least recently used first to
    go. Those of an iteration are on the device as well.

    store: holds all that will be asked for; without one they come from the policy's encoders.
    """

    def __init__(
        self, policy: Policy, store: EmbeddingStore | None = None, *, capacity: int | None = None
    ):
        self._policy, self._store = policy, store
        self._capacity = capacity or (KEPT if store is None else KEPT_OF_STORE)
        self._held: OrderedDict[Identity, Conditioning] = OrderedDict()
        self._shapes: dict[Identity, Shape] = {}  # of all that were ever asked for
        self._there: dict[tuple, Conditioning] = {}  # by `_key`: what `each` gave last

    def get(self, examples: list[Example]) -> Conditioning:
        """The conditioning of n examples of one shape, [n, ...] on the policy's device, as
        `Policy.encode`. Nothing is copied there where `each` was asked for them all last."""
        keys = [self._key(example) for example in examples]
        if all(key in self._there for key in keys):
            rows = [self._there[key] for key in keys]
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return self._encoded(examples)

    def _key(self, example: Example) -> tuple:
        """What an example's conditioning depends on."""
        opposed = self._policy.opposed(example)
        return self._policy.identity(example), opposed and self._policy.identity(opposed)

    def _encoded(self, examples: list[Example]) -> Conditioning:
        opposed = [
            other for example in examples if (other := self._policy.opposed(example)) is not None
        ]
        self._hold([*examples, *opposed])
        found = self._rows(examples)
        if opposed:
            found = with_negatives(found, self._rows(opposed))
        self._let_go()
        return found

    def each(self, examples: list[Example]) -> Conditions:
        """The conditionings of n examples whose shapes may differ, on the policy's device. They
        stay there until others are asked for: training wants those of the rollout again, for every
        micro-batch."""
        self._there = {}
        shapes, stacks = self.shapes(examples), {}
        for places in by_shape(shapes):
            stack = stacks[shapes[places[0]]] = self._encoded([examples[n] for n in places])
            for n, place in enumerate(places):
                row = {name: tensor[n] for name, tensor in stack.items()}
                self._there[self._key(examples[place])] = row
        return Conditions(shapes, stacks)

    def shapes(self, examples: list[Example]) -> list[Shape]:
        """The shape of each example's conditioning; None for all of a family whose conditionings
        have one."""
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
        while len(self._held) > self._capacity:
            self._held.popitem(last=False)

    def _hold(self, examples: list[Example]) -> None:
        for identity, example in by_identity(self._policy, examples).items():
            if identity not in self._held:
                self._held[identity] = (
                    self._store.read(identity) if self._store else embed_one(self._policy, example)
                )
            self._held.move_to_end(identity)

    def _rows(self, examples: list[Example]) -> Conditioning:
        held = [self._held[self._policy.identity(example)] for example in examples]
        stacked = {name: torch.stack([one[name] for one in held]) for name in held[0]}
        return send([stacked], self._policy.device)[0]


def embed_one(policy: Policy, example: Example) -> Conditioning:
    """An example's embedding, on the CPU. Alone, because a batch's other texts would show in its
    last bits."""
    return {name: tensor[0].cpu() for name, tensor in policy.embed([example]).items()}


def by_identity(family: Policy | type[Policy], examples: list[Example]) -> dict[Identity, Example]:
    """One example for each different embedding."""
    found: dict[Identity, Example] = {}
    for example in examples:
        found.setdefault(family.identity(example), example)
    return found


# ------------------------------------------------------------------------------------------ on disk
class EmbeddingStore:
    """A folder of embeddings: a safetensors file for each, found by what it depends on.

    A file is replaced as a whole and carries a checksum, so it is either right or known to be
    damaged.
    kind: what all of them depend on (JSON values): encoders, dtype, length.
    """

    def __init__(self, folder: str | Path, kind: dict):
        self.folder, self._kind = Path(folder), kind

    def path(self, identity: Identity) -> Path:
        key = json.dumps([FORMAT, self._kind, *identity], sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def problem_with(self, identity: Identity) -> str | None:
        """What is wrong with a file, read whole: None where nothing is, "missing", or how it is
        damaged."""
        try:
            self._read(identity)
        except FileNotFoundError:
            return "missing"
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            return f"damaged: {error}"
        return None

    def read(self, identity: Identity) -> Conditioning:
        """One example's embeddings, [...] each, on the CPU. RankError where they are missing or
        damaged."""
        try:
            return self._read(identity)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise RankError(
                f"data.embedding_cache: {self.path(identity)} was whole when the run began and"
                f" cannot be read now: {error}; start again, with --resume, and it is made anew"
            ) from None

    def write(self, identity: Identity, embeddings: Conditioning) -> int:
        """Write one example's embeddings, [...] each; returns the size in bytes."""
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
        value = zlib.crc32(
            tensors[name].reshape(-1).view(torch.uint8).numpy().data,
            zlib.crc32(name.encode(), value),
        )
    return value


# ----------------------------------------------------------------------------- at a run's beginning
def store_of(config: Config, device: torch.device | str) -> EmbeddingStore:
    """The folder data.embedding_cache, for what the config embeds with (a collective)."""
    m, family = config.model, family_of(config.model.path)
    # reads all their weights
    encoders = encoder_identity(m.path) if distributed.rank() == 0 else None
    return EmbeddingStore(
        config.data.embedding_cache,  # type: ignore[arg-type]  # called where a cache is configured
        {
            "family": family.__name__,
            "encoders": distributed.agree_on(encoders),
            "dtype": str(resolve_dtype(m.dtype, device)),
            "max_sequence_length": check_text_length(m.path, m.max_sequence_length),
            **({"size": str(config.rollout.size)} if family.sized else {}),
        },
    )


def write_missing(
    store: EmbeddingStore,
    examples: dict[Identity, Example],
    load: Callable[[], Policy],
    note: Callable[[str], None],
) -> None:
    """Have the embedding of every example in the store; each rank makes its share. load: the policy
    with its text encoders."""
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
    if not found and distributed.reduce(
        not all(store.path(identity).exists() for identity in examples), "max"
    ):
        found = (
            f"data.embedding_cache: {store.folder} is not the same folder for all ranks; it must be"
            " on a file system they share"
        )
    if found:
        raise UserError(found)


def _missing(store: EmbeddingStore, identities: list[Identity]) -> list[Identity]:
    """Those without a whole file; damaged ones are named."""
    missing = []
    with _progress() as progress:
        for identity in progress.track(identities, description="checking prompt embeddings"):
            problem = store.problem_with(identity)
            if problem:
                missing.append(identity)
            if problem not in (None, "missing"):
                print(
                    f"warning: data.embedding_cache: {store.path(identity)} is {problem}; it is"
                    " made anew",
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
            if done == 1:
                _check_space(store, size * (len(examples) - 1) * distributed.world_size())
            progress.advance(task)
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
            " set null to keep the text encoders instead"
        )


def _progress() -> Progress:
    return Progress(transient=True, disable=distributed.rank() != 0)
