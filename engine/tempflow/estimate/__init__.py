"""What a run will need, before anything is loaded: memory, disk, forwards and seconds, from the
checkpoint's JSON configs alone.

Models are built on torch's meta device, where tensors have shapes but no storage. `estimate`
returns numbers, `show` prints them.
Left out: the allocator's fragmentation, NCCL's buffers and the time that ranks wait for each other.
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
