"""Puts the parts of a run together (recorder, reward workers, session) and trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

from tempflow.checkpoints import load
from tempflow.config import Config
from tempflow.profiling import Profile
from tempflow.rewards import RewardPool, RewardSpec
from tempflow.run.environment import describe
from tempflow.run.recorder import Recorder
from tempflow.training import distributed
from tempflow.training.loop import Trainer
from tempflow.training.micro_batches import choose
from tempflow.training.session import build
from tempflow.training.shares import check_shares, prompts_reached
from tempflow.types import Example


def train(
    config: Config,
    run_dir: Path,
    resume_from: Path | None,
    prompts: list[Example],
    heldout: list[Example],
    specs: list[RewardSpec],
    *,
    stop: Callable[[], bool],
    report: Callable[[Path], Path],
    profile: Profile | None = None,
) -> dict | None:
    """Assemble a run and train it (a collective).

    Args:
        config: a checked config.
        run_dir: the run directory, claimed for this run.
        resume_from: a whole checkpoint of this run, or None.
        prompts: the training prompts.
        heldout: the prompts of evaluations.
        specs: the rewards of the config.
        stop: tells whether the run was asked to stop.
        report: writes the report of the run so far and returns its file.
        profile: the iterations that a profiler sees.

    Returns:
        The summary on rank 0; None on other ranks, and where a signal stopped the run.
    """
    check_shares(config, prompts, heldout)
    # Rank 0 makes the real recorder; its UserError (a tracker that is missing, say) ends all ranks.
    recorder = distributed.on_first_rank(lambda: Recorder(config, run_dir, report)) or Recorder(
        config, run_dir, report, main=False
    )
    recorder.note(describe(distributed.world_size()))
    reached = prompts_reached(config, prompts)
    # Before the model, so that the workers load their own models while it is loaded.
    with RewardPool(specs, **config.reward_pool.pool()) as pool:
        session = build(
            config,
            prompts,
            heldout[: config.eval.prompts],
            specs,
            pool=pool,
            reached=reached,
            stop=stop,
            note=recorder.note,
        )
        # Micro-batch sizes are measured with real embeddings, and a resumed run keeps the sizes
        # that it began with: other sizes would change its last bits.
        embedded = list(range(len(prompts))) if reached is None else reached
        choose(
            session, embedded, load.read_state(resume_from).get("config") if resume_from else None
        )
        summary = Trainer(session, recorder, profile).run(resume_from)
    session.runtime.close()
    return summary
