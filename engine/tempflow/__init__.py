"""TempFlow-GRPO: reinforcement learning of flow-matching image and video models.

For scripts and notebooks the package offers `train`, `evaluate`, `sample`, `load_policy` and
`Walkthrough`. Importing it loads no torch, so that reward workers start fast.
"""

import importlib

__version__ = "0.2.0"  # pyproject.toml reads it here

# By public name: the module that is imported when the name is first used.
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
