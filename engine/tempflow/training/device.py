"""What a training process computes on: its device and its CPU threads."""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch

from tempflow.config import Config
from tempflow.run.environment import uses_gpu


def device() -> torch.device:
    """This rank's GPU, made the current one, or the CPU where there is none."""
    if not uses_gpu():
        return torch.device("cpu")
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(chosen)
    return chosen


def cores_per_rank() -> int:
    """CPU cores that this rank may call its own."""
    ranks = int(
        os.environ.get("LOCAL_WORLD_SIZE")
        or os.environ.get("LOCAL_SIZE")
        or os.environ.get("WORLD_SIZE", "1")
    )
    return max(1, len(os.sched_getaffinity(0)) // ranks)


class Threads:
    """CPU threads of this rank: fewer while reward workers run beside it, so that all fit the
    cores.

    More threads than cores is many times slower than one: OpenMP threads wait for each other in
    busy loops.
    """

    def __init__(self, config: Config):
        share, pool = cores_per_rank(), config.reward_pool
        self.alone = share
        self.beside_workers = max(1, share - pool.workers * pool.threads_per_worker)
        torch.set_num_threads(self.alone)

    @contextmanager
    def shared(self):
        """While reward workers are busy."""
        torch.set_num_threads(self.beside_workers)
        try:
            yield
        finally:
            torch.set_num_threads(self.alone)
