"""Rewards: they take images and prompts and return one number per image, in processes of their own.

`parse_rewards` turns a config's `rewards` section into a list of `RewardSpec`. `check_prompts`
refuses prompts that a reward cannot use, before anything is loaded. `RewardPool` scores batches in
worker processes. `combine` computes the weighted sum. A new reward is a subclass of `Reward`, or a
function, which the config names as `my_module:MyReward`.

Importing this package loads neither torch nor any reward's model, so a worker process starts
quickly and takes only the memory that its rewards need.
"""

from tempflow.rewards.base import Reward, Scores
from tempflow.rewards.combine import Combined, combine
from tempflow.rewards.conditions import check_conditions, condition_images
from tempflow.rewards.fit import applies, check_asked, check_prompts, fits, kinds_of
from tempflow.rewards.pool import RewardPool, Ticket
from tempflow.rewards.probe import probe
from tempflow.rewards.registry import (
    RewardSpec,
    build_reward,
    check_frames,
    check_watched,
    parse_rewards,
    without_maps,
)

__all__ = [
    "Combined",
    "Reward",
    "RewardPool",
    "RewardSpec",
    "Scores",
    "Ticket",
    "applies",
    "build_reward",
    "check_conditions",
    "check_asked",
    "check_frames",
    "check_prompts",
    "check_watched",
    "combine",
    "condition_images",
    "fits",
    "kinds_of",
    "parse_rewards",
    "probe",
    "without_maps",
]
