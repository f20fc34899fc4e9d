"""Builds reward objects from the config's `rewards` section. Names and options are resolved and
checked by `tempflow.registry`, like those of all components."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field

from tempflow import registry
from tempflow.errors import UserError, shown
from tempflow.rewards.base import FunctionReward, Reward
from tempflow.rewards.frames import FrameMean
from tempflow.types import Size

# A reward's values are logged as reward/NAME and eval/NAME. These names are taken by metrics of all
# rewards together, such as eval/mean.
TAKEN = ("reward", "scored", "failed", "gain", "mean", "std", "trunk", "zero_std_groups")
_FORMS = '{"ocr": 1.0} or {"ocr": {"weight": 0.7, "detect": false}}'


@dataclass(frozen=True)
class RewardSpec:
    """One entry of the config's `rewards`."""

    name: str
    """Its key, which names it in logs."""
    weight: float = 1.0
    """Its factor in the sum; 0: it is watched only."""
    options: dict = field(default_factory=dict)
    """Arguments of the reward's constructor, or further arguments of a function."""
    type: str = ""
    """The reward's id or `module:Name`; "": the name is one of these."""
    frames: int | None = None
    """How many frames of a video it scores, evenly spaced; None: all, or images."""

    @property
    def watched(self) -> bool:
        """Whether it is scored only at evaluations, and never trained on."""
        return self.weight == 0


def parse_rewards(section: dict) -> list[RewardSpec]:
    """Read the config's `rewards` section.

    Args:
        section: by name a weight, or a table of `weight` (1.0 if left out) and options. If a table
            has a `type`, that is the reward, and the key is a free name; this allows several
            rewards of one type. Its `frames` is for videos.

    Returns:
        The entries in their order. Their options are not checked yet; `build_reward` does that.

    Raises:
        UserError: for an unknown reward, a weight that is not a finite number, `frames` below 1, or
            if all weights are 0.
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
                f"rewards.{name}: a metric has this name; choose another one, and name the reward"
                ' under "type"'
            )
        options = dict(value) if isinstance(value, dict) else {"weight": value}
        weight = _checked_weight(name, options.pop("weight", 1.0))
        kind = options.pop("type", "")
        # An empty type, often an unset shell variable, must not silently mean the key.
        if not isinstance(kind, str) or isinstance(value, dict) and "type" in value and not kind:
            raise UserError(
                f"rewards.{name}.type: expected a reward's id or module:Name, got {shown(kind)}"
            )
        registry.path_of("reward", kind or name, "rewards")  # only to refuse unknown names here
        specs.append(
            RewardSpec(
                name, weight, options, kind, _checked_frames(name, options.pop("frames", None))
            )
        )
    if all(spec.weight == 0 for spec in specs):
        raise UserError(
            "rewards: every weight is 0; at least one reward needs a weight other than 0, to train"
            " on it"
        )
    return specs


def build_reward(name: str, options: dict | None = None, kind: str = "") -> Reward:
    """Build a reward without loading its models.

    Args:
        name: the entry's name.
        options: the entry's options.
        kind: the reward's id or `module:Name`; "": `name` is one of these.

    Raises:
        UserError: for an unknown reward, an import that fails, or an option that the reward does
            not have or that has the wrong type.
    """
    options, key = options or {}, f"rewards.{name}"
    target = registry.import_from(key, registry.path_of("reward", kind or name, "rewards"))
    is_class = inspect.isclass(target)  # issubclass raises for anything else
    if not (issubclass(target, Reward) if is_class else callable(target)):
        raise UserError(
            f"{key}: {target!r} is neither a subclass of tempflow.rewards.Reward nor a function"
        )
    registry.check_concrete(key, target)
    # A function's first three arguments are the images, prompts and metadata.
    registry.check_options(
        key, target, options, also=("weight", "type", "frames"), skip=0 if is_class else 3
    )
    with registry.keyed(key, target):
        return target(**options) if is_class else FunctionReward(target, options)


def load_rewards(specs: list[RewardSpec], threads: int) -> dict[str, Reward]:
    """Build and load rewards, in the process that will score.

    An image reward whose entry has `frames` is wrapped to take videos.

    Args:
        specs: the entries.
        threads: CPU threads that each reward may use.

    Returns:
        The loaded rewards by name.

    Raises:
        UserError: with the reason, if a reward cannot start.
    """
    rewards = {}
    for spec in specs:
        rewards[spec.name] = build_reward(spec.name, spec.options, spec.type)
        try:
            with registry.keyed(f"rewards.{spec.name}", type(rewards[spec.name])):
                rewards[spec.name].load(threads)
        except UserError:
            raise
        # Anything that a model's libraries raise: missing packages, no memory, no network.
        except Exception as error:
            raise UserError(
                f"rewards.{spec.name}: could not start: {type(error).__name__}: {error}"
            ) from error
        if spec.frames is not None and not rewards[spec.name].takes_videos:
            rewards[spec.name] = FrameMean(rewards[spec.name])
    return rewards


def takes_videos(spec: RewardSpec) -> bool:
    """Whether an entry's reward can score videos: by itself, or because the entry has `frames`.
    Raises UserError like `build_reward`."""
    # Building a reward imports its module but loads no model. HttpReward knows only from its
    # options whether it takes videos, so the class alone does not tell.
    return (
        bool(build_reward(spec.name, spec.options, spec.type).takes_videos)
        or spec.frames is not None
    )


def check_frames(specs: list[RewardSpec], size: Size) -> None:
    """Check the entries against the size of a run's images or videos.

    Raises:
        UserError: for more `frames` than a video has, and in a run of videos for an image reward
            without `frames`.
    """
    for spec in specs:
        if spec.frames is not None and spec.frames > size.frames:
            raise UserError(
                f"rewards.{spec.name}.frames: {spec.frames} is more than rollout.frames, which is"
                f" {size.frames}"
            )
        if size.frames > 1 and not takes_videos(spec):
            raise UserError(images_only(spec.name))


def without_maps(specs: list[RewardSpec]) -> str | None:
    """A line for people where no trained reward makes maps, for advantages that need them."""
    trained = [spec for spec in specs if not spec.watched]
    if any(build_reward(spec.name, spec.options, spec.type).makes_maps for spec in trained):
        return None
    return (
        f"training.advantage: {', '.join(shown(spec.name) for spec in trained)} does not say what"
        " the places of an image are worth, so each image counts as a whole; 'ocr' does, and a"
        " reward of your own may"
    )


def images_only(name: str) -> str:
    """The error message for an image reward in a run of videos."""
    return (
        f'rewards.{name}: scores images, but the model makes videos; add "frames": 4 to its entry'
        " to score the mean of 4 frames of each video, or use a video reward (a class with"
        " takes_videos = True)"
    )


def check_watched(specs: list[RewardSpec], evaluated: bool) -> None:
    """UserError for a reward of weight 0 in a run without evaluations, which would never score
    it."""
    for spec in specs:
        if spec.watched and not evaluated:
            raise UserError(
                f"rewards.{spec.name}: a reward of weight 0 is scored only at evaluations, and this"
                " run has none; set data.heldout and eval.every, or give it another weight"
            )


def _checked_frames(name: str, frames) -> int | None:
    # bool is a subclass of int; "frames": true is a mistake
    if frames is not None and (
        isinstance(frames, bool) or not isinstance(frames, int) or frames < 1
    ):
        raise UserError(
            f"rewards.{name}.frames: expected a whole number of at least 1, or null for all frames,"
            f" got {shown(frames)}"
        )
    return frames


def _checked_weight(name: str, weight) -> float:
    if (
        isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not abs(weight) <= sys.float_info.max  # False for NaN and for integers beyond floats
    ):
        raise UserError(
            f"rewards.{name}: the weight must be a finite number, got {shown(weight)}; write"
            f" {_FORMS}"
        )
    return float(weight)
