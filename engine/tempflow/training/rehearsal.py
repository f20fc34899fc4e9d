"""Tries, before a model is loaded, whether rollouts can be captured as CUDA graphs on this GPU.

A child process rolls out a small copy of the run's transformer with the run's own settings and
captures it (`tempflow.training.rehearse`). A capture that fails makes its process unusable, because
torch's allocator does not recover; here that is only the child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Callable, Sequence

import torch

from tempflow.config import Config
from tempflow.training import distributed

COMMAND = (sys.executable, "-m", "tempflow.training.rehearse")
LIMIT_S = 900.0  # the child takes seconds, or minutes if it compiles


def may_capture(config: Config, device: torch.device, note: Callable[[str], None]) -> bool:
    """Whether rollouts on this GPU may capture their forwards (a collective).

    Args:
        config: a checked config.
        device: this rank's device.
        note: is told the reason if they may not.

    Returns:
        False if the rehearsal failed; True also if nothing is to be captured.
    """
    if not config.rollout.graphs or device.type != "cuda":
        return True
    # Rank 0 tries for all: the ranks' GPUs are alike, and their decisions must be.
    reason = distributed.agree_on(refusal(config, device) if distributed.rank() == 0 else None)
    if reason:
        note(
            "rollout.graphs: the rehearsal on a copy of two layers failed, so rollouts run"
            f" eagerly: {reason}"
        )
    return reason is None


def refusal(
    config: Config, device: torch.device, command: Sequence[str] = COMMAND, limit_s: float = LIMIT_S
) -> str | None:
    """Run the rehearsal in a child process.

    Args:
        config: a checked config.
        device: the device to try.
        command: the child's command line.
        limit_s: seconds after which it is stopped.

    Returns:
        The reason why forwards must not be captured; None if the child captured and replayed them.
    """
    request = json.dumps({"config": json.loads(config.model_dump_json()), "device": str(device)})
    # The child must find the same modules, a user's own parts among them; "" means this folder.
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    try:
        done = subprocess.run(
            command,
            input=request,
            capture_output=True,
            text=True,
            timeout=limit_s,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {limit_s:g} s"
    # The last line, because libraries may print to stdout before it.
    try:
        return json.loads(done.stdout.splitlines()[-1])["refusal"]
    except (IndexError, ValueError, LookupError, TypeError):  # it ended without an answer
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return f"its process ended with status {done.returncode}: {last}"
