"""Compute all numbers of a dry run: `estimate`, and `disk_of` for the disk alone."""

from __future__ import annotations

from dataclasses import dataclass

from tempflow.config import Config
from tempflow.errors import UserError, counted
from tempflow.estimate.costs import Phase, phases
from tempflow.estimate.disk import Disk, disk
from tempflow.estimate.memory import Memory, memory_of
from tempflow.estimate.model import Model
from tempflow.estimate.zero import Zero
from tempflow.models.embeddings import KEPT
from tempflow.models.loading import check_size

# Share of a card that a run should leave for what is not counted: fragmentation, NCCL's buffers.
ROOM = 0.05


@dataclass(frozen=True)
class Estimate:
    """What a run needs, on `gpus` GPUs with `card` bytes of memory each."""

    model: str
    """Path or hub id."""
    gpus: int
    card: int
    speed: float
    """Floating point operations per second of one GPU."""
    parameters: int
    """Elements of the transformer's weights, with adapters."""
    trained: int
    """Elements of those that are trained."""
    memory: Memory
    disk: Disk
    phases: list[Phase]

    @property
    def total(self) -> int:
        """Bytes of one GPU at the moment when it holds most."""
        return self.memory.total

    @property
    def fits(self) -> bool:
        """Whether the run fits the GPU's memory."""
        return self.total <= self.card

    @property
    def has_room(self) -> bool:
        """Whether it also leaves room for what is not counted."""
        return self.total <= self.most

    @property
    def most(self) -> int:
        """Most bytes with which a run has room on the GPU."""
        return self.card - int(ROOM * self.card)

    def phase(self, name: str) -> Phase | None:
        """The phase of that name; None if the run does not have it."""
        return next((phase for phase in self.phases if phase.name == name), None)

    @property
    def seconds(self) -> float:
        """Average time of an iteration, with its share of evaluations and audits."""
        return sum(phase.seconds * phase.share for phase in self.phases)


def estimate(
    config: Config,
    *,
    gpus: int = 1,
    mfu: float = 0.4,
    card_gb: float = 80.0,
    peak_tflops: float = 989.0,
    prompts: int = KEPT,
    images: int | None = None,
) -> Estimate:
    """Estimate what a run needs, from its config and the model's JSON files.

    Args:
        config: of the run.
        gpus: number of GPUs.
        mfu: share of the peak speed that the model reaches, above 0, at most 1.
        card_gb: memory of a GPU in 10^9 bytes.
        peak_tflops: peak speed of a GPU in 10^12 operations per second.
        prompts: number of training prompts.
        images: most condition images of one prompt; None: as many as the model family takes, and
            none if it needs none.

    Raises:
        UserError: as the run would: an unusable model or size, fewer units than GPUs, or a
            DeepSpeed key of the wrong type.
    """
    model = Model(config, images)
    # Before anything is measured: a size that the family refuses would fail deep in the model.
    check_size(model.path, model.size)
    # Units (a prompt and a seed) are dealt to ranks whole, so a rank without one would have nothing
    # to train on.
    units = config.data.prompts_per_iteration * config.plan().seeds
    if units < gpus:
        raise UserError(
            f"data.prompts_per_iteration x rollout.plan.seeds: {counted(units, 'unit')} for"
            f" {counted(gpus, 'GPU')}; expected at least one unit for each GPU"
        )
    zero, speed = (
        Zero(config.deepspeed, gpus, model.weights, model.trained_in),
        peak_tflops * 1e12 * mfu,
    )
    return Estimate(
        config.model.path,
        gpus,
        int(card_gb * 1e9),
        speed,
        model.weights.parameters,
        model.weights.trained,
        memory_of(config, model, zero, gpus, prompts),
        disk(config, zero),
        phases(config, model, gpus, speed),
    )


def disk_of(config: Config) -> Disk:
    """Estimate the disk space of a run, from its config and the model's JSON files.

    Raises:
        UserError: as `estimate`.
    """
    # Cheap enough for every start: it makes the transformer on the meta device but runs nothing.
    model = Model(config)
    return disk(config, Zero(config.deepspeed, 1, model.weights, model.trained_in))
