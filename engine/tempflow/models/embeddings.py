"""Embeddings of prompts and negative prompts, once per text, kept on the CPU, least recently used first to go.

They come from the policy's text encoders as they are asked for, or from a store on disk that holds them all.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from tempflow.models.base import Conditioning, Policy
from tempflow.models.embedding_store import EmbeddingStore
from tempflow.models.guidance import against

KEPT, KEPT_OF_STORE = 4096, 256  # texts; reading one again takes milliseconds, encoding it again a good part of a second


def embed_one(policy: Policy, text: str) -> Conditioning:
    """A text's embedding, on the CPU. Alone, for a batch's other texts would show in its last bits."""
    return {name: tensor[0].cpu() for name, tensor in policy.embed([text]).items()}


class EmbeddingCache:
    """Embeddings of up to `capacity` texts of one policy; store: holds every text that will be asked for."""

    def __init__(self, policy: Policy, store: EmbeddingStore | None = None, *, capacity: int | None = None):
        self._policy, self._store = policy, store
        self._capacity = capacity or (KEPT if store is None else KEPT_OF_STORE)
        self._held: OrderedDict[str, Conditioning] = OrderedDict()

    def get(self, prompts: list[str], negatives: list[str | None] | None = None) -> Conditioning:
        """The conditioning of `prompts`, [n, ...] on the policy's device; a text that comes again is encoded once.

        negatives: n negative prompts, None for the family's default one. A family that takes none passes over them.
        """
        default = self._policy.default_negative_prompt
        opposed = [] if default is None else [default if n is None else n for n in negatives or [None] * len(prompts)]
        self._hold(list(dict.fromkeys([*prompts, *opposed])))
        found = self._rows(prompts)
        if opposed:
            found = against(found, self._rows(opposed))
        while len(self._held) > self._capacity:
            self._held.popitem(last=False)
        return found

    def _hold(self, texts: list[str]) -> None:
        missing = [text for text in texts if text not in self._held]
        if self._store:
            self._held |= {text: self._store.read(text) for text in missing}
            missing = []
        for text in missing:
            self._held[text] = embed_one(self._policy, text)
        for text in texts:
            self._held.move_to_end(text)

    def _rows(self, texts: list[str]) -> Conditioning:
        names = self._held[texts[0]].keys()
        return {n: torch.stack([self._held[text][n] for text in texts]).to(self._policy.device) for n in names}
