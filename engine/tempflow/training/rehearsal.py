"""Before a model is loaded: whether rollouts can be captured as CUDA graphs on this card, tried
where a failure costs nothing.

A process of its own rolls out a small copy of the run's transformer with the run's own settings and
captures it (`tempflow.training.rehearse`). A capture that fails spoils the process it was made in;
here that is the child's.
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
LIMIT_S = 900.0  # the child takes seconds, or minutes where it compiles


def may_capture(config: Config, device: torch.device, note: Callable[[str], None]) -> bool:
    """Whether rollouts on this GPU may capture their forwards (a collective); tells why not. True
    where nothing is to be captured."""
    if not config.rollout.graphs or device.type != "cuda":
        return True
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
    """Why forwards are not to be captured on a device; None where the rehearsal captured and
    replayed them."""
    request = json.dumps({"config": json.loads(config.model_dump_json()), "device": str(device)})
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
    try:
        return json.loads(done.stdout.splitlines()[-1])["refusal"]
    except (IndexError, ValueError, LookupError, TypeError):  # it came to no answer
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return f"its process ended with status {done.returncode}: {last}"
