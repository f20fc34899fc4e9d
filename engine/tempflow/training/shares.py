"""Checks, before anything is started, that a run's work can be shared among its ranks, and tells
which prompts the run will reach."""

from __future__ import annotations

from tempflow.config import Config
from tempflow.data.prompts import PromptOrder
from tempflow.errors import UserError, counted
from tempflow.models import family_of, most_images
from tempflow.training import distributed
from tempflow.types import Example


def check_shares(config: Config, prompts: list[Example], heldout: list[Example]) -> None:
    """Refuse a run whose work cannot be shared among the ranks.

    Args:
        config: a checked config.
        prompts: the training prompts.
        heldout: the prompts of `data.heldout`.

    Raises:
        UserError: there are fewer units or held-out prompts than ranks; or rollouts go through an
            engine of ZeRO-3, and the ranks would make unequal numbers of forwards.
    """
    units, seeds = (
        config.data.prompts_per_iteration * config.plan().seeds,
        "data.prompts_per_iteration x rollout.plan.seeds",
    )
    if units < distributed.world_size():
        raise UserError(
            f"{seeds}: {counted(units, 'unit')} for {distributed.world_size()} ranks; every"
            " rank needs one"
        )
    heldout = heldout[: config.eval.prompts]
    if heldout and len(heldout) < distributed.world_size():
        raise UserError(
            f"data.heldout, eval.prompts: {counted(len(heldout), 'prompt')} for"
            f" {distributed.world_size()} ranks; every rank needs one"
        )
    # Under ZeRO-3 a forward of the engine is a collective: a rank with fewer forwards would leave
    # the others waiting. With a rollout copy, rollouts and evaluations do not use the engine.
    if config.rollout.replica or not _sharded(config):
        return
    if distributed.world_size() > 1 and family_of(config.model.path).ragged_with(
        most_images([*prompts, *heldout])
    ):
        raise UserError(
            "rollout.replica: false under ZeRO-3 needs equally many forwards on every rank, but the"
            " prompts of this model differ in shape, and so does the number of their batches; set"
            " rollout.replica to true"
        )
    shared = {seeds: units} | (
        {"data.heldout, eval.prompts": len(heldout)} if config.eval.every else {}
    )
    for key, count in shared.items():
        if count % distributed.world_size():
            raise UserError(
                f"{key}: {count} for {distributed.world_size()} ranks; with rollout.replica false"
                " under ZeRO-3 the number must be a multiple of the number of ranks"
            )


def check_guided_forwards(config: Config) -> None:
    """Refuse guidance that needs a forward of two text lengths through an engine of ZeRO-3, for
    families that cannot join them.

    Raises:
        UserError: names the guidance scale to change.
    """
    family = family_of(config.model.path)
    if not _sharded(config) or getattr(family, "joins_lengths", True):
        return
    scales = {"rollout.guidance_scale": config.rollout.guidance_scale}
    if config.eval.every and config.data.heldout and not config.rollout.replica:
        # With a rollout copy, evaluations do not go through the engine.
        scales["eval.guidance_scale"] = config.eval_guidance()
    for key, scale in scales.items():
        if family.guides(scale):
            name = family.__name__.removesuffix("Policy")
            raise UserError(
                f"{key}: {scale:g} at deepspeed.zero_optimization.stage 3, where a prompt and its"
                f" negative prompt share a forward, and {name} takes only texts of one length in a"
                " forward; set the scale to 1, or the stage to 2"
            )


def guides_in_one(config: Config) -> bool:
    """Whether a prompt and its negative prompt share a forward although their lengths differ: see
    `tempflow.models.guidance`."""
    # ZeRO-3 takes one forward of its engine before each backward.
    family = family_of(config.model.path)
    return (
        _sharded(config)
        and family.ragged
        and family.default_negative_prompt is not None
        and family.guides(config.rollout.guidance_scale)
    )


def _sharded(config: Config) -> bool:
    """Whether ZeRO-3 cuts the weights into slices, so that a forward is a collective."""
    return config.deepspeed.get("zero_optimization", {}).get("stage", 0) == 3


def prompt_order(config: Config, prompts: list[Example]) -> PromptOrder:
    """The order in which the run uses its prompts."""
    return PromptOrder(len(prompts), config.data.prompts_per_iteration, config.training.seed)


def prompts_reached(config: Config, prompts: list[Example]) -> list[int] | None:
    """Places of the training prompts that the run will use; None: possibly all."""
    # Curation chooses prompts by their rewards, which are not known yet.
    return (
        None
        if config.data.curation
        else prompt_order(config, prompts).reached(config.training.iterations)
    )
