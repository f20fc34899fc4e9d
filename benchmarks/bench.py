"""What the variants of throughput.py share: one loaded engine, and the timed parts of an iteration on it."""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from tempflow import cli
from tempflow.config import Config
from tempflow.data.prompts import PromptOrder, load_prompts
from tempflow.rewards import RewardPool, check_prompts, parse_rewards

PHASES = ("rollout", "decode", "reward", "train", "sync")


class Bench:
    """The engine's own parts on one config.

    The prompts of the first `iterations` iterations are embedded by text encoders that are gone before the rest is loaded, as in
    a run with data.embedding_cache; without that key the embeddings go to a temporary folder.
    pool: the rewards of another bench, to be used again.
    """

    def __init__(self, config: Config, iterations: int, pool: RewardPool | None = None):
        cli.quiet_libraries()
        from tempflow.models import check_model
        from tempflow.models.embeddings import open_policy
        from tempflow.training import distributed
        from tempflow.training.device import Threads, device
        from tempflow.training.engine import Runtime

        distributed.init_distributed()
        self.config = config
        self.specs = parse_rewards(config.rewards)
        self.prompts = load_prompts(config.data.train, "data.train")
        check_prompts(self.specs, [p.text for p in self.prompts], [p.metadata for p in self.prompts])
        check_model(config.model.path)
        self.threads = Threads(config)
        self.pool = pool or RewardPool(self.specs, **config.reward_pool.pool())
        self.order = PromptOrder(len(self.prompts), config.data.prompts_per_iteration, config.training.seed)
        self._scratch = tempfile.TemporaryDirectory(prefix="tempflow-embeddings-")
        opened = changed(config, data={"embedding_cache": config.data.embedding_cache or self._scratch.name})
        self.policy, self.embeddings = open_policy(opened, [self.prompts[i] for i in self.order.reached(iterations)], device())
        self.runtime = Runtime(config, self.policy)
        self.pool.wait_ready()

    def collector(self, config: Config):
        from tempflow.training.rollout import Collector

        return Collector(config, self.policy, self.prompts, self.embeddings, self.pool, self.specs)

    def embed(self, units):
        return self.embeddings.get([self.prompts[unit.prompt_id] for unit in units])


def changed(config: Config, **sections) -> Config:
    """The config with some keys of some sections changed."""
    config = config.model_copy(deep=True)
    for section, keys in sections.items():
        for key, value in keys.items():
            setattr(getattr(config, section), key, value)
    return config


@dataclass
class Iteration:
    """What one iteration took. seconds: per phase. forwards: rows in the rollout and in training (no backward)."""

    seconds: dict[str, float]
    images: int
    forwards: dict[str, int] = field(default_factory=dict)


class Engine:
    """Iterations as the trainer runs them: on one collector, whose graphs and float8 copy last until `free`."""

    share_forward = True

    def __init__(self, bench: Bench, config: Config):
        self.bench, self.config, self._collector = bench, config, None

    def __call__(self, iteration: int) -> Iteration:
        bench = self.bench
        self._collector = self._collector or bench.collector(self.config)
        with bench.threads.shared():
            data = self._collector.collect(iteration, bench.order.indices(iteration))
        started = time.perf_counter()
        trained = train(bench, self.config, self._collector, data, self.config.training.micro_batch, self.share_forward)
        synchronize()
        seconds = {**{k: data.times[k] for k in ("rollout", "decode", "reward")}, "train": time.perf_counter() - started}
        return Iteration(seconds | {"sync": refresh(bench)}, data.images, {"rollout": data.stats.forwards, "train": trained})

    def free(self) -> None:
        """Give back what the variant holds on the device."""
        self._collector = None
        release()


class OneForwardPerChild(Engine):
    """The same, but training forwards every child by itself."""

    share_forward = False


def release() -> None:
    """Give the device's memory back: engines and policies live on in reference cycles until a collection."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train(bench: Bench, config: Config, collector, data, micro_batch: int, share_forward: bool = True) -> int:
    """The updates on a rollout's decisions; returns the rows forwarded. share_forward: as of `Updater`."""
    from tempflow.advantages import advantages
    from tempflow.sampling.steps import noise_weights
    from tempflow.training.batches import make_batches, select
    from tempflow.training.update import Updater

    t, how = config.training, config.advantage()
    adv = advantages(data.rewards, group=how.over, global_std=how.global_std, clip=how.clip)
    chosen = select(data.decisions, adv, data.steps, keep_all=t.penalty is not None)
    count = -(-len(chosen) // micro_batch)
    weights = noise_weights(collector.sde.tau, data.steps, t.weighting)
    batches = make_batches(chosen, data.decisions[0], count, -(-len(chosen) // count), collector.sigmas, collector.sde, weights,
                           bench.policy.device)  # fmt: skip
    updater = Updater(config, bench.runtime, bench.embed, share_forward)
    total = int(np.prod(data.rewards.shape[:3]))
    return sum(updater.update(batches, total, 1.0, u == 0)["forwards"] for u in range(t.updates.passes))


def refresh(bench: Bench) -> float:
    """Seconds of a weight sync."""
    started = time.perf_counter()
    bench.runtime.refresh(bench.policy.denoiser())
    synchronize()
    return time.perf_counter() - started


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square matrix product, the best of several."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize()
        started = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
