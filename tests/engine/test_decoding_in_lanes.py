"""Lanes of a rollout are threads that share one VAE."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from tempflow.models.base import Policy
from tempflow.types import Size


def decoding(vae):
    """Of a policy that takes a while to decode, and the most decodes that ran at the same time."""
    running, most = [], [0]

    def _decode(latents, size):
        running.append(1)
        most[0] = max(most[0], len(running))
        time.sleep(0.05)
        running.pop()
        return torch.zeros(len(latents), 3, size.height, size.width)

    policy = SimpleNamespace(pipe=SimpleNamespace(vae=vae), _decode=_decode)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: Policy.pixels(policy, torch.zeros(1, 4), Size(8, 8)), range(2)))
    return most[0]


@pytest.mark.parametrize(
    "vae, together", [(SimpleNamespace(clear_cache=None), 1), (SimpleNamespace(), 2)]
)
def test_a_vae_that_keeps_features_in_itself_decodes_one_batch_at_a_time(vae, together):
    """Otherwise one lane's images are made of the other's features."""
    assert decoding(vae) == together
