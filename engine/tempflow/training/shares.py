"""What a run's work is and how it is shared out among ranks: known before anything is started."""

from __future__ import annotations

from tempflow.config import Config
from tempflow.data.prompts import PromptOrder
from tempflow.errors import UserError
from tempflow.models import family_of, most_images
from tempflow.training import distributed
from tempflow.types import Example


def check_shares(config: Config, prompts: list[Example], heldout: list[Example]) -> None:
    """UserError where the run's work cannot be shared out among the ranks; before anything is
    started."""
    units, seeds = (
        config.data.prompts_per_iteration * config.plan().seeds,
        "data.prompts_per_iteration x rollout.plan.seeds",
    )
    if units < distributed.world_size():
        raise UserError(f"{seeds}: {units} units for {distributed.world_size()} ranks")
    heldout = heldout[: config.eval.prompts]
    if heldout and len(heldout) < distributed.world_size():
        raise UserError(
            f"data.heldout, eval.prompts: {len(heldout)} prompts for {distributed.world_size()}"
            " ranks"
        )
    # Under ZeRO-3 a forward of the engine is a collective: a rank with fewer of them would leave
    # the others waiting.
    if config.rollout.replica or not _sharded(config):
        return
    if distributed.world_size() > 1 and family_of(config.model.path).ragged_with(
        most_images([*prompts, *heldout])
    ):
        raise UserError(
            "rollout.replica: false under ZeRO-3 needs as many forwards on every rank, but the"
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
                " under ZeRO-3 every rank must have as many"
            )


def check_guided_forwards(config: Config) -> None:
    """UserError where guidance needs a forward of two lengths through an engine of ZeRO-3, and the
    family has none; before the model is loaded."""
    family = family_of(config.model.path)
    if not _sharded(config) or getattr(family, "joins_lengths", True):
        return
    scales = {"rollout.guidance_scale": config.rollout.guidance_scale}
    if config.eval.every and config.data.heldout and not config.rollout.replica:
        # With a copy evaluations do not go through the engine.
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
    """Whether a prompt and its negative prompt share a forward where their lengths differ: see
    `tempflow.models.guidance`."""
    family = family_of(config.model.path)
    return (
        _sharded(config)
        and family.ragged
        and family.default_negative_prompt is not None
        and family.guides(config.rollout.guidance_scale)
    )


def _sharded(config: Config) -> bool:
    return config.deepspeed.get("zero_optimization", {}).get("stage", 0) == 3


def prompt_order(config: Config, prompts: list[Example]) -> PromptOrder:
    """The order in which the run meets its prompts."""
    return PromptOrder(len(prompts), config.data.prompts_per_iteration, config.training.seed)


def prompts_reached(config: Config, prompts: list[Example]) -> list[int] | None:
    """The training prompts that the run will ask for, by place; None: perhaps all of them."""
    return (
        None
        if config.data.curation
        else prompt_order(config, prompts).reached(config.training.iterations)
    )
