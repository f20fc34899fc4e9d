"""The parts of a run, assembled in one place. Training, evaluation, benchmarks and tests use the
same objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, cast

import numpy as np
import torch

from tempflow.advantages import Advantage
from tempflow.config import Config
from tempflow.errors import UserError
from tempflow.models import Policy, Shape
from tempflow.models.embeddings import EmbeddingCache
from tempflow.models.opened import Opened, open_model
from tempflow.objectives import Objective
from tempflow.penalties import Penalty
from tempflow.rewards import RewardPool, RewardSpec, fits, probe
from tempflow.sampling.float8 import Float8Copy
from tempflow.sampling.graphs import CudaCapture, GraphCache
from tempflow.sampling.plans.base import Plan
from tempflow.sampling.steps import Grid, jittered
from tempflow.training import distributed
from tempflow.training.averaged import Averaged
from tempflow.training.device import Threads, cores_per_rank, device
from tempflow.training.ema import Average
from tempflow.training.engine import Runtime, compile_blocks
from tempflow.training.merge import Merge
from tempflow.training.precision import shares_base
from tempflow.training.rehearsal import may_capture
from tempflow.types import Example, State, Unit


@dataclass
class Session(Opened):
    """The parts of a run. A part that is None is switched off in the config, or belongs to training
    in a session that does not train."""

    pool: RewardPool
    """The reward workers."""
    specs: list[RewardSpec]
    """All rewards of the config, watched ones included."""
    prompts: list[Example]
    """The training prompts."""
    threads: Threads
    """The number of CPU threads, which depends on whether reward workers are busy."""
    float8: Float8Copy | None = None
    """The copy of the transformer for coarse steps, if `rollout.suffix.weights` is "float8"."""
    graphs: GraphCache | None = None
    """Captures the rollout's forwards; None: they run eagerly."""
    runtime: Runtime = None  # type: ignore[assignment]  # only sessions that train have one
    """The training engine."""
    average: Averaged | None = None
    """The average of the trained weights."""
    heldout: list[Example] = field(default_factory=list)
    """The prompts of evaluations."""
    stop: Callable[[], bool] = lambda: False
    """Tells whether the run was asked to stop."""
    note: Callable[[str], None] = print
    """Shows a line of text to the user."""
    plan: Plan = field(init=False)
    advantage: Advantage = field(init=False)
    objective: Objective = field(init=False)
    penalty: Penalty | None = field(init=False)
    fitting: np.ndarray = field(init=False)
    """bool [prompts, R]: whether each prompt is scored by each of the R trained rewards."""
    lanes: int = field(init=False)
    """The number of shares of a rank's rollout that run at the same time, in a thread each."""

    def __post_init__(self):
        c = self.config
        self.plan, self.advantage, self.objective, self.penalty = (
            c.plan(),
            c.advantage(),
            c.objective(),
            c.penalty(),
        )
        self.fitting = fits(self.trained, [p.metadata for p in self.prompts])
        # One lane per core on a CPU, one lane on a GPU. One as well without a rollout copy: its
        # forwards may be collectives, which must come in the same order on all ranks.
        on_cpu = self.policy.device.type == "cpu"
        self.lanes = c.rollout.lanes or (cores_per_rank() if on_cpu and c.rollout.replica else 1)

    def variant(self, config: Config, graphs: GraphCache | None = None) -> Session:
        """A session with the same model, prompts and workers, but another plan, objective or
        rollout, for comparisons.

        Args:
            config: the other config.
            graphs: captured forwards to use; None: a new cache if the config asks for graphs.
        """
        graphs = make_graphs(config, self.policy, self.note) if graphs is None else graphs
        return assemble(
            config,
            self.policy,
            self.embeddings,
            self.pool,
            self.specs,
            self.prompts,
            threads=self.threads,
            graphs=graphs,
            runtime=self.runtime,
            heldout=self.heldout,
            stop=self.stop,
            note=self.note,
        )

    @property
    def trained(self) -> list[RewardSpec]:
        """The rewards that are trained on."""
        return [spec for spec in self.specs if not spec.watched]

    def grid_of(self, iteration: int, levels: list[float] | None = None) -> Grid:
        """The sampling grid of an iteration's rollout.

        Args:
            iteration: its number, which `rollout.jitter` depends on.
            levels: factors of the noise of every step, [T]; None: 1.
        """
        sigmas, sde = (
            jittered(
                self.grid.sigmas, self.config.rollout.jitter, self.config.training.seed, iteration
            ),
            self.config.sde(),
        )
        if levels is not None:
            # config.checks lets only an SDE that `takes_levels` come here.
            return Grid(sigmas, cast(Any, sde).coefficients(sigmas, levels))
        # Without jitter the grid of the config is reused, whose tensors are on the device already.
        return self.grid if sigmas is self.grid.sigmas else Grid(sigmas, sde.coefficients(sigmas))

    def embed(self, units: list[Unit]) -> dict[str, torch.Tensor]:
        """The conditioning of n units whose prompts have one shape: tensors [n, ...] by name."""
        return self.embed_prompts([unit.prompt_id for unit in units])

    def embed_prompts(self, ids: list[int]) -> dict[str, torch.Tensor]:
        """The conditioning of training prompts of one shape. ids: their places in the file."""
        return self.embeddings.get([self.prompts[id] for id in ids])

    def shapes(self, states: list[State]) -> list[Shape]:
        """The shape of the conditioning of each state's prompt."""
        return self.embeddings.shapes([self.prompts[state.unit.prompt_id] for state in states])


def build(
    config: Config,
    prompts: list[Example],
    heldout: list[Example],
    specs: list[RewardSpec],
    *,
    pool: RewardPool | None = None,
    reached: list[int] | None = None,
    train: bool = True,
    stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = print,
) -> Session:
    """Open a run's model and assemble the run around it (a collective).

    Args:
        config: a checked config.
        prompts: the training prompts.
        heldout: the prompts of evaluations.
        specs: the rewards of the config.
        pool: reward workers to use; None: new ones, which load while the model is loaded.
        reached: places of the training prompts that the run will use; None: all.
        train: whether to build the training engine.
        stop: tells whether the run was asked to stop; called between forwards.
        note: shows a line of text to the user.

    Raises:
        UserError: a part refuses the config.
    """
    threads = Threads(config)
    pool = pool or RewardPool(specs, **config.reward_pool.pool())
    # Before the model is loaded, while the GPU's memory is free for the child process.
    captures = may_capture(config, device(), note) if train else False
    # Only prompts that the run will reach are embedded.
    chosen = [prompts[i] for i in (range(len(prompts)) if reached is None else reached)]
    opened = open_model(
        config, chosen + heldout, device(), note, denoiser=not train or _has_own_copy(config, note)
    )
    policy = opened.policy
    runtime = Runtime(config, policy) if train else None
    return assemble(
        config,
        policy,
        opened.embeddings,
        pool,
        specs,
        prompts,
        heldout=heldout,
        runtime=runtime,
        threads=threads,
        stop=stop,
        note=note,
        average=make_average(config, runtime) if runtime else None,
        graphs=make_graphs(config, policy, note) if captures else None,
    )


def _has_own_copy(config: Config, note: Callable[[str], None]) -> bool:
    """Whether the rollout copy has its own weights, which are loaded with the policy. Otherwise the
    training engine provides the policy's denoiser."""
    shared = shares_base(config)
    if config.may_share_base() and not shared:
        note(
            "model.share_base: model.dtype is not the dtype that the deepspeed section trains in,"
            " so rollouts have their own copy of the frozen weights"
        )
    return config.rollout.replica and not shared


def assemble(
    config: Config,
    policy: Policy,
    embeddings: EmbeddingCache,
    pool: RewardPool,
    specs: list[RewardSpec],
    prompts: list[Example],
    *,
    threads: Threads | None = None,
    **more,
) -> Session:
    """A session around a policy that was opened before.

    Args:
        config: a checked config.
        policy: the policy, with its denoiser.
        embeddings: those of the prompts.
        pool: the reward workers.
        specs: the rewards of the config.
        prompts: the training prompts.
        threads: None: new ones for the config.
        more: further fields of `Session`.
    """
    threads, float8 = threads or Threads(config), make_float8(config, policy)
    return Session(config, policy, embeddings, pool, specs, prompts, threads, float8=float8, **more)


def make_average(config: Config, runtime: Runtime) -> Averaged | None:
    """The average of the trained weights, if the config asks for one (a collective)."""
    ema, merge = config.training.ema, config.training.merge
    if ema:
        return Average(runtime, ema.decay, ema.every)
    return Merge(runtime, **merge.model_dump()) if merge else None


def make_graphs(
    config: Config, policy: Policy, note: Callable[[str], None], capture: Callable | None = None
) -> GraphCache | None:
    """The cache of captured forwards, if the config asks for it and there is a GPU.

    Args:
        config: a checked config.
        policy: the policy that rolls out.
        note: is told if there is no GPU.
        capture: captures a forward; None: `CudaCapture`. With one, no GPU is needed.
    """
    r = config.rollout
    if not r.graphs:
        return None
    if policy.device.type != "cuda" and capture is None:
        note("rollout.graphs: no GPU, so rollouts run eagerly")
        return None
    return GraphCache(
        capture or CudaCapture(),
        limit_bytes=r.graph_limit_mb << 20,
        verify=r.graph_verify,
        note=note,
    )


def make_float8(config: Config, policy: Policy) -> Float8Copy | None:
    """The float8 copy of the policy's transformer, if the config's suffix asks for it."""
    suffix = config.rollout.suffix
    if not suffix or suffix.weights != "float8":
        return None
    made = Float8Copy(policy.denoiser())
    compile_blocks(made.transformer, config.rollout.compile)
    return made


def check_rewards(session: Session) -> None:
    """Score a test batch before the base is evaluated (a collective).

    Raises:
        UserError: a reward does not return numbers; on every rank.
    """
    session.pool.wait_ready()
    # Rank 0 tests for all: rewards are the same on every rank, and servers are asked once.
    trouble, prompts = None, session.heldout + session.prompts
    if distributed.rank() == 0:
        try:
            probe(
                session.pool,
                session.specs,
                [p.text for p in prompts],
                [p.for_rewards for p in prompts],
                session.sampler.size,
            )
        except UserError as error:
            trouble = str(error)
    if trouble := distributed.agree_on(trouble):
        raise UserError(trouble)
