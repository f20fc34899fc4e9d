"""All numbers of a dry run."""

from __future__ import annotations

from dataclasses import dataclass

from tempflow.config import Config
from tempflow.errors import UserError
from tempflow.estimate.costs import Phase, phases
from tempflow.estimate.disk import Disk, disk
from tempflow.estimate.memory import Memory, memory_of
from tempflow.estimate.model import Model
from tempflow.estimate.zero import Zero
from tempflow.models.embeddings import KEPT
from tempflow.models.loading import check_size


@dataclass(frozen=True)
class Estimate:
    """What a run on `gpus` GPUs of `card` bytes each needs."""

    model: str
    gpus: int
    card: int
    speed: float
    """Operations that a GPU makes in a second."""
    parameters: int
    """Elements of the transformer as it is trained."""
    trained: int
    """Those of them that are."""
    memory: Memory
    disk: Disk
    phases: list[Phase]

    @property
    def total(self) -> int:
        return self.memory.total

    @property
    def fits(self) -> bool:
        return self.total <= self.card

    def phase(self, name: str) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)

    @property
    def seconds(self) -> float:
        """Of an iteration, evaluations and audits spread over all."""
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
    """Numbers of a run, from the config and the model's JSON files.

    prompts: how many the training file holds.
    images: the most that one of them brings; None: as many as the family takes, none where it needs
    none.

    Raises UserError where the run would: an unusable model or size, fewer units of work than GPUs,
    an ill-typed DeepSpeed key.
    """
    model = Model(config, images)
    check_size(model.path, model.size)
    units = config.data.prompts_per_iteration * config.plan().seeds
    if units < gpus:
        raise UserError(
            f"data.prompts_per_iteration x rollout.plan.seeds: {units} units for {gpus} GPUs"
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
    """The disk that a run's checkpoints take, from the config and the model's JSON files; as quick
    as making the transformer on the meta device. UserError as `estimate`."""
    model = Model(config)
    return disk(config, Zero(config.deepspeed, 1, model.weights, model.trained_in))
