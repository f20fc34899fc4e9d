"""The JSON config of a run: its keys, their types, defaults and meaning.

Every key is a field of a section in `tempflow.config.sections`, with its help beside it; here the
sections meet, and what they must agree on is checked. A component's value is a name or a table; its
options are those of its class, which `tempflow.registry` finds, and after parsing the table holds
all of them. The `deepspeed` section is passed on verbatim, less the batch sizes, which the engine
sets itself.
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
    check_eval,
    check_groups,
    check_penalty,
    check_quantized,
    check_shared_base,
    check_stop,
    check_values,
    check_weighting,
    resolve_components,
)
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
        default_factory=dict, description="passed to DeepSpeed as it stands"
    )

    @model_validator(mode="after")
    def _agree(self) -> Config:
        check_deepspeed(self)
        resolve_components(self)
        for check in (
            check_averages,
            check_groups,
            check_values,
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
        """Which latents an iteration integrates, prepared for this run."""
        plan = registry.build("plan", self.rollout.plan)
        with registry.keyed("rollout.plan", type(plan)):
            plan.prepare(self.rollout.num_steps, self.training.seed)
        return plan

    def sde(self) -> Sde:
        """The stochastic step."""
        return registry.build("sde", self.rollout.sde)

    def advantage(self) -> Advantage:
        """From rewards to advantages."""
        return registry.build("advantage", self.training.advantage)

    def objective(self) -> Objective:
        """What an update minimizes."""
        return registry.build("objective", self.training.objective)

    def penalty(self) -> Penalty | None:
        """What holds the policy to another; None: nothing."""
        return registry.build("penalty", self.training.penalty) if self.training.penalty else None

    def may_share_base(self) -> bool:
        """Whether rollouts may read the training engine's frozen weights, if the dtypes of both
        agree."""
        stage = self.deepspeed.get("zero_optimization", {}).get("stage", 0)
        return (
            self.model.lora is not None
            and self.model.share_base is not False
            and self.rollout.replica
            and stage < 3
        )

    def averaging(self) -> str | None:
        """The key of `training` by which weights are averaged: "ema", "merge" or None."""
        return "ema" if self.training.ema else "merge" if self.training.merge else None

    def averaged_copies(self) -> int:
        """Copies of the trained weights that an average holds between updates."""
        return self.training.merge.last if self.training.merge else 1 if self.training.ema else 0

    def needs_reference(self) -> bool:
        """Whether the policy before training is kept and forwarded."""
        penalty = self.penalty()
        return penalty is not None and penalty.needs_reference

    def eval_guidance(self) -> float:
        """Guidance scale of evaluations."""
        own = self.eval.guidance_scale
        return self.rollout.scale if own is None else own

    def best_metric(self) -> str:
        """Whose highest value makes a checkpoint the best: what `eval.stop` waits to rise, else the
        held-out reward."""
        rule = self.eval.stop
        return rule.metric if rule and rule.patience else "eval/reward"
