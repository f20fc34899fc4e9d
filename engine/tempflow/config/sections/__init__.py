"""The sections of a config, one module for each subject.

The `description` of a key is its help: docs/config.md and configs/schema.json are generated from
it.
"""

from tempflow.config.sections.data import Curation, Data, HubDataset
from tempflow.config.sections.evaluation import Eval, Stop
from tempflow.config.sections.model import Lora, Model
from tempflow.config.sections.records import Checkpoint, Logging
from tempflow.config.sections.rewards import RewardPoolSection
from tempflow.config.sections.rollout import Adapt, AdaptNoise, Rollout, Suffix
from tempflow.config.sections.training import Ema, Merge, Training, Updates, ValueWeights

__all__ = [
    "Adapt",
    "AdaptNoise",
    "Checkpoint",
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
    "ValueWeights",
]
