"""Keys of earlier versions: where each has moved to, and how old run directories are read.

A user's config with an old key is refused, and the message names the new one. The config.json of an
old run is translated instead, so that it can still be evaluated and exported.
"""

from __future__ import annotations

_STEPS = {"seeds", "children", "branch_steps"}
# By old key: the message after its name.
MOVED = {
    **{f"rollout.{key}": f"moved to rollout.plan.{key}" for key in sorted(_STEPS)},
    "rollout.window": (
        "moved to rollout.plan.window (its size) and rollout.plan.every, of plan mix_grpo"
    ),
    "rollout.eta": "moved to rollout.sde.eta",
    "training.advantage_of": (
        'moved to training.advantage.type: "group" for "sum", "gdpo" for "each"'
    ),
    "training.advantage_group": "moved to training.advantage.over",
    "training.global_std": "moved to training.advantage.global_std",
    "training.adv_clip": "moved to training.advantage.clip",
    "training.clip_low": "moved to training.objective.clip_low",
    "training.clip_high": "moved to training.objective.clip_high",
    "training.ratio": "moved to training.objective.ratio",
    "training.kl_coef": "moved to training.penalty.coef; for 0 set training.penalty to null",
    "training.kl_form": "moved to training.penalty.form",
    "training.updates_per_rollout": "moved to training.updates.passes",
    "training.share_group_forward": ("removed; the children of a state always share one forward"),
}
# The old keys that each plan had a use for; it ignored the others, which its class now refuses.
_OPTIONS = {
    "tempflow": _STEPS,
    "flow_grpo": {"seeds", "branch_steps"},
    "mix_grpo": {"seeds", "window", "every"},
}


def translate(table: dict) -> None:
    """Change the tables of an earlier version's config.json to today's keys, in place.

    A section without an old key is left alone, so tables of this version do not change.
    """
    for section, change in (("rollout", _rollout), ("training", _training)):
        found = table.get(section)
        if isinstance(found, dict) and any(f"{section}.{key}" in MOVED for key in found):
            change(found)


def _rollout(rollout: dict) -> None:
    window = rollout.pop("window", None) or {}
    given = {key: rollout.pop(key) for key in sorted(_STEPS) if key in rollout}
    given |= {
        new: window[old] for old, new in (("size", "window"), ("every", "every")) if old in window
    }
    plan = rollout.get("plan", "tempflow")
    rollout["plan"] = {"type": plan} | {
        key: value for key, value in given.items() if key in _OPTIONS.get(plan, given)
    }
    if "eta" in rollout:
        rollout["sde"] = {"type": rollout.get("sde", "flow"), "eta": rollout.pop("eta")}


def _training(training: dict) -> None:
    def taken(**names: str) -> dict:
        return {new: training.pop(old) for new, old in names.items() if old in training}

    training.pop("share_group_forward", None)
    of = training.pop("advantage_of", "sum")
    training["advantage"] = {"type": "gdpo" if of == "each" else "group"}
    training["advantage"] |= taken(over="advantage_group", global_std="global_std", clip="adv_clip")
    training["objective"] = {"type": "grpo"} | taken(
        clip_low="clip_low", clip_high="clip_high", ratio="ratio"
    )
    penalty = {"type": "kl"} | taken(coef="kl_coef", form="kl_form")
    # A coefficient of 0 meant no penalty; today's class refuses it.
    training["penalty"] = penalty if penalty.get("coef") else None
    training["updates"] = taken(passes="updates_per_rollout")
