"""The JSON config of a run: its keys, how it is loaded, and all checks that need no model."""

from tempflow.config.load import load_config, parse_config
from tempflow.config.schema import Config
from tempflow.config.sections import (
    Adapt,
    AdaptNoise,
    Checkpoint,
    Curation,
    Data,
    Ema,
    Eval,
    HubDataset,
    Logging,
    Lora,
    Merge,
    Model,
    RewardPoolSection,
    Rollout,
    Stop,
    Suffix,
    Training,
    Updates,
)

__all__ = [
    "Adapt",
    "AdaptNoise",
    "Checkpoint",
    "Config",
    "Curation",
    "Data",
    "Ema",
    "Eval",
    "HubDataset",
    "Logging",
    "Lora",
    "Merge",
    "Model",
    "RewardPoolSection",
    "Rollout",
    "Stop",
    "Suffix",
    "Training",
    "Updates",
    "load_config",
    "parse_config",
]
