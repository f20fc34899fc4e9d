"""What the keys of a config must agree on, beyond the type and range of each; nothing here needs a
model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tempflow import registry
from tempflow.errors import UserError, shown
from tempflow.run.metrics import DRIFT, describe
from tempflow.types import Row, Unit

if TYPE_CHECKING:
    from tempflow.config.schema import Config
    from tempflow.sampling.plans.base import Plan


def resolve_components(config: Config) -> None:
    """Replace every component's value by the table of its type and all options. ValueError with a
    line for each that is refused."""
    refused = []
    for key, kind in registry.IN_CONFIG.items():
        section, name = key.split(".")
        table = getattr(config, section)
        try:
            if getattr(table, name) is not None:
                setattr(table, name, registry.resolve(kind, getattr(table, name)))
                getattr(config, name)()
        except UserError as error:
            refused.append(str(error))
    if refused:
        raise ValueError("\n".join(refused))


def check_averages(config: Config) -> None:
    if config.training.ema and config.training.merge:
        raise ValueError(
            "training.merge: excludes training.ema, because both say which weights are evaluated;"
            " set one of them to null"
        )


def check_groups(config: Config) -> None:
    plan, over, objective = config.plan(), config.advantage().over, config.objective()
    if objective.wants == "states" and not any(row.noise for row in plan.rows(Unit(0, 0, 0, 0), 0)):
        raise ValueError(
            f"rollout.plan: {config.rollout.plan['type']} takes no noise, so it leaves no state to"
            ' train on; training.objective must learn from finished latents, as "nft" does'
        )
    if objective.compares_children and _most_children(plan) < 2:
        raise ValueError(
            f"training.objective: {config.training.objective['type']} compares the children of a"
            f" state; this rollout.plan ({config.rollout.plan['type']}) has one child each. Plans"
            " whose states have several: tempflow (children from 2 on) and tree"
        )
    counts = config.rollout.plan.get("children")
    if (
        isinstance(counts, list)
        and 1 in counts
        and over in ("seed", "state")
        and objective.wants == "states"
    ):
        raise ValueError(
            f'rollout.plan.children: a group of one, over "{over}", has no advantage; at least 2'
            f" are needed, got {shown(counts)}"
        )
    if _largest_group(config, over) > 1:
        return
    if "children" in config.rollout.plan:
        raise ValueError(
            "rollout.plan.children: a group of one has no advantage; at least 2 are needed"
        )
    if over in ("seed", "state"):
        raise ValueError(
            f'training.advantage.over: "{over}" groups the children of a state; '
            f'plan {config.rollout.plan["type"]} has one child each and needs "prompt"'
        )
    raise ValueError("rollout.plan.seeds: a group of one has no advantage; at least 2 are needed")


def _most_children(plan: Plan) -> int:
    """Of one state, in the first iteration."""
    from tempflow.sampling.layout import states_of

    return max(map(len, states_of(plan.rows(Unit(0, 0, 0, 0), 0)).values()), default=0)


def check_values(config: Config) -> None:
    plan, advantage, objective = (
        table["type"]
        for table in (config.rollout.plan, config.training.advantage, config.training.objective)
    )
    needed, valued = (
        config.advantage().needs_values,
        any(row.value for row in config.plan().rows(Unit(0, 0, 0, 0), 0)),
    )
    if needed and not valued:
        raise ValueError(
            f"training.advantage: {advantage} compares the values of a path's states, which plan"
            f' {plan} does not have; take plan "flow_grpo" or "mix_grpo" with rollout.plan.values'
            " true"
        )
    if valued and config.objective().wants == "endpoints":
        raise ValueError(
            f"rollout.plan.values: true, but training.objective {objective} learns from finished"
            " latents, not from states"
        )
    noise = config.rollout.adapt and config.rollout.adapt.noise
    if valued and not needed and not noise:
        raise ValueError(
            "rollout.plan.values: true costs a row for each state, which training.advantage"
            f" {advantage} makes no use of; dense, stepwise and turning_point do, and"
            " rollout.adapt.noise"
        )


def _largest_group(config: Config, over: str) -> int:
    """How many slots of the first iteration are compared with each other at most; 2 stands for
    more."""
    from tempflow.sampling.layout import Layout, iteration_units

    plan = config.plan()
    several = {"prompt": plan.seeds, "step": plan.seeds * config.data.prompts_per_iteration}
    if max(plan.children, several.get(over, 1)) > 1:
        return 2
    units = iteration_units([0], min(plan.seeds, 2))
    slots = Layout(
        units,
        [plan.rows(unit, 0) for unit in units],
        endpoints=config.objective().wants == "endpoints",
    ).slots
    labels = slots.groups(over).tolist()
    return max(map(labels.count, set(labels)), default=0)


def check_weighting(config: Config) -> None:
    weighting, objective = config.training.weighting, config.objective()
    if weighting in ("noise", "uniform") or objective.wants == "states":
        return
    said = "guard" if weighting == "guard" else {"value": weighting.value}  # type: ignore[union-attr]  # neither of the names, so a table
    raise ValueError(
        f"training.weighting: {shown(said)} weighs the stochastic steps of a rollout;"
        " training.objective "
        f'"{config.training.objective["type"]}" learns from finished latents, whose states all'
        " weigh 1"
    )


def check_penalty(config: Config) -> None:
    penalty, updates, steps = config.penalty(), config.training.updates, config.rollout.num_steps
    if penalty is None:
        return
    outside = [k for k in penalty.steps or [] if k >= steps]
    if outside:
        raise ValueError(
            f"training.penalty.steps: {outside[0]} is outside the grid; allowed are 0 to"
            f" {steps - 1} (num_steps {steps})"
        )
    if not penalty.needs_reference and updates.passes * updates.parts == 1:
        raise ValueError(
            'training.penalty.to: "old" is the policy before the updates of an iteration, from'
            " which the first one has no distance; training.updates must make several"
        )


def check_adapt(config: Config) -> None:
    adapt, plan, name = config.rollout.adapt, config.plan(), config.rollout.plan["type"]
    if adapt is None:
        return
    if config.objective().wants != "states":
        objective = config.training.objective["type"]
        raise ValueError(
            "rollout.adapt: reads the rewards of states by step, and training.objective"
            f" {objective} learns from endpoints"
        )
    rows = plan.rows(Unit(0, 0, 0, 0), 0)
    if adapt.steps is not None:
        if plan.branch_steps is None or all(row.parent is None or row.value for row in rows):
            raise ValueError(
                f'rollout.adapt.steps: plan {name} has no branch steps to draw from; "tempflow" has'
            )
        if plan.branch_steps.random:
            raise ValueError(
                'rollout.adapt.steps: rollout.plan.branch_steps draws steps itself; set it to "all"'
                " or a list"
            )
        known = len(plan.branch_steps.possible(plan.num_steps))
        if adapt.steps > known:
            raise ValueError(f"rollout.adapt.steps: {adapt.steps} of {known} branch steps")
    if adapt.noise is not None:
        if not _all_completed(rows):
            raise ValueError(
                f"rollout.adapt.noise: plan {name} does not follow the ODE from each state, which"
                ' children are compared with; "tempflow" does, and "flow_grpo" and "mix_grpo" with'
                " rollout.plan.values true"
            )
        if not config.sde().takes_levels:
            raise ValueError(
                f"rollout.adapt.noise: rollout.sde {config.rollout.sde['type']} has noise of one"
                " size"
            )


def _all_completed(rows: list[Row]) -> bool:
    from tempflow.sampling.layout import Layout

    return any(row.value for row in rows) or bool(
        (Layout([rows[0].unit], [rows]).completions >= 0).all()
    )


def check_deepspeed(config: Config) -> None:
    ds = config.deepspeed
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ):
        if key in ds:
            raise ValueError(
                f"deepspeed.{key}: the engine sets it; use training.micro_batch and"
                " data.prompts_per_iteration"
            )
    for key in ("optimizer", "bf16", "fp16"):
        if not isinstance(ds.get(key, {}), dict):
            raise ValueError(f"deepspeed.{key}: expected a table, got {shown(ds[key])}")
    zero = ds.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int or not 0 <= stage <= 3:  # true is no stage, though it equals 1
        raise ValueError(
            "deepspeed.zero_optimization: expected a table with stage 0, 1, 2 or 3, got"
            f" {shown(zero)}"
        )
    half = [
        name
        for name in ("bf16", "fp16")
        if isinstance(ds.get(name), dict) and ds[name].get("enabled")
    ]
    if half and zero.get("stage", 0) == 0:
        raise ValueError(
            f"deepspeed.{half[0]}: at ZeRO stage 0 DeepSpeed keeps no fp32 weights to update; set "
            "deepspeed.zero_optimization.stage to 1, 2 or 3"
        )
    if "scheduler" in ds:
        raise ValueError(
            "deepspeed.scheduler: the engine sets the learning rate itself; use training.lr_decay"
        )
    if "optimizer" not in ds:
        raise ValueError(
            'deepspeed.optimizer: missing; for example {"type": "AdamW", "params": {"lr": 1e-4}}'
        )


def check_compiled(config: Config) -> None:
    if config.rollout.graphs and not config.rollout.replica:
        raise ValueError(
            "rollout.graphs: true needs rollout.replica; graphs read weights from fixed addresses"
        )
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    if config.training.compile != "eager" and stage == 3:
        raise ValueError(
            f'training.compile: {config.training.compile!r}; at ZeRO stage 3 only "eager" is'
            " allowed"
        )
    if config.training.compile != "eager" and config.training.reference in ("sharded", "offloaded"):
        raise ValueError(
            f'training.reference: {config.training.reference!r} needs training.compile "eager"'
        )
    if (config.rollout.lanes or 1) > 1 and (config.rollout.graphs or not config.rollout.replica):
        raise ValueError(
            "rollout.lanes: with rollout.graphs, or without rollout.replica, only 1 is allowed"
        )
    suffix = config.rollout.suffix
    if suffix and suffix.weights == "float8" and not config.rollout.replica:
        raise ValueError(
            'rollout.suffix.weights: "float8" needs rollout.replica, whose weights it is made from'
        )
    if config.rollout.compile != "eager" and not config.rollout.replica:
        raise ValueError("rollout.compile: without rollout.replica rollouts use training.compile")


def check_shared_base(config: Config) -> None:
    """What `model.share_base: true` needs; the dtypes are compared where the device is known."""
    if not config.model.share_base or config.may_share_base():
        return
    if config.model.lora is None:
        raise ValueError(
            "model.share_base: true needs model.lora; without adapters every weight is trained"
        )
    if not config.rollout.replica:
        raise ValueError(
            "model.share_base: true needs rollout.replica; without it there is one transformer"
            " already"
        )
    raise ValueError(
        "model.share_base: true needs ZeRO stage 0, 1 or 2; at stage 3 the base is spread over the"
        " ranks. Leave it null, or set rollout.replica to false"
    )


def check_quantized(config: Config) -> None:
    """What `model.quantize` needs; the dtypes are compared where the device is known."""
    if config.model.quantize is None:
        return
    asked, suffix = f'model.quantize: "{config.model.quantize}"', config.rollout.suffix
    if config.model.lora is None:
        raise ValueError(f"{asked} needs model.lora; quantized weights cannot be trained")
    if config.deepspeed.get("zero_optimization", {}).get("stage", 0) == 3:
        raise ValueError(
            f"{asked} needs ZeRO stage 0, 1 or 2; stage 3 spreads parameters over the ranks, and"
            " packed weights are none"
        )
    if config.model.share_base is False and config.rollout.replica:
        raise ValueError(
            f"{asked} excludes model.share_base false: adapters cannot be merged into packed"
            " weights, so a second copy of them would serve nothing"
        )
    if suffix and suffix.weights == "float8":
        raise ValueError(
            f'{asked} excludes rollout.suffix.weights "float8", a second copy of the same layers'
        )


def check_eval(config: Config) -> None:
    neighbors = config.eval.precision_recall
    if neighbors is None:
        return
    if neighbors >= config.eval.prompts:
        raise ValueError(
            f"eval.precision_recall: {neighbors} neighbors need more images than that; eval.prompts"
            f" is {config.eval.prompts}"
        )
    for name in ("precision", "recall"):
        if name in config.rewards:
            raise ValueError(
                f"rewards.{name}: eval/{name} is that of eval.precision_recall; give the reward"
                " another name"
            )


def check_stop(config: Config) -> None:
    rule, plan = config.eval.stop, config.plan()
    if rule is None:
        return
    if not config.data.heldout or not config.eval.every:
        raise ValueError("eval.stop: there are no evaluations; set data.heldout and eval.every")
    if rule.patience is None and rule.below is None and rule.above is None:
        raise ValueError("eval.stop: set patience, below or above")
    known = ["eval/reward", *(f"eval/{name}" for name in config.rewards)]
    known += ["kl"] if config.training.penalty else []
    known += ["diversity/seeds"] if plan.seeds > 1 else []
    known += ["diversity/children"] if plan.children > 1 else []
    known += [key for key in DRIFT if key.startswith("drift/") or config.eval.precision_recall]
    if rule.metric not in known:
        raise ValueError(f"eval.stop.metric: {shown(rule.metric)}; this run has {', '.join(known)}")
    metric = describe(rule.metric)
    if rule.patience and metric and metric.better == "lower":
        raise ValueError(
            f"eval.stop.patience: it waits for {rule.metric} to rise, and lower is better there;"
            " use eval.stop.above"
        )
