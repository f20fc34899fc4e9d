"""Keys of earlier versions: where each went, and run directories that still hold them."""

from __future__ import annotations

_STEPS = {"seeds", "children", "branch_steps"}
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
    "training.kl_coef": "moved to training.penalty.coef; instead of 0, training.penalty is null",
    "training.kl_form": "moved to training.penalty.form",
    "training.updates_per_rollout": "moved to training.updates.passes",
    "training.share_group_forward": (
        "removed; every state has one forward, whatever the number of its children"
    ),
}
_OPTIONS = {
    "tempflow": _STEPS,
    "flow_grpo": {"seeds", "branch_steps"},
    "mix_grpo": {"seeds", "window", "every"},
}


def translate(table: dict) -> None:
    """Change the config.json of a run of an earlier version, in place, to today's keys; one of this
    version stays as it is."""
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
    training["penalty"] = penalty if penalty.get("coef") else None
    training["updates"] = taken(passes="updates_per_rollout")
