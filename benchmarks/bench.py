"""What the variants of throughput.py share: one loaded engine, and the timed parts of an
iteration."""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass, field, replace

import torch

from tempflow import cli
from tempflow.config import Config
from tempflow.data.prompts import PromptOrder, load_prompts
from tempflow.rewards import RewardPool, check_prompts, parse_rewards

PHASES = ("rollout", "decode", "reward", "train", "sync")


class Bench:
    """A session on one config, as a run has it.

    The prompts of the first `iterations` iterations are embedded by text encoders that are gone
    before the rest is loaded, as in a run with data.embedding_cache; without that key the
    embeddings go to a temporary folder.
    pool: the rewards of another bench, to be used again.
    """

    def __init__(self, config: Config, iterations: int, pool: RewardPool | None = None):
        cli.quiet_libraries()
        from tempflow.models import check_model
        from tempflow.training import distributed
        from tempflow.training.session import build

        distributed.init_distributed()
        specs, prompts = (
            parse_rewards(config.rewards),
            load_prompts(config.data.train, "data.train"),
        )
        check_prompts(specs, [p.text for p in prompts], [p.for_rewards for p in prompts])
        check_model(config.model.path)
        self.order = PromptOrder(
            len(prompts), config.data.prompts_per_iteration, config.training.seed
        )
        self._scratch = tempfile.TemporaryDirectory(prefix="tempflow-embeddings-")
        opened = changed(
            config,
            data={"embedding_cache": config.data.embedding_cache or self._scratch.name},
            rollout={"graphs": False},
        )
        self.session = build(
            opened, prompts, [], specs, pool=pool, reached=self.order.reached(iterations)
        )
        self.session.pool.wait_ready()


def changed(config: Config, **sections) -> Config:
    """The config with some keys of some sections changed."""
    config = config.model_copy(deep=True)
    for section, keys in sections.items():
        for key, value in keys.items():
            setattr(getattr(config, section), key, value)
    return config


@dataclass
class Iteration:
    """What one iteration took. seconds: per phase. forwards: rows in the rollout and in training
    (no backward)."""

    seconds: dict[str, float]
    images: int
    forwards: dict[str, int] = field(default_factory=dict)


class Engine:
    """Iterations as the trainer runs them, in a session of their own on the bench's model, whose
    graphs and float8 copy last until `free`. micro_batch, each_child: see `train`."""

    each_child = False

    def __init__(self, bench: Bench, config: Config):
        self.bench, self.config, self._session = bench, config, None

    def __call__(self, iteration: int) -> Iteration:
        self._session = session = self._session or self.bench.session.variant(self.config)
        rolled, scored = roll_out_and_score(session, self.bench.order.indices(iteration), iteration)
        started = time.perf_counter()
        trained = train(session, rolled, scored, each_child=self.each_child)
        synchronize()
        seconds = {
            **rolled.seconds,
            "reward": scored.seconds["reward"],
            "train": time.perf_counter() - started,
            "sync": refresh(session),
        }
        return Iteration(
            seconds, scored.images, {"rollout": rolled.stats.forwards, "train": trained}
        )

    def free(self) -> None:
        """Give back what the variant holds on the device."""
        self._session = None
        release()


class EachChild(Engine):
    """The same with a training forward for every child."""

    each_child = True


def roll_out_and_score(session, prompt_ids: list[int], iteration: int):
    """One rollout as the trainer does it, and its scores."""
    from tempflow.training.rollout import gather_rewards, plan_iteration, roll_out

    with session.threads.shared():
        rolled = roll_out(
            session,
            plan_iteration(session, prompt_ids, iteration),
            iteration,
            session.config.rollout.suffix,
        )
        return rolled, gather_rewards(session, rolled)


def release() -> None:
    """Give the device's memory back: engines and policies live on in reference cycles until a
    collection."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train(session, rolled, scored, each_child: bool = False) -> int:
    """The updates on a rollout's states; returns the rows forwarded. each_child: a forward of its
    own for every child."""
    from tempflow.training.credit import make_parts
    from tempflow.training.update import Updater

    parts = make_parts(session, rolled, session.advantage(rolled.layout.slots, scored.rewards))
    parts = [one_child_per_state(part) for part in parts] if each_child else parts
    updater = Updater(
        session.runtime, session.sampler, session.objective, session.penalty, session.embed
    )
    passes = session.config.training.updates.passes
    # as the trainer, before the first step moves the weights
    forwards = sum(updater.remember(part) for part in parts[1:])
    return forwards + sum(
        updater.update(part, 1.0)["forwards"] for _ in range(passes) for part in parts
    )


def one_child_per_state(part):
    """The same loss with every child as a state of its own: B forwards a state, as the paper's code
    runs it."""
    from tempflow.training.update import Part

    width = part.batches[0].advantage.shape[1]
    return Part.of([_split_children(batch) for batch in part.batches], part.total * width)


def _split_children(batch):
    width = batch.advantage.shape[1]
    repeated = {
        name: getattr(batch, name).repeat_interleave(width, 0)
        for name in ("x", "sigma", "a", "b", "tau", "weight")
    }
    split = {
        name: getattr(batch, name).flatten(0, 1).unsqueeze(1)
        for name in ("children", "advantage", "log_prob_rollout", "valid")
    }
    return replace(
        batch,
        units=[unit for unit in batch.units for _ in range(width)],
        real=batch.real * width,
        sigmas=[sigma for sigma in batch.sigmas for _ in range(width)],
        **repeated,
        **split,
    )


def refresh(session) -> float:
    """Seconds of a weight sync."""
    started = time.perf_counter()
    session.runtime.refresh(session.policy.denoiser())
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
