"""Model families behind one protocol: `load_policy` reads a diffusers folder and returns its `Policy`."""

from tempflow.policy.base import Conditioning, Policy, take
from tempflow.policy.loading import check_model, check_size, load_policy, load_transformer

__all__ = ["Conditioning", "Policy", "check_model", "check_size", "load_policy", "load_transformer", "take"]
