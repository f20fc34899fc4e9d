"""Opening a run's model together with the embeddings of its prompts.

With `data.embedding_cache` the text encoders are loaded alone, only where an embedding is missing, and are gone before the
transformer and the VAE are loaded, so the two never share a device. Without it they stay, and embed when a prompt comes up.
"""

from __future__ import annotations

import gc
import shutil
from functools import partial
from typing import Callable

import torch
from rich.progress import Progress

from tempflow.config import Config
from tempflow.data.prompts import Prompt
from tempflow.errors import UserError
from tempflow.models import Policy, check_text_length, encoder_identity, family_of, load_policy, resolve_dtype
from tempflow.models.embedding_store import EmbeddingStore
from tempflow.models.embeddings import EmbeddingCache, embed_one
from tempflow.training import distributed


def open_policy(
    config: Config, prompts: list[Prompt], device: torch.device | str, note: Callable[[str], None] = print
) -> tuple[Policy, EmbeddingCache]:
    """The policy before training and the embeddings of `prompts` and their negative prompts (a collective).

    Without rollout.replica it has no transformer yet: the one that is trained will be its own.
    Raises UserError as `load_policy` does, and on every rank alike where the cache cannot be written.
    """
    m = config.model
    load = partial(load_policy, m.path, dtype=m.dtype, device=device, max_sequence_length=m.max_sequence_length,
                   transformer=config.rollout.replica)  # fmt: skip
    if config.data.embedding_cache is None:
        policy, store = load(), None
    else:
        store = _store(config, device)
        _fill(store, _texts(prompts, family_of(m.path).default_negative_prompt), load, note)
        policy = load(parts="picture")
    for wanted, enable in ((m.vae_slicing, "enable_slicing"), (m.vae_tiling, "enable_tiling")):
        if wanted:
            getattr(policy.pipe.vae, enable)()
    _note_unused(policy, prompts, max(config.rollout.guidance_scale, config.eval_guidance()), note)
    return policy, EmbeddingCache(policy, store)


def _store(config: Config, device: torch.device | str) -> EmbeddingStore:
    m = config.model
    identity = encoder_identity(m.path) if distributed.rank() == 0 else None  # reads all their weights
    return EmbeddingStore(config.data.embedding_cache, {
        "family": family_of(m.path).__name__, "encoders": distributed.agree_on(identity),
        "dtype": str(resolve_dtype(m.dtype, device)), "max_sequence_length": check_text_length(m.path, m.max_sequence_length),
    })  # fmt: skip


def _texts(prompts: list[Prompt], default: str | None) -> list[str]:
    """Every text that will be asked for, once: prompts, and where the family takes them negative prompts."""
    negatives = [] if default is None else [default if p.negative is None else p.negative for p in prompts]
    return list(dict.fromkeys([*(p.text for p in prompts), *negatives]))


def _fill(store: EmbeddingStore, texts: list[str], load: Callable[..., Policy], note: Callable[[str], None]) -> None:
    """Have every text in the store; each rank sees to its share."""
    mine, trouble = texts[distributed.rank() :: distributed.world_size()], None
    try:
        missing = _lacking(store, mine)
        if missing:
            _embed(store, missing, load, note)
    except (UserError, OSError) as error:
        trouble = str(error) if isinstance(error, UserError) else f"data.embedding_cache: {store.folder}: {error}"
    found = distributed.first_of_any(trouble)
    if not found and distributed.reduce(not all(store.path(text).exists() for text in texts), "max"):
        found = f"data.embedding_cache: {store.folder} is not the same folder for all ranks; it must be on a file system they share"
    if found:
        raise UserError(found)


def _lacking(store: EmbeddingStore, texts: list[str]) -> list[str]:
    """Texts without a whole file; damaged ones are named."""
    lacking = []
    with _progress() as progress:
        for text in progress.track(texts, description="checking prompt embeddings"):
            fault = store.fault(text)
            if fault:
                lacking.append(text)
            if fault not in (None, "missing"):
                print(f"warning: data.embedding_cache: {store.path(text)} is {fault}; it is made anew", flush=True)
    return lacking


def _embed(store: EmbeddingStore, texts: list[str], load: Callable[..., Policy], note: Callable[[str], None]) -> None:
    note(f"embedding {len(texts)} texts on each rank into {store.folder}" if distributed.world_size() > 1 else
         f"embedding {len(texts)} texts into {store.folder}")  # fmt: skip
    store.folder.mkdir(parents=True, exist_ok=True)
    policy = load(parts="text")
    with _progress() as progress:
        task = progress.add_task("embedding prompts", total=len(texts))
        for done, text in enumerate(texts, 1):
            size = store.write(text, embed_one(policy, text))
            if done == 1:
                _check_space(store, size * (len(texts) - 1) * distributed.world_size())
            progress.advance(task)
    del policy
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_space(store: EmbeddingStore, needed: int) -> None:
    free = shutil.disk_usage(store.folder).free
    if needed > free:
        raise UserError(
            f"data.embedding_cache: {store.folder} needs {needed / 1e9:.1f} GB more and has {free / 1e9:.1f} GB free; name another "
            "folder, lower model.max_sequence_length, or set null to keep the text encoders instead"
        )


def _progress() -> Progress:
    return Progress(transient=True, disable=distributed.rank() != 0)


def _note_unused(policy: Policy, prompts: list[Prompt], guidance_scale: float, note: Callable[[str], None]) -> None:
    given = sum(prompt.negative is not None for prompt in prompts)
    if given and policy.default_negative_prompt is None:
        note(f"warning: {given} prompts bring a negative_prompt without effect: {type(policy.pipe).__name__} has its guidance built in")
    elif given and guidance_scale <= 1:
        note(f"warning: {given} prompts bring a negative_prompt without effect: guidance_scale {guidance_scale:g} is no guidance")
