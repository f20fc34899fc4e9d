"""Estimate what a run needs before anything is loaded: memory, disk, forwards and seconds.

Only the JSON files of the checkpoint are read. Models are built on torch's meta device, where
tensors have shapes but no storage. `estimate` returns the numbers, `show` prints them, and
`propose` finds changes with which a run fits its GPU.

Not counted: the allocator's fragmentation, NCCL's buffers, and the time that ranks wait for each
other.
"""

from tempflow.estimate.disk import check_room
from tempflow.estimate.estimate import Estimate, disk_of, estimate
from tempflow.estimate.fitting import propose
from tempflow.estimate.show import show, show_proposal
from tempflow.models.hub import local_model

__all__ = [
    "Estimate",
    "check_room",
    "disk_of",
    "estimate",
    "local_model",
    "propose",
    "show",
    "show_proposal",
]
