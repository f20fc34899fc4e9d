"""Model families behind one protocol: `load_policy` reads a diffusers pipeline folder and returns a
`Policy`.

The families themselves are imported by the registry, when a checkpoint needs one.
"""

from tempflow.models.base import Policy, most_images
from tempflow.models.conditions import (
    Conditioning,
    Conditions,
    Shape,
    by_shape,
    index_rows,
    shape_of,
)
from tempflow.models.loading import (
    check_checkpoint,
    check_examples,
    check_guidance,
    check_model,
    check_size,
    check_text_length,
    encoder_identity,
    family_of,
    load_denoiser,
    load_policy,
    resolve_dtype,
)
from tempflow.models.sampler import Sampler

__all__ = [
    "Conditioning",
    "Conditions",
    "Policy",
    "Sampler",
    "Shape",
    "by_shape",
    "check_checkpoint",
    "check_examples",
    "check_guidance",
    "check_model",
    "check_size",
    "check_text_length",
    "encoder_identity",
    "family_of",
    "index_rows",
    "load_denoiser",
    "load_policy",
    "most_images",
    "resolve_dtype",
    "shape_of",
]
