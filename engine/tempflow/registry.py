"""Find components by name, and check the options that a config gives them.

An id maps to `module:Name`, which is imported only when the component is used, so that its packages
are needed only then. The options of a component are the arguments of its constructor: names, types
and defaults come from the signature, help from the `Args:` of the docstring. To add a component,
add a line to `KINDS`; a user's own class is named `my_module:MyName` in the config.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import traceback
import typing
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tempflow.errors import UserError, shown


@dataclass(frozen=True)
class Kind:
    """A kind of component, such as plans."""

    key: str
    """The config key that names the component."""
    base: str
    """`module:Name` of the base class."""
    default: str
    """The id for a table without a `type`; "" if a type is required."""
    ids: dict[str, str]
    """`module:Name` by id."""


KINDS = {
    "plan": Kind(
        "rollout.plan",
        "tempflow.sampling.plans.base:Plan",
        "tempflow",
        {
            "flow_grpo": "tempflow.sampling.plans.flow_grpo:FlowGrpo",
            "mix_grpo": "tempflow.sampling.plans.mix_grpo:MixGrpo",
            "samples": "tempflow.sampling.plans.samples:Samples",
            "tempflow": "tempflow.sampling.plans.tempflow:TempFlow",
            "tree": "tempflow.sampling.plans.tree:Tree",
        },
    ),
    "sde": Kind(
        "rollout.sde",
        "tempflow.sampling.steps:Sde",
        "flow",
        {
            "cps": "tempflow.sampling.steps:Cps",
            "dance": "tempflow.sampling.steps:Dance",
            "flow": "tempflow.sampling.steps:Flow",
            "precise": "tempflow.sampling.steps:Precise",
        },
    ),
    "advantage": Kind(
        "training.advantage",
        "tempflow.advantages.base:Advantage",
        "group",
        {
            "dense": "tempflow.advantages.dense:Dense",
            "gdpo": "tempflow.advantages.gdpo:Gdpo",
            "group": "tempflow.advantages.group:Group",
            "spatial": "tempflow.advantages.spatial:Spatial",
            "stepwise": "tempflow.advantages.stepwise:Stepwise",
            "turning_point": "tempflow.advantages.turning_point:TurningPoint",
        },
    ),
    "objective": Kind(
        "training.objective",
        "tempflow.objectives.base:Objective",
        "grpo",
        {
            "awm": "tempflow.objectives.awm:Awm",
            "dgpo": "tempflow.objectives.preference:Dgpo",
            "dmpo": "tempflow.objectives.preference:Dmpo",
            "dpo": "tempflow.objectives.preference:Dpo",
            "dppo": "tempflow.objectives.trust_region:Dppo",
            "fpo": "tempflow.objectives.fpo:Fpo",
            "grpo": "tempflow.objectives.grpo:Grpo",
            "hinge": "tempflow.objectives.trust_region:Hinge",
            "nft": "tempflow.objectives.nft:Nft",
            "spo": "tempflow.objectives.trust_region:Spo",
        },
    ),
    "penalty": Kind(
        "training.penalty",
        "tempflow.penalties:Penalty",
        "kl",
        {
            "alpha": "tempflow.penalties:Alpha",
            "channel_kl": "tempflow.penalties:ChannelKl",
            "chi2": "tempflow.penalties:Chi2",
            "hellinger": "tempflow.penalties:Hellinger",
            "jeffreys": "tempflow.penalties:Jeffreys",
            "kl": "tempflow.penalties:Kl",
            "renyi": "tempflow.penalties:Renyi",
            "tv": "tempflow.penalties:TotalVariation",
            "w2": "tempflow.penalties:W2",
        },
    ),
    "reward": Kind(
        "rewards",
        "tempflow.rewards.base:Reward",
        "",
        {
            "aesthetic": "tempflow.rewards.neural.clip:Aesthetic",
            "clip_image": "tempflow.rewards.neural.clip:ClipImage",
            "clipscore": "tempflow.rewards.neural.clip:ClipScore",
            "hpsv2": "tempflow.rewards.neural.clip:HpsV2",
            "hpsv3": "tempflow.rewards.neural.hpsv3:HpsV3",
            "http": "tempflow.rewards.http.client:HttpReward",
            "imagereward": "tempflow.rewards.neural.imagereward:ImageReward",
            "jpeg": "tempflow.rewards.jpeg:JpegReward",
            "ocr": "tempflow.rewards.ocr:OcrReward",
            "pickscore": "tempflow.rewards.neural.clip:PickScore",
            "vlm_judge": "tempflow.rewards.vlm_judge:VlmJudge",
        },
    ),
    "policy": Kind(
        "model.path",
        "tempflow.models.base:Policy",
        "",
        {  # by the pipeline class of the checkpoint
            "Flux2KleinPipeline": "tempflow.models.flux2:Flux2KleinPolicy",
            "Flux2Pipeline": "tempflow.models.flux2:Flux2Policy",
            "FluxControlPipeline": "tempflow.models.flux_control:FluxControlPolicy",
            "FluxKontextPipeline": "tempflow.models.flux_kontext:FluxKontextPolicy",
            "FluxPipeline": "tempflow.models.flux:FluxPolicy",
            "QwenImage21Pipeline": "tempflow.models.qwen_image_21:QwenImage21Policy",
            "QwenImageEditPipeline": "tempflow.models.qwen_image_edit:QwenImageEditPolicy",
            "QwenImageEditPlusPipeline": "tempflow.models.qwen_image_edit:QwenImageEditPlusPolicy",
            "QwenImagePipeline": "tempflow.models.qwen_image:QwenImagePolicy",
            "StableDiffusion3Pipeline": "tempflow.models.sd3:SD3Policy",
            "WanPipeline": "tempflow.models.wan:WanPolicy",
            "ZImagePipeline": "tempflow.models.z_image:ZImagePolicy",
        },
    ),
}
# Kinds by config key, of the keys whose value is one component. (`rewards` has several, and
# `model.path` names a checkpoint.)
IN_CONFIG = {kind.key: name for name, kind in KINDS.items() if kind.default}

# By annotation: the types of allowed values, and the words for messages. An int is a number too.
_TYPES: dict[str, tuple[Any, str]] = {
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a text"),
}
RENAMED = {"plan": {"branch_grpo": "tree"}}  # by kind: new ids by those of earlier versions
# Types of values that can be written to config.json.
_PLAIN = (bool, int, float, str, list, dict, type(None))


@dataclass(frozen=True)
class Option:
    """An argument of a component's constructor."""

    name: str
    annotation: object
    default: object
    """`inspect.Parameter.empty` where it must be given."""
    help: str


# ----------------------------------------------------------------------------------------- building
def build(kind: str, given: str | dict, key: str | None = None):
    """Make a component from a config's value.

    Args:
        kind: one of `KINDS`.
        given: an id, `module:Name`, or a table of a `type` and options.
        key: the config key for messages; None: that of the kind.

    Raises:
        UserError: begins with the key, for an unknown name, an import that fails, a class of
            another kind, and an option that is unknown, has the wrong type or is refused by the
            constructor.
    """
    key = key or KINDS[kind].key
    name, options = _split(kind, given, key)
    target = find(kind, name, key)
    check_options(key, target, options, also=("type",))
    with keyed(key, target):
        return target(**options)


def resolve(kind: str, given: str | dict) -> dict:
    """The table of a component with its type and all options, defaults included.

    Raises UserError as `build`.
    """
    build(kind, given)  # checks the options, which the constructor may refuse too
    name, options = _split(kind, given, KINDS[kind].key)
    known = {
        option.name: options.get(option.name, option.default)
        for option in options_of(find(kind, name))
    }
    return {
        "type": name,
        **{key: value for key, value in known.items() if isinstance(value, _PLAIN)},
        **options,
    }


def _split(kind: str, given: str | dict, key: str) -> tuple[str, dict]:
    """Type and options of a config's value."""
    options = dict(given) if isinstance(given, dict) else {"type": given}
    name = options.pop("type", KINDS[kind].default)
    if not isinstance(name, str):
        raise UserError(f"{key}.type: expected an id or module:Name of a {kind}, got {shown(name)}")
    return name, options


def find(kind: str, name: str, key: str | None = None):
    """The class of a component. Raises UserError as `build`."""
    key = key or KINDS[kind].key
    target, base = import_from(key, path_of(kind, name, key)), KINDS[kind].base
    # A class of another kind may even have the same options, and would fail in the middle of a run.
    if not (inspect.isclass(target) and issubclass(target, import_from(key, base))):
        raise UserError(
            f"{key}: {name} is not a {kind}: expected a subclass of {base.replace(':', '.')}, got"
            f" {target!r}"
        )
    check_concrete(key, target)
    return target


def path_of(kind: str, name: str, key: str) -> str:
    """`module:Name` of an id; a name of this form is returned as it is. Raises UserError."""
    ids = KINDS[kind].ids
    if str(name) in ids:
        return ids[name]
    module, _, attribute = str(name).partition(":")
    if module and attribute:
        return name
    if name in RENAMED.get(kind, {}):
        raise UserError(f"{key}: {name!r} is now called {RENAMED[kind][name]!r}")
    near = difflib.get_close_matches(str(name), ids, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise UserError(
        f"{key}: unknown {kind} {shown(name)}{hint} Known: {', '.join(sorted(ids))}; or your own as"
        f" 'my_module:My{kind.title()}'"
    )


def import_from(key: str, path: str):
    """Import `module:Name`.

    Args:
        key: the config key, with which the message begins.
        path: the name.

    Raises:
        UserError: the import fails, whatever its reason; the message names the user's line.
    """
    module, _, attribute = path.partition(":")
    # A user's module is usually in the folder of the command, which is not on the path of a script
    # (that has the script's own folder). Appended, so that it hides no installed module.
    if module.partition(".")[0] != __package__ and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        text = (
            f"{key}: cannot import {path!r}: {type(error).__name__}: {error}{_place(error, module)}"
        )
        raise UserError(text) from error


def _place(error: Exception, module: str) -> str:
    """For a message: the line of the user's file at which an import failed, or where the module was
    looked for."""
    # Only if the module itself is missing, not one that it imports.
    if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
        return (
            f"; it must be in the folder of the command ({os.getcwd()}), in a folder of PYTHONPATH,"
            " or installed"
        )
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)[1:]
        if "importlib" not in frame.filename
    ]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def check_concrete(key: str, target) -> None:
    """Raise UserError for a class that does not define all methods of its base class."""
    if inspect.isabstract(target):
        raise UserError(
            f"{key}: {target!r} does not define {', '.join(sorted(target.__abstractmethods__))}"
        )


@contextmanager
def keyed(key: str, target):
    """Put the config key before the UserErrors of a component.

    A component's message may begin with one of its options ("size: 9 of 8 steps"), which becomes
    `key.size: ...`; any other message becomes `key: ...`.
    """
    try:
        yield
    except UserError as error:
        is_option = (
            str(error).partition(":")[0].partition(".")[0] in inspect.signature(target).parameters
        )
        raise UserError(f"{key}{'.' if is_option else ': '}{error}") from error


# ------------------------------------------------------------------------------------------ options
def options_of(target, skip: int = 0) -> list[Option]:
    """The options of a component.

    Args:
        target: a class, or a function. A class need not repeat the help of its base classes.
        skip: number of first arguments that are not options.
    """
    # From the most basic class on, so that a subclass's help replaces that of its bases. `object`
    # is left out.
    documented = reversed(target.__mro__[:-1]) if inspect.isclass(target) else [target]
    help_of = {
        name: text
        for one in documented
        for name, text in _help(inspect.cleandoc(one.__doc__ or "")).items()
    }
    hints = _hints(target)
    return [
        Option(p.name, hints.get(p.name, p.annotation), p.default, help_of.get(p.name, ""))
        for p in list(inspect.signature(target).parameters.values())[skip:]
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]


def check_options(
    key: str, target, options: dict, *, also: tuple[str, ...] = (), skip: int = 0
) -> None:
    """Check options against the signature of a class or function.

    Args:
        key: the config key of their table.
        target: the class or function.
        options: values by name.
        also: further keys that the table may have, for messages.
        skip: number of first arguments that are not options.

    Raises:
        UserError: an option is unknown, has the wrong type, or is required but missing.
    """
    known = {option.name: option for option in options_of(target, skip)}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in inspect.signature(target).parameters.values())
    for name, value in options.items():
        if name in known:
            check_type(f"{key}.{name}", value, known[name].annotation)
        elif not takes_any:
            near = difflib.get_close_matches(name, [*also, *known], n=1)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise UserError(
                f"{_joined(key, name)}: no such option{hint} Allowed: {', '.join([*also, *known])}"
            )
    missing = [
        name
        for name, option in known.items()
        if option.default is inspect.Parameter.empty and name not in options
    ]
    if missing:
        raise UserError(f"{key}.{missing[0]}: this option has no default, so it is required")


def check_type(key: str, value, annotation) -> None:
    """Check a value against an annotation.

    Only plain types and `Literal` are checked; other annotations are left to the component.

    Raises:
        UserError: names the key, what is expected and the value.
    """
    if typing.get_origin(annotation) is typing.Literal:
        choices = typing.get_args(annotation)
        # With the type, because True == 1.
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            allowed = ["null" if choice is None else repr(choice) for choice in choices]
            raise UserError(f"{key}: expected {' or '.join(allowed)}, got {shown(value)}")
        return
    kind, words = _TYPES.get(getattr(annotation, "__name__", annotation), (object, ""))
    # bool is a subclass of int, and JSON numbers may exceed float's range (or be infinite).
    is_bool_elsewhere = isinstance(value, bool) and kind not in (bool, object)
    beyond_all = (
        isinstance(value, (int, float))
        and kind is not object
        and not abs(value) <= sys.float_info.max
    )
    if is_bool_elsewhere or beyond_all or not isinstance(value, kind):
        raise UserError(f"{key}: expected {words}, got {shown(value)}")


def _joined(key: str, name: str) -> str:
    # A name from JSON may be empty or contain a newline, which must not break the message.
    return f"{key}.{name if name.isprintable() and name else shown(name)}"


def _hints(target) -> dict:
    """Annotations as objects; empty if one cannot be evaluated, and then texts are compared."""
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:
        # Evaluating a user's annotation runs their code, so any error is possible.
        return {}


def _help(doc: str) -> dict[str, str]:
    """The help texts in the `Args:` of a docstring, by argument."""
    found, name = {}, None
    for line in doc.partition("Args:\n")[2].splitlines():
        if not line.strip() or not line.startswith(" "):
            break
        # Four spaces begin an argument; deeper lines continue it.
        start = re.match(r" {4}(\w+): (.*)", line)
        if start:
            name = start[1]
            found[name] = start[2].strip()
        elif name:
            found[name] += " " + line.strip()
    return found


def summary_of(target) -> str:
    """The first sentence of a component's docstring."""
    paragraph = " ".join((inspect.getdoc(target) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]
