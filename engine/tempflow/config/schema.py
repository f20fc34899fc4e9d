"""The whole config: all sections together, and what is derived from several keys.

Every key is a field of a section in `tempflow.config.sections`, with its help beside it. The value
of a component is a name or a table, whose options are those of the component's class
(`tempflow.registry`); after parsing it is a table with all options. The `deepspeed` section is
passed to DeepSpeed unchanged, except that the engine sets the batch sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from tempflow import registry
from tempflow.config.checks import (
    check_adapt,
    check_averages,
    check_compiled,
    check_deepspeed,
    check_groups,
    check_maps,
    check_penalty,
    check_quantized,
    check_shared_base,
    check_values,
    check_weighting,
    resolve_components,
)
from tempflow.config.checks_eval import check_eval, check_stop
from tempflow.config.fields import Section
from tempflow.config.sections import (
    Checkpoint,
    Data,
    Eval,
    Logging,
    Model,
    RewardPoolSection,
    Rollout,
    Training,
)

if TYPE_CHECKING:
    from tempflow.advantages.base import Advantage
    from tempflow.objectives.base import Objective
    from tempflow.penalties import Penalty
    from tempflow.sampling.plans.base import Plan
    from tempflow.sampling.steps import Sde


class Config(Section):
    """A checked config. Fields are the sections of the JSON file, by their names."""

    model: Model
    data: Data
    rollout: Rollout = Rollout()
    rewards: dict[str, Any]
    reward_pool: RewardPoolSection = RewardPoolSection()
    training: Training = Training()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="passed to DeepSpeed unchanged"
    )

    @model_validator(mode="after")
    def _agree(self) -> Config:
        # In this order: the other checks read the ZeRO stage and build the components.
        check_deepspeed(self)
        resolve_components(self)
        for check in (
            check_averages,
            check_groups,
            check_values,
            check_maps,
            check_adapt,
            check_weighting,
            check_penalty,
            check_compiled,
            check_shared_base,
            check_quantized,
            check_eval,
            check_stop,
        ):
            check(self)
        return self

    def plan(self) -> Plan:
        """A new plan, prepared for this run's grid and seed."""
        plan = registry.build("plan", self.rollout.plan)
        with registry.keyed("rollout.plan", type(plan)):
            plan.prepare(self.rollout.num_steps, self.training.seed)
        return plan

    def sde(self) -> Sde:
        """A new stochastic step."""
        return registry.build("sde", self.rollout.sde)

    def advantage(self) -> Advantage:
        """A new function from rewards to advantages."""
        return registry.build("advantage", self.training.advantage)

    def objective(self) -> Objective:
        """A new objective, the loss that an update minimizes."""
        return registry.build("objective", self.training.objective)

    def penalty(self) -> Penalty | None:
        """A new penalty, the divergence that is added to the loss; None without one."""
        return registry.build("penalty", self.training.penalty) if self.training.penalty else None

    def may_share_base(self) -> bool:
        """Whether rollouts may read the frozen weights of the training engine.

        The dtypes must agree too, which `training.precision.shares_base` checks: model.dtype
        "auto" is known only on the device.
        """
        # At stage 3 these weights are spread over the ranks: a forward outside the engine would not
        # gather them.
        return (
            self.model.lora is not None
            and self.model.share_base is not False
            and self.rollout.replica
            and self.zero_stage() < 3
        )

    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 to 3."""
        return self.deepspeed.get("zero_optimization", {}).get("stage", 0)

    def averaging(self) -> str | None:
        """Which key of `training` averages the weights: "ema", "merge" or None."""
        return "ema" if self.training.ema else "merge" if self.training.merge else None

    def averaged_copies(self) -> int:
        """How many copies of the trained weights the average holds between updates."""
        merge = self.training.merge
        # With a scale the weights before training as well.
        return merge.last + (merge.scale > 1) if merge else 1 if self.training.ema else 0

    def needs_reference(self) -> bool:
        """Whether the policy before training is kept in memory and forwarded."""
        penalty = self.penalty()
        return penalty is not None and penalty.needs_reference

    def eval_guidance(self) -> float:
        """Guidance scale of evaluations."""
        own = self.eval.guidance_scale
        return self.rollout.scale if own is None else own

    def best_metric(self) -> str:
        """The metric whose highest value makes a checkpoint the best one."""
        # A rule with patience says that more of its metric is better. Someone who watches for
        # reward hacking in this way must not get the checkpoint chosen by the hacked reward. The
        # bounds below and above say nothing about which checkpoint is better.
        rule = self.eval.stop
        return rule.metric if rule and rule.patience else "eval/reward"
