"""From the config's `rewards` section to reward objects, by the names and checks of
`tempflow.registry`."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field

from tempflow import registry
from tempflow.errors import UserError, shown
from tempflow.rewards.base import FunctionReward, Reward
from tempflow.rewards.frames import FrameMean
from tempflow.types import Size

# reward/NAME and eval/NAME are metrics, beside these of all rewards together.
TAKEN = ("reward", "scored", "failed", "gain", "mean", "std", "trunk", "zero_std_groups")
_FORMS = '{"ocr": 1.0} or {"ocr": {"weight": 0.7, "detect": false}}'


@dataclass(frozen=True)
class RewardSpec:
    """One entry of the config: its name in logs, its weight in the sum (0: watched only), its
    options.

    type: an id or `module:Name`; "" where the name is one.
    frames: how many of a video's frames it is given, evenly spaced; None: all.
    """

    name: str
    weight: float = 1.0
    options: dict = field(default_factory=dict)
    type: str = ""
    frames: int | None = None

    @property
    def watched(self) -> bool:
        """Scored at evaluations alone, and never trained on."""
        return self.weight == 0


def parse_rewards(section: dict) -> list[RewardSpec]:
    """Read the config's `rewards` section: weights, or tables of a weight (1.0 if left out) and
    options.

    A table's `type` is the reward, and its key then any name: for several rewards of one type; its
    `frames` is for videos. Raises `UserError` for an unknown reward, a weight that is no finite
    number, `frames` below 1, or no weight other than 0. Options are checked by `build_reward`.
    """
    if not isinstance(section, dict) or not section:
        raise UserError(
            f"rewards: expected at least one reward, as in {_FORMS}, got {shown(section)}"
        )
    specs = []
    for name, value in section.items():
        if not str(name).strip():
            raise UserError(f"rewards: every reward needs a name, got {shown(name)}")
        if name in TAKEN:
            raise UserError(
                f"rewards.{name}: metrics have this name; choose another, and give the reward as"
                ' its "type"'
            )
        options = dict(value) if isinstance(value, dict) else {"weight": value}
        weight = _checked_weight(name, options.pop("weight", 1.0))
        kind = options.pop("type", "")
        if not isinstance(kind, str) or isinstance(value, dict) and "type" in value and not kind:
            raise UserError(
                f"rewards.{name}.type: expected a reward's id or module:Name, got {shown(kind)}"
            )
        registry.path_of("reward", kind or name, "rewards")
        specs.append(
            RewardSpec(
                name, weight, options, kind, _checked_frames(name, options.pop("frames", None))
            )
        )
    if all(spec.weight == 0 for spec in specs):
        raise UserError(
            "rewards: every weight is 0; at least one reward must have another weight to train on"
        )
    return specs


def build_reward(name: str, options: dict | None = None, kind: str = "") -> Reward:
    """Build the reward `kind`, or where that is "" `name` (an id or `module:Name`), without loading
    its models.

    Raises `UserError` for an unknown name, an import that fails, or an option that the reward lacks
    or that has the wrong type.
    """
    options, key = options or {}, f"rewards.{name}"
    target = registry.import_from(key, registry.path_of("reward", kind or name, "rewards"))
    is_class = inspect.isclass(target)
    if not (issubclass(target, Reward) if is_class else callable(target)):
        raise UserError(
            f"{key}: {target!r} is neither a subclass of tempflow.rewards.Reward nor a function"
        )
    registry.check_concrete(key, target)
    registry.check_options(
        key, target, options, also=("weight", "type", "frames"), skip=0 if is_class else 3
    )
    with registry.keyed(key, target):
        return target(**options) if is_class else FunctionReward(target, options)


def load_rewards(specs: list[RewardSpec], threads: int) -> dict[str, Reward]:
    """Build and load the rewards, ready to score; `UserError` with the reason where one cannot
    start.

    A reward of images whose entry names `frames` becomes one of videos.
    """
    rewards = {}
    for spec in specs:
        rewards[spec.name] = build_reward(spec.name, spec.options, spec.type)
        try:
            with registry.keyed(f"rewards.{spec.name}", type(rewards[spec.name])):
                rewards[spec.name].load(threads)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"rewards.{spec.name}: could not start: {type(error).__name__}: {error}"
            ) from error
        if spec.frames is not None and not rewards[spec.name].takes_videos:
            rewards[spec.name] = FrameMean(rewards[spec.name])
    return rewards


def takes_videos(spec: RewardSpec) -> bool:
    """Whether an entry's reward can be given videos: by itself, or because the entry says how many
    frames. UserError as `build_reward`."""
    return (
        bool(build_reward(spec.name, spec.options, spec.type).takes_videos)
        or spec.frames is not None
    )


def check_frames(specs: list[RewardSpec], size: Size) -> None:
    """UserError for a reward of images in a run of videos that does not say how many frames it
    scores, and for more than there are."""
    for spec in specs:
        if spec.frames is not None and spec.frames > size.frames:
            raise UserError(
                f"rewards.{spec.name}.frames: {spec.frames}; the run makes {size.frames}"
                " (rollout.frames)"
            )
        if size.frames > 1 and not takes_videos(spec):
            raise UserError(images_only(spec.name))


def images_only(name: str) -> str:
    """The error message for a reward of images that is given videos."""
    return (
        f'rewards.{name}: scores images, and the model makes videos; add "frames": 4 to its entry'
        " for the mean over 4 frames of each, or take a reward of videos, which sets takes_videos"
        " = True"
    )


def check_watched(specs: list[RewardSpec], evaluated: bool) -> None:
    """UserError for a reward that is only watched in a run without evaluations, where nothing would
    score it."""
    for spec in specs:
        if spec.watched and not evaluated:
            raise UserError(
                f"rewards.{spec.name}: weight 0 only watches, at evaluations, and this run has"
                " none; set data.heldout and eval.every, or another weight"
            )


def _checked_frames(name: str, frames) -> int | None:
    if frames is not None and (
        isinstance(frames, bool) or not isinstance(frames, int) or frames < 1
    ):
        raise UserError(
            f"rewards.{name}.frames: expected a whole number from 1 on, or null for all frames, got"
            f" {shown(frames)}"
        )
    return frames


def _checked_weight(name: str, weight) -> float:
    if (
        isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not abs(weight) <= sys.float_info.max
    ):
        raise UserError(
            f"rewards.{name}: the weight must be a finite number, got {shown(weight)}; write"
            f" {_FORMS}"
        )
    return float(weight)
