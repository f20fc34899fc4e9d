"""Set before anything imports triton, which diffusers and transformers do: without a GPU its kernels run interpreted."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
