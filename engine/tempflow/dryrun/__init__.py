"""What a run will need, before anything is loaded: memory, forwards and seconds, from the checkpoint's JSON configs alone.

Models are built on torch's meta device, where tensors have shapes but no storage. `estimate` returns numbers, `show` prints them.
Left out: the CUDA context, the allocator's fragmentation, kernels' workspaces and the time that ranks wait for each other.
"""

from tempflow.dryrun.estimate import Estimate, estimate
from tempflow.dryrun.model import local_model
from tempflow.dryrun.show import show

__all__ = ["Estimate", "estimate", "local_model", "show"]
