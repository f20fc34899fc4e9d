"""TempFlow-GRPO: reinforcement learning of flow-matching text-to-image models.

The library surface for notebooks is `load_policy`; the scripts in engine/ use the modules below it. Importing this package
loads no torch, so that reward workers start fast.
"""

__all__ = ["load_policy"]


def __getattr__(name: str):
    if name == "load_policy":
        from tempflow.models import load_policy

        return load_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
