"""Evaluation: what is drawn, in which portions."""

import numpy as np
from engine_cases import HELDOUT, small_config

from tempflow.data.prompts import load_prompts
from tempflow.models.embeddings import EmbeddingCache
from tempflow.models.opened import Opened
from tempflow.run import evaluation


def drawn(policy, micro_batch, decode_batch):
    """(indices, images) of five prompts, and how many were decoded at a time."""
    prompts, sizes, decode = load_prompts(HELDOUT)[:5], [], policy.decode

    def counted(latents, size):
        sizes.append(len(latents))
        return decode(latents, size)

    config = small_config(rollout={"micro_batch": micro_batch, "decode_batch": decode_batch})
    model, told = Opened(config, policy, EmbeddingCache(policy)), []
    policy.decode = counted
    try:
        parts = list(
            evaluation.draw(model, prompts, list(range(5)), num_steps=2, advance=told.append)
        )
    finally:
        del policy.decode
    assert told == sizes == [len(part[0]) for part in parts]
    return (
        [i for part in parts for i in part[0]],
        np.concatenate([part[1] for part in parts]),
        sizes,
    )


def test_decoding_goes_by_its_own_batch(policy):
    """As in rollouts: decoding takes more memory a row than a forward does. The images are the
    same."""
    indices, whole, sizes = drawn(policy, 4, 8)
    assert indices == [0, 1, 2, 3, 4] and sizes == [4, 1]
    parted = drawn(policy, 4, 3)
    assert parted[0] == indices and parted[2] == [3, 1, 1] and np.array_equal(parted[1], whole)
