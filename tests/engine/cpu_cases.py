"""Keeping a test on the CPU of a machine that has a GPU (the marker `cpu`).

DeepSpeed takes one accelerator for the life of a process. In the tests' own process that is the
CPU, whose results are the same bits every time; what trains on a GPU is a process of its own
(`run_cases.script`, `ranks` and `launch`), as it is for a user.
"""

import os
from contextlib import contextmanager

import torch

VARIABLE = "DS_ACCELERATOR"


@contextmanager
def on_cpu():
    """Meanwhile training, evaluation and DeepSpeed take the CPU, here and in every process that is
    started."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "cpu"
    if torch.cuda.is_available():  # importing DeepSpeed has taken the GPU
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before
