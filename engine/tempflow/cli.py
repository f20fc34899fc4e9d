"""What the scripts share: how errors end, and which noise of the libraries is kept from the terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Callable

from tempflow.errors import RankError, UserError


def quiet_libraries() -> None:
    """Keep the libraries' advice out of the progress display; their errors stay. Before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Compiled code outlives the machine's temporary folder. To be set before torch's compiler reads it.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser("~/.cache/tempflow/inductor"))
    if not torch_sees_a_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("DeepSpeed", "transformers", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def torch_sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit: 2 with the bare message for a user's error, main's own status otherwise."""
    try:
        status = main() or 0
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    leave_group()
    sys.stdout.flush()
    sys.exit(status)


def leave_group() -> None:
    """Close the process group, if the script joined one: its threads let go of Python objects, and a process whose
    interpreter is already going down aborts in them (every third start of two gloo ranks that exit after a broadcast)."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
