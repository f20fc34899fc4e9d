"""Prompt embeddings, computed once per prompt and kept on the CPU, least recently used first to go."""

from __future__ import annotations

from collections import OrderedDict

import torch

from tempflow.policy.base import Conditioning, Policy

ENCODE_BATCH = 32


class EmbeddingCache:
    """Embeddings of up to `capacity` prompts of one policy."""

    def __init__(self, policy: Policy, capacity: int = 4096):
        self._policy, self._capacity = policy, capacity
        self._held: OrderedDict[str, Conditioning] = OrderedDict()

    def get(self, prompts: list[str]) -> Conditioning:
        """The conditioning of `prompts`, [n, ...] on the policy's device; repeated prompts are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        missing = [p for p in distinct if p not in self._held]
        for first in range(0, len(missing), ENCODE_BATCH):
            part = missing[first : first + ENCODE_BATCH]
            encoded = {name: _to_cpu(tensor) for name, tensor in self._policy.encode(part).items()}
            for i, prompt in enumerate(part):
                self._held[prompt] = {name: tensor[i] for name, tensor in encoded.items()}
        for prompt in distinct:
            self._held.move_to_end(prompt)
        names = self._held[prompts[0]].keys()
        found = {n: torch.stack([self._held[p][n] for p in prompts]).to(self._policy.device) for n in names}
        while len(self._held) > self._capacity:
            self._held.popitem(last=False)
        return found


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """What all rows share (stride 0: the default negative prompt) is kept once for them."""
    return tensor[:1].cpu().expand_as(tensor) if tensor.stride(0) == 0 else tensor.cpu()
