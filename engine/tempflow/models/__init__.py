"""Model families behind one protocol: `load_policy` reads a diffusers folder and returns its `Policy`."""

from tempflow.models.base import Conditioning, Policy, take
from tempflow.models.loading import (
    check_checkpoint,
    check_model,
    check_size,
    check_text_length,
    encoder_identity,
    family_of,
    load_policy,
    load_transformer,
    resolve_dtype,
)

__all__ = [
    "Conditioning", "Policy", "check_checkpoint", "check_model", "check_size", "check_text_length", "encoder_identity", "family_of",
    "load_policy", "load_transformer", "resolve_dtype", "take",
]  # fmt: skip
