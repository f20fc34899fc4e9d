"""Checks of keys against each other, beyond the type and range of each; none needs a model.

Each check raises a ValueError whose text begins with a key. Pydantic collects it, and
`load.parse_config` raises it as a UserError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tempflow import registry
from tempflow.errors import UserError, shown
from tempflow.types import ANY_UNIT, Row

if TYPE_CHECKING:
    from tempflow.config.schema import Config
    from tempflow.sampling.plans.base import Plan


def resolve_components(config: Config) -> None:
    """Replace the value of every component by a table of its type and all options.

    Raises ValueError, with one line for each component that is refused.
    """
    refused = []  # collected, so that one start names the mistakes of all components
    for key, kind in registry.IN_CONFIG.items():
        section, name = key.split(".")
        table = getattr(config, section)
        try:
            if getattr(table, name) is not None:
                setattr(table, name, registry.resolve(kind, getattr(table, name)))
                # Make it once as a run does: a plan checks its options against num_steps.
                getattr(config, name)()
        except UserError as error:
            refused.append(str(error))
    if refused:
        raise ValueError("\n".join(refused))


def check_averages(config: Config) -> None:
    """training.ema and training.merge exclude each other."""
    if config.training.ema and config.training.merge:
        raise ValueError(
            "training.merge: excludes training.ema, because each sets which weights are evaluated;"
            " set one of them to null"
        )


def check_groups(config: Config) -> None:
    """The plan must make what the objective trains on, in groups of at least two."""
    plan, over, objective = config.plan(), config.advantage().over, config.objective()
    if objective.wants == "states" and not any(row.noise for row in plan.rows(ANY_UNIT, 0)):
        raise ValueError(
            f"rollout.plan: {config.rollout.plan['type']} takes no noise, so there is no state to"
            ' train on; training.objective must learn from finished latents, as "nft" does'
        )
    if objective.compares_children and _most_children(plan) < 2:
        raise ValueError(
            f"training.objective: {config.training.objective['type']} compares the children of a"
            f" state, but each state of rollout.plan {config.rollout.plan['type']} has one child."
            " Plans whose states have several are tempflow (with at least 2 children) and tree"
        )
    # Checked apart from the largest group below: a list may give one branch step a single child
    # beside others with several.
    counts = config.rollout.plan.get("children")
    if (
        isinstance(counts, list)
        and 1 in counts
        and over in ("seed", "state")
        and objective.wants == "states"
    ):
        raise ValueError(
            f'rollout.plan.children: a group of one, over "{over}", has no advantage; expected at'
            f" least 2 for each step, got {shown(counts)}"
        )
    if _largest_group(config, over) > 1:
        return
    # All groups have one member. Name the key that can change that.
    if "children" in config.rollout.plan:
        raise ValueError(
            "rollout.plan.children: a group of one has no advantage; expected at least 2"
        )
    if over in ("seed", "state"):
        raise ValueError(
            f'training.advantage.over: "{over}" groups the children of a state, but each state of'
            f' rollout.plan {config.rollout.plan["type"]} has one child; set it to "prompt"'
        )
    raise ValueError("rollout.plan.seeds: a group of one has no advantage; expected at least 2")


def _most_children(plan: Plan) -> int:
    """The most children of one state in the first iteration."""
    from tempflow.sampling.layout import states_of

    return max(map(len, states_of(plan.rows(ANY_UNIT, 0)).values()), default=0)


def check_values(config: Config) -> None:
    """Rows for values of states must be both made and used."""
    plan, advantage, objective = (
        table["type"]
        for table in (config.rollout.plan, config.training.advantage, config.training.objective)
    )
    needed, valued = (
        config.advantage().needs_values,
        any(row.value for row in config.plan().rows(ANY_UNIT, 0)),
    )
    # Before the checks of what is superfluous: an advantage without its values cannot run at all.
    if needed and not valued:
        raise ValueError(
            f"training.advantage: {advantage} needs the values of states, which rollout.plan"
            f' {plan} does not measure; use plan "flow_grpo" or "mix_grpo" with'
            " rollout.plan.values true"
        )
    if valued and config.objective().wants == "endpoints":
        raise ValueError(
            f"rollout.plan.values: true, but training.objective {objective} learns from finished"
            " latents, not from states; set it to false"
        )
    noise = config.rollout.adapt and config.rollout.adapt.noise
    # Harmless but costly: refuse what would only cost time.
    if valued and not needed and not noise:
        raise ValueError(
            "rollout.plan.values: true costs a row for each state, which training.advantage"
            f" {advantage} does not use; dense, stepwise, turning_point and rollout.adapt.noise do"
        )


def check_maps(config: Config) -> None:
    """Advantages by place need an objective that takes each child by itself."""
    if not config.advantage().needs_maps or config.objective().takes_maps:
        return
    raise ValueError(
        f"training.advantage: {config.training.advantage['type']} gives each place of an image an"
        f" advantage, which training.objective {shown(config.training.objective['type'])} cannot"
        " use as it is set; grpo with the plain ratio, dppo, hinge and spo can"
    )


def _largest_group(config: Config, over: str) -> int:
    """Size of the largest group of the first iteration; any size above 1 may be returned as 2."""
    from tempflow.sampling.layout import Layout, iteration_units

    plan = config.plan()
    # The common plans say it by their options, without laying out an iteration.
    several = {"prompt": plan.seeds, "step": plan.seeds * config.data.prompts_per_iteration}
    if max(plan.children, several.get(over, 1)) > 1:
        return 2
    units = iteration_units([0], min(plan.seeds, 2))
    slots = Layout(
        units,
        [plan.rows(unit, 0) for unit in units],
        endpoints=config.objective().wants == "endpoints",
    ).slots
    # Two units are enough to tell a group of one from larger ones, whatever the number of seeds.
    labels = slots.groups(over).tolist()
    return max(map(labels.count, set(labels)), default=0)


def check_weighting(config: Config) -> None:
    """Loss weights by step need an objective on states."""
    weighting, objective = config.training.weighting, config.objective()
    if weighting in ("noise", "uniform") or objective.wants == "states":
        return
    said = weighting if isinstance(weighting, str) else {"value": weighting.value}
    raise ValueError(
        f"training.weighting: {shown(said)} weighs the stochastic steps of a rollout, but"
        f' training.objective "{config.training.objective["type"]}" learns from finished latents,'
        ' whose states have weight 1; allowed are "noise" and "uniform"'
    )


def check_penalty(config: Config) -> None:
    """The penalty's steps must exist, and the other policy must differ from the trained one."""
    penalty, updates, steps = config.penalty(), config.training.updates, config.rollout.num_steps
    if penalty is None:
        return
    outside = [k for k in penalty.steps or [] if k >= steps]
    if outside:
        raise ValueError(
            f"training.penalty.steps: {outside[0]} is outside the grid; allowed are 0 to"
            f" {steps - 1} (num_steps {steps})"
        )
    # Its divergence would be 0 in every iteration, and its cost a forward that nothing needs.
    if not penalty.needs_reference and updates.passes * updates.parts == 1:
        raise ValueError(
            'training.penalty.to: "old" is the policy before the updates of an iteration, which the'
            " first update does not differ from; training.updates must make several"
        )


def check_adapt(config: Config) -> None:
    """What rollout.adapt needs of the objective, the plan and the stochastic step."""
    adapt, plan, name = config.rollout.adapt, config.plan(), config.rollout.plan["type"]
    if adapt is None:
        return
    if config.objective().wants != "states":
        objective = config.training.objective["type"]
        raise ValueError(
            "rollout.adapt: reads the rewards of states by step, but training.objective"
            f" {objective} learns from finished latents; set it to null"
        )
    rows = plan.rows(ANY_UNIT, 0)
    if adapt.steps is not None:
        if plan.branch_steps is None or all(row.parent is None or row.value for row in rows):
            raise ValueError(
                f"rollout.adapt.steps: plan {name} has no branch steps to draw from; the plan"
                ' "tempflow" has'
            )
        if plan.branch_steps.random:
            raise ValueError(
                "rollout.adapt.steps: rollout.plan.branch_steps already draws steps at random; set"
                ' that to "all" or a list'
            )
        known = len(plan.branch_steps.possible(plan.num_steps))
        if adapt.steps > known:
            raise ValueError(
                f"rollout.adapt.steps: {adapt.steps} of {known} branch steps; expected at most"
                f" {known}"
            )
    if adapt.noise is not None:
        if not _all_completed(rows):
            raise ValueError(
                f"rollout.adapt.noise: plan {name} does not follow the ODE from each state, to"
                ' compare children with; "tempflow" does, and so do "flow_grpo" and "mix_grpo" with'
                " rollout.plan.values true"
            )
        if not config.sde().takes_levels:
            raise ValueError(
                f"rollout.adapt.noise: rollout.sde {config.rollout.sde['type']} does not support"
                " noise factors"
            )


def _all_completed(rows: list[Row]) -> bool:
    """Whether some row follows the ODE from every state that a child leaves."""
    from tempflow.sampling.layout import Layout

    return any(row.value for row in rows) or bool(
        (Layout([rows[0].unit], [rows]).completions >= 0).all()
    )


def check_deepspeed(config: Config) -> None:
    """The form of the `deepspeed` section, as far as the engine reads it.

    `config.deepspeed` checks the values later, because that imports DeepSpeed.
    """
    ds = config.deepspeed
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ):
        if key in ds:
            raise ValueError(
                f"deepspeed.{key}: is set by the engine; remove it, and use training.micro_batch"
                " and data.prompts_per_iteration"
            )
    for key in ("optimizer", "bf16", "fp16"):
        if not isinstance(ds.get(key, {}), dict):
            raise ValueError(f"deepspeed.{key}: expected a table, got {shown(ds[key])}")
    zero = ds.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    # isinstance would accept true, which is an int and equals 1.
    if type(stage) is not int or not 0 <= stage <= 3:
        raise ValueError(
            "deepspeed.zero_optimization: expected a table with stage 0, 1, 2 or 3, got"
            f" {shown(zero)}"
        )
    half = [
        name
        for name in ("bf16", "fp16")
        if isinstance(ds.get(name), dict) and ds[name].get("enabled")
    ]
    # A step of 1e-5 on a bfloat16 weight of size 1 is lost: it is below half of the last bit.
    if half and stage == 0:
        raise ValueError(
            f"deepspeed.{half[0]}: at ZeRO stage 0 DeepSpeed keeps no fp32 weights to update; set"
            " deepspeed.zero_optimization.stage to 1, 2 or 3"
        )
    if "scheduler" in ds:
        raise ValueError(
            "deepspeed.scheduler: is not allowed, because the engine sets the learning rate; use"
            " training.lr_decay"
        )
    if "optimizer" not in ds:
        raise ValueError(
            "deepspeed.optimizer: required, but missing; for example"
            ' {"type": "AdamW", "params": {"lr": 1e-4}}'
        )


def check_compiled(config: Config) -> None:
    """Graphs, compiled blocks, lanes and float8 need a rollout copy, and some exclude ZeRO 3."""
    if config.rollout.graphs and not config.rollout.replica:
        raise ValueError(
            "rollout.graphs: true needs rollout.replica true, because graphs read weights from"
            " fixed addresses"
        )
    if config.training.compile != "eager" and config.zero_stage() == 3:
        raise ValueError(
            f'training.compile: {config.training.compile!r}; at ZeRO stage 3 only "eager" is'
            " allowed"
        )
    if config.training.compile != "eager" and config.training.reference in ("sharded", "offloaded"):
        raise ValueError(
            f'training.reference: {config.training.reference!r} needs training.compile "eager"'
        )
    # All graphs of a device share one memory pool, so only one may run at a time.
    if (config.rollout.lanes or 1) > 1 and (config.rollout.graphs or not config.rollout.replica):
        raise ValueError(
            f"rollout.lanes: {config.rollout.lanes}; with rollout.graphs, or without"
            " rollout.replica, only 1 is allowed"
        )
    suffix = config.rollout.suffix
    if suffix and suffix.weights == "float8" and not config.rollout.replica:
        raise ValueError(
            'rollout.suffix.weights: "float8" needs rollout.replica true: it converts the weights'
            " of the rollout copy"
        )
    if config.rollout.compile != "eager" and not config.rollout.replica:
        raise ValueError(
            f"rollout.compile: {config.rollout.compile!r} needs rollout.replica true; without it"
            " rollouts run the training engine, which training.compile compiles"
        )


def check_shared_base(config: Config) -> None:
    """What model.share_base true needs. Dtypes are compared later, when the device is known."""
    if not config.model.share_base or config.may_share_base():
        return
    if config.model.lora is None:
        raise ValueError(
            "model.share_base: true needs model.lora; without adapters no weight is frozen"
        )
    if not config.rollout.replica:
        raise ValueError(
            "model.share_base: true needs rollout.replica true; without it there is only one"
            " transformer; set it to null"
        )
    raise ValueError(
        "model.share_base: true needs ZeRO stage 0, 1 or 2; at stage 3 the base is spread over the"
        " ranks. Set it to null, or set rollout.replica to false"
    )


def check_quantized(config: Config) -> None:
    """What model.quantize needs. Dtypes are compared later, when the device is known."""
    if config.model.quantize is None:
        return
    asked, suffix = f'model.quantize: "{config.model.quantize}"', config.rollout.suffix
    if config.model.lora is None:
        raise ValueError(f"{asked} needs model.lora; quantized weights cannot be trained")
    if config.zero_stage() == 3:
        raise ValueError(
            f"{asked} needs ZeRO stage 0, 1 or 2; stage 3 spreads parameters over the ranks, and"
            " quantized weights are not parameters"
        )
    # Without rollout.replica there is no second copy to merge into.
    if config.model.share_base is False and config.rollout.replica:
        raise ValueError(
            f"{asked} excludes model.share_base false: adapters cannot be merged into quantized"
            " weights, so rollouts share them; set it to null"
        )
    if suffix and suffix.weights == "float8":
        raise ValueError(
            f'{asked} excludes rollout.suffix.weights "float8", a second copy of the same layers'
        )
