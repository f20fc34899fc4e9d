"""Joining the process group, and the few collectives that the trainer needs, on small values of the
host. In a run of one process the collectives do nothing."""

from __future__ import annotations

import os
import socket
from typing import Callable, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from tempflow.compat import leave_all_reduce_to_gloo
from tempflow.errors import RankError, UserError, brief
from tempflow.run.environment import LAUNCH
from tempflow.training.device import device
from tempflow.training.signals import ended_by_signals

# Ports that a process without a launcher tries: a free one may be taken before it is used.
PORTS = 8
T = TypeVar("T")


def init_distributed() -> None:
    """Join the launcher's process group, or make one of a single process if no launcher set one up.

    Raises:
        UserError: the launcher's environment is incomplete.
        RankError: this rank cannot join the others.
    """
    import deepspeed

    leave_all_reduce_to_gloo()
    alone = "RANK" not in os.environ
    if alone:
        os.environ.update(_place_of_one())
    missing = [name for name in LAUNCH if name not in os.environ]
    if missing:
        raise UserError(
            f"the environment has RANK={os.environ['RANK']} but not {', '.join(missing)}: start"
            " with `deepspeed engine/train.py`, or unset RANK"
        )
    # NCCL's group is bound to this rank's GPU, but its collectives of objects use the current
    # device, which is GPU 0 on every rank until it is set.
    device()
    for again in reversed(range(PORTS if alone else 1)):
        try:
            # torch would retry for minutes if the name of the address cannot be resolved.
            socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
            # The wait for missing ranks takes minutes in C++, where Python's handlers do not run.
            # Nothing has been written yet, so a signal may end the process at once.
            with ended_by_signals():
                deepspeed.init_distributed(verbose=False)
            return
        except (RuntimeError, ValueError, OSError) as error:  # of torch's store, or of a backend
            if not (again and _port_is_taken(error)):
                raise RankError(_cannot_join(error)) from None
            os.environ.update(_place_of_one())


def _place_of_one() -> dict[str, str]:
    """The environment that a launcher would give to a single process."""
    # Port 0 lets the system choose a free one. Another process may take it before it is used.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    numbers = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return {**numbers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _port_is_taken(error: Exception) -> bool:
    # torch's store has no error type for it, only these texts.
    return "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()


def _cannot_join(error: Exception) -> str:
    rank, address, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    if _port_is_taken(error):
        return (
            f"port {port} of {address} is taken, perhaps by another run on this machine; choose"
            " another one: `deepspeed --master_port PORT engine/train.py ...` (torchrun has the"
            " same option)"
        )
    return (
        f"rank {rank} cannot join the others at {address}:{port} ({type(error).__name__}:"
        f" {brief(error)}); check --master_addr, --master_port, the firewall between the machines,"
        " and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
    )


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all ranks have come here (a collective)."""
    if world_size() > 1:
        dist.barrier()


def reduce(values, op: str = "sum") -> np.ndarray:
    """The element-wise reduction of all ranks' values (a collective).

    Args:
        values: numbers of any shape, the same on all ranks.
        op: "sum", "max" or "min".

    Returns:
        float64 of that shape, with the same bits on every rank.
    """
    array = np.asarray(values, dtype=np.float64)
    if world_size() == 1:
        return array
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    # A copy, because all_reduce writes in place and the caller keeps its values.
    tensor = torch.from_numpy(np.array(array, copy=True)).to(device)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()))
    return tensor.cpu().numpy()


def gather_objects(value) -> list | None:
    """Every rank's value on rank 0, in rank order; None elsewhere (a collective)."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered


def broadcast(tensor: torch.Tensor, source: int) -> torch.Tensor:
    """Write the values of rank `source` into the tensor of every rank, and return it (a
    collective)."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def agree_on(value: T) -> T:
    """Rank 0's value on every rank (a collective)."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def first_of_any(value: str | None) -> str | None:
    """The value of the first rank that has one, on every rank (a collective)."""
    return agree_on(next(filter(None, gather_objects(value) or []), None))


def on_first_rank(action: Callable[[], T]) -> T | None:
    """Run an action on rank 0 and return its result there, None elsewhere (a collective).

    Raises:
        UserError: the action raised one; on every rank, so that none waits for rank 0.
    """
    trouble, result = None, None
    if rank() == 0:
        try:
            result = action()
        except UserError as error:
            trouble = str(error)
    trouble = agree_on(trouble)
    if trouble:
        raise UserError(trouble)
    return result
