"""The resources that a training process computes on: its device and its CPU threads."""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch

from tempflow.config import Config
from tempflow.run.environment import uses_gpu


def device() -> torch.device:
    """This rank's GPU, made the current device, or the CPU if there is no GPU."""
    if not uses_gpu():
        return torch.device("cpu")
    # Launchers set LOCAL_RANK, the number of the process on its machine.
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(chosen)
    return chosen


def cores_per_rank() -> int:
    """The number of CPU cores that this rank has for itself."""
    # LOCAL_WORLD_SIZE is torchrun's, LOCAL_SIZE is DeepSpeed's.
    ranks = int(
        os.environ.get("LOCAL_WORLD_SIZE")
        or os.environ.get("LOCAL_SIZE")
        or os.environ.get("WORLD_SIZE", "1")
    )
    # The affinity mask and not cpu_count: containers and schedulers allow fewer cores than exist.
    return max(1, len(os.sched_getaffinity(0)) // ranks)


class Threads:
    """The number of torch's CPU threads: all cores of this rank, or fewer while reward workers run
    beside it."""

    # More threads than cores are many times slower than one thread: OpenMP threads wait for each
    # other in busy loops (docs/log.md, "Two processes of two threads on two cores").

    def __init__(self, config: Config):
        share, pool = cores_per_rank(), config.reward_pool
        self.alone = share
        self.beside_workers = max(1, share - pool.workers * pool.threads_per_worker)
        torch.set_num_threads(self.alone)

    @contextmanager
    def shared(self):
        """Leave the reward workers their cores for the time of a block."""
        torch.set_num_threads(self.beside_workers)
        try:
            yield
        finally:
            torch.set_num_threads(self.alone)
