"""The two steps of GRPO on flow-matching models that are arithmetic on latents: sampling children
of a state with their log-probabilities, and the loss of a group of children with its gradient.

Triton kernels on a GPU, a plain PyTorch reference elsewhere, one set of functions for both. Noise
is counter-based: a sample depends on its key and the element's index, not on the batch or the
device. The package knows nothing of models, schedulers or training loops; kernels/README.md
explains formulas and kernels.
"""

from .ops import GroupStats, group_loss, normal, sde_step

__all__ = ["GroupStats", "group_loss", "normal", "sde_step"]
