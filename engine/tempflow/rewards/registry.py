"""From the config's `rewards` section to reward objects.

An id maps to a dotted path that is imported only when the reward is built, so a reward's packages are
needed only by those who use it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field

from tempflow.errors import UserError, shown
from tempflow.rewards.base import FunctionReward, Reward

REWARDS = {
    "aesthetic": "tempflow.rewards.neural.clip:Aesthetic",
    "clipscore": "tempflow.rewards.neural.clip:ClipScore",
    "hpsv2": "tempflow.rewards.neural.clip:HpsV2",
    "hpsv3": "tempflow.rewards.neural.hpsv3:HpsV3",
    "http": "tempflow.rewards.http.client:HttpReward",
    "imagereward": "tempflow.rewards.neural.imagereward:ImageReward",
    "jpeg": "tempflow.rewards.jpeg:JpegReward",
    "ocr": "tempflow.rewards.ocr:OcrReward",
    "pickscore": "tempflow.rewards.neural.clip:PickScore",
    "vlm_judge": "tempflow.rewards.vlm_judge:VlmJudge",
}

# reward/NAME and eval/NAME are metrics, beside these of all rewards together.
TAKEN = ("reward", "scored", "failed", "gain", "mean", "std", "trunk", "zero_std_groups")
_FORMS = '{"ocr": 1.0} or {"ocr": {"weight": 0.7, "detect": false}}'
_TYPES = {
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a text"),
}


@dataclass(frozen=True)
class RewardSpec:
    """One entry of the config: its name in logs, its weight in the sum (0: watched only), its options.

    type: an id or `module:Name`; "" where the name is one.
    """

    name: str
    weight: float = 1.0
    options: dict = field(default_factory=dict)
    type: str = ""

    @property
    def watched(self) -> bool:
        """Scored at evaluations alone, and never trained on."""
        return self.weight == 0


def parse_rewards(section: dict) -> list[RewardSpec]:
    """Read the config's `rewards` section: weights, or tables of a weight (1.0 if left out) and options.

    A table's `type` is the reward, and its key then any name: for several rewards of one type. Raises
    `UserError` for an unknown reward, a weight that is no finite number, or no weight other than 0. Options are checked
    by `build_reward`.
    """
    if not isinstance(section, dict) or not section:
        raise UserError(f"rewards: expected at least one reward, as in {_FORMS}, got {shown(section)}")
    specs = []
    for name, value in section.items():
        if not str(name).strip():
            raise UserError(f"rewards: every reward needs a name, got {shown(name)}")
        if name in TAKEN:
            raise UserError(f"rewards.{name}: metrics have this name; choose another, and give the reward as its \"type\"")
        options = dict(value) if isinstance(value, dict) else {"weight": value}
        weight = _checked_weight(name, options.pop("weight", 1.0))
        kind = options.pop("type", "")
        if not isinstance(kind, str) or isinstance(value, dict) and "type" in value and not kind:
            raise UserError(f"rewards.{name}.type: expected a reward's id or module:Name, got {shown(kind)}")
        _reward_path(kind or name)
        specs.append(RewardSpec(name, weight, options, kind))
    if all(spec.weight == 0 for spec in specs):
        raise UserError("rewards: every weight is 0; at least one reward must have another weight to train on")
    return specs


def build_reward(name: str, options: dict | None = None, kind: str = "") -> Reward:
    """Build the reward `kind`, or where that is "" `name` (an id or `module:Name`), without loading its models.

    Raises `UserError` for an unknown name, an import that fails, or an option that the reward lacks or
    that has the wrong type.
    """
    options = options or {}
    target = _import(name, _reward_path(kind or name))
    is_class = inspect.isclass(target)
    if not (issubclass(target, Reward) if is_class else callable(target)):
        raise UserError(f"rewards.{name}: {target!r} is neither a subclass of tempflow.rewards.Reward nor a function")
    if inspect.isabstract(target):
        raise UserError(f"rewards.{name}: {target!r} does not define {', '.join(sorted(target.__abstractmethods__))}")
    _check_options(name, target, options, skip=0 if is_class else 3)
    with _named(name, target):
        return target(**options) if is_class else FunctionReward(target, options)


def load_rewards(specs: list[RewardSpec], threads: int) -> dict[str, Reward]:
    """Build and load the rewards, ready to score; `UserError` with the reason where one cannot start."""
    rewards = {}
    for spec in specs:
        rewards[spec.name] = build_reward(spec.name, spec.options, spec.type)
        try:
            with _named(spec.name, type(rewards[spec.name])):
                rewards[spec.name].load(threads)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"rewards.{spec.name}: could not start: {type(error).__name__}: {error}") from error
    return rewards


def check_watched(specs: list[RewardSpec], evaluated: bool) -> None:
    """UserError for a reward that is only watched in a run without evaluations, where nothing would score it."""
    for spec in specs:
        if spec.watched and not evaluated:
            raise UserError(
                f"rewards.{spec.name}: weight 0 only watches, at evaluations, and this run has none; set data.heldout and "
                "eval.every, or another weight"
            )


@contextmanager
def _named(name: str, target):
    """Puts the entry's key before what its reward finds wrong, as `rewards.NAME.option: ` where that begins with an option."""
    try:
        yield
    except UserError as error:
        is_option = str(error).partition(":")[0] in inspect.signature(target).parameters
        raise UserError(f"rewards.{name}{'.' if is_option else ': '}{error}") from error


def _checked_weight(name: str, weight) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) <= sys.float_info.max:
        raise UserError(f"rewards.{name}: the weight must be a finite number, got {shown(weight)}; write {_FORMS}")
    return float(weight)


def _reward_path(name: str) -> str:
    """The dotted path of an id, or the name itself where it is one."""
    if str(name) in REWARDS:
        return REWARDS[name]
    module, _, attribute = str(name).partition(":")
    if module and attribute:
        return name
    near = difflib.get_close_matches(str(name), REWARDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise UserError(
        f"rewards: unknown reward {shown(name)}{hint} Known: {', '.join(sorted(REWARDS))}; "
        "or your own as 'my_module:MyReward'"
    )


def _import(name: str, path: str):
    module, _, attribute = path.partition(":")
    # A user's module usually lies where the command is run, which a script's sys.path does not hold.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        text = f"rewards.{name}: cannot import {path!r}: {type(error).__name__}: {error}{_place(error, module)}"
        raise UserError(text) from error


def _place(error: Exception, module: str) -> str:
    """Where an import failed: the line in the user's file, or where the module was looked for."""
    if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
        return f"; it must lie in the folder of the command ({os.getcwd()}), in one of PYTHONPATH, or be installed"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if "importlib" not in frame.filename]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _check_options(name: str, target, options: dict, skip: int) -> None:
    """Match options against the signature, less its first `skip` parameters (a function's images, ...)."""
    parameters = list(inspect.signature(target).parameters.values())[skip:]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    allowed = ", ".join(["weight", "type", *named])
    for key, value in options.items():
        if key not in named and not takes_any:
            near = difflib.get_close_matches(key, ["weight", "type", *named], n=1)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise UserError(f"rewards.{name}.{key}: no such option{hint} Allowed: {allowed}")
        if key in named:
            _check_type(f"rewards.{name}.{key}", value, named[key].annotation)
    missing = [p.name for p in named.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise UserError(f"rewards.{name}.{missing[0]}: this option has no default and must be given")


def _check_type(key: str, value, annotation) -> None:
    """Refuse a value that contradicts an annotation of a plain type; other annotations are the reward's affair."""
    kind, words = _TYPES.get(getattr(annotation, "__name__", annotation), (object, ""))
    is_bool_elsewhere = isinstance(value, bool) and kind not in (bool, object)
    beyond_all = isinstance(value, (int, float)) and kind is not object and not abs(value) <= sys.float_info.max
    if is_bool_elsewhere or beyond_all or not isinstance(value, kind):
        raise UserError(f"{key}: expected {words}, got {shown(value)}")
