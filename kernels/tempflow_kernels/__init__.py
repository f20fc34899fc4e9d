"""The parts of GRPO on flow-matching models that are arithmetic on latents: sampling the children
of a state together with their log-probabilities, and the loss of a group of children together with
its gradient.

The same functions run Triton kernels on a GPU and a plain PyTorch reference elsewhere. Noise is
counter-based: a sample depends on its key and on the element's index, not on the batch or the
device. The package does not depend on any model, scheduler or training loop. kernels/README.md
explains the formulas and the kernels.
"""

from .ops import GroupStats, group_loss, normal, sde_step

__all__ = ["GroupStats", "group_loss", "normal", "sde_step"]
