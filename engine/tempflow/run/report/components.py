"""The components that a run used, and how far each of them is verified.

Only parts of this project are looked up. A user's own component, named by its dotted path, has no
entry and is shown without a level.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tempflow.eight_bit import TYPE as EIGHT_BIT
from tempflow.registry import KINDS
from tempflow.run.report.run import Run

VERIFIED = Path(__file__).parents[2] / "assets/verified.json"  # by docs/make_hardware_table.py
LEVELS = {
    "unit": "tests on a CPU",
    "simulated GPU": "tests on a CPU and on a simulated GPU",
    "hardware": "{card}, {date}",
}


def components(run: Run) -> list[tuple[str, str, str]]:
    """(part, what the run chose, how far that is verified) for the parts that its config names; the
    last is "" where nothing is on record."""
    if not run.config:
        return []
    rows = [*_model(run), *_rollout(run), *_training(run), *_around(run)]
    return [(part, chosen, level(path)) for part, chosen, path in rows if chosen]


def level(path: str | None) -> str:
    """How far a part of the engine is verified, "" for an unknown part. path: its name in
    benchmarks/results/hardware.json."""
    entry = _entries().get(path or "")
    return LEVELS[entry["status"]].format(**entry) if entry else ""


@cache
def _entries() -> dict[str, dict]:
    return {entry["path"]: entry for entry in json.loads(VERIFIED.read_text(encoding="utf-8"))}


_Row = tuple[str, str | None, str | None]  # part, what was chosen, its name in verified.json


def _model(run: Run) -> list[_Row]:
    # Read from the folder, not the hub: a report is written without network.
    pipeline = _pipeline(str(run.setting("model", "path")))
    module = KINDS["policy"].ids.get(pipeline or "", "").partition(":")[0]
    lora = run.setting("model", "lora")
    trained = f"LoRA of rank {lora.get('rank')}" if isinstance(lora, dict) else "all weights"
    return [
        ("model family", pipeline, module.rpartition(".")[2]),
        ("trained weights", trained, "LoRA" if lora else "full fine-tuning"),
        ("frozen weights in", _options(run.setting("model", "quantize")), "quantized base"),
    ]


def _pipeline(path: str) -> str | None:
    """The pipeline class of a model in a folder; None where the folder is gone or is a hub id."""
    try:
        index = json.loads((Path(path) / "model_index.json").read_text(encoding="utf-8"))
        return str(index["_class_name"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _rollout(run: Run) -> list[_Row]:
    suffix = run.setting("rollout", "suffix")
    float8 = isinstance(suffix, dict) and suffix.get("weights") == "float8"
    return [
        _component("plan", run.setting("rollout", "plan"), "plans"),
        _component("SDE", run.setting("rollout", "sde"), "stochastic steps"),
        ("coarse suffix", _options(suffix), "float8 suffix" if float8 else "rollout"),
        ("CUDA graphs", "on, where there is a GPU", "CUDA graphs")
        if run.setting("rollout", "graphs")
        else ("CUDA graphs", None, None),
        (
            "compiled rollout",
            None if run.setting("rollout", "compile", "eager") == "eager" else "yes",
            "compiled blocks",
        ),
    ]


def _training(run: Run) -> list[_Row]:
    zero = (run.config.get("deepspeed") or {}).get("zero_optimization") or {}
    stage, ranks = zero.get("stage", 0), (run.summary or {}).get("world_size") or 1
    # The config allows one of the two.
    average = next((key for key in ("ema", "merge") if run.setting("training", key)), None)
    optimizer = ((run.config.get("deepspeed") or {}).get("optimizer") or {}).get("type")
    return [
        _component("advantage", run.setting("training", "advantage"), "advantages"),
        _component("objective", run.setting("training", "objective"), "objectives"),
        _component("penalty", run.setting("training", "penalty"), "penalties"),
        ("loss weights of the steps", _options(run.setting("training", "weighting")), None),
        ("weight average", average, "weight average"),
        ("optimizer", optimizer, "8-bit optimizer" if optimizer == EIGHT_BIT else None),
        ("DeepSpeed", f"ZeRO stage {stage}", f"ZeRO-{stage}"),
        ("processes", f"{ranks}", "several GPUs" if ranks > 1 else None),
    ]


def _around(run: Run) -> list[_Row]:
    rewards = run.config.get("rewards") or {}
    shown = [_reward(name, value) for name, value in rewards.items()]
    evaluated = f"{len(run.heldout)} times" if run.heldout else None
    return [*shown, ("evaluation", evaluated, "evaluation")]


def _reward(name: str, value) -> _Row:
    options = value if isinstance(value, dict) else {"weight": value}
    weight, on_gpu = options.get("weight", 1.0), options.get("device") == "cuda"
    chosen = "watched, not trained on" if weight == 0 else f"weight {weight}"
    path = "reward models on the GPU" if on_gpu else "OCR" if name == "ocr" else None
    return f"reward {name}", chosen + (", on the GPU" if on_gpu else ""), path


def _component(part: str, value, path: str) -> _Row:
    """The row of a component that is chosen by its type."""
    name = str(value["type"]) if isinstance(value, dict) and "type" in value else _options(value)
    # A colon marks a dotted path: a user's own component, which no test here has run.
    return part, name, None if name and ":" in name else path


def _options(value) -> str | None:
    if value is None or value == {}:
        return None
    return value if isinstance(value, str) else json.dumps(value)
