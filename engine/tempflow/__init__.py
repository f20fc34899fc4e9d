"""TempFlow-GRPO: reinforcement learning of flow-matching text-to-image models.

The library surface for notebooks is `train`, `evaluate`, `sample`, `load_policy` and `Walkthrough`;
the commands use the modules below it. Importing this package loads no torch, so that reward workers
start fast.
"""

import importlib

__version__ = "0.2.0"  # the one place that states it; pyproject.toml reads it here

_HOMES = {
    "Walkthrough": "tempflow.walkthrough",
    "evaluate": "tempflow.api",
    "load_policy": "tempflow.models",
    "sample": "tempflow.api",
    "train": "tempflow.api",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
