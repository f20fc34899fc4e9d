"""The base class of neural rewards: their common options, device, and batches."""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from tempflow.errors import UserError
from tempflow.rewards.base import Reward, Scores

_DEVICES = ("cpu", "cuda")  # no "cuda:1": a worker sees only the GPU of its rank
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(eq=False)
class ModelReward(Reward):
    """A reward that runs a model. A subclass gives `path` a default, adds options as fields, and
    defines `_load` and `_score`.

    Args:
        path: a folder or a hub repository; by default the published weights.
        revision: branch, tag or commit of a hub repository.
        device: "cpu", or "cuda", which is the GPU of the rank that the worker serves.
        dtype: "float32", "bfloat16" or "float16", of the model's weights and activations.
        batch_size: images per forward.
    """

    path: str
    revision: str = "main"
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 16

    def __post_init__(self):
        if self.device not in _DEVICES:
            raise UserError(
                f'device: expected "cpu" or "cuda" (the rank\'s own GPU), got {self.device!r}'
            )
        if self.dtype not in _DTYPES:
            raise UserError(f"dtype: expected one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.batch_size < 1:
            raise UserError(f"batch_size: expected 1 or more, got {self.batch_size}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    def load(self, threads=1):
        # `threads` needs no call: the worker's environment has OMP_NUM_THREADS.
        if self.device == "cuda" and not torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            raise UserError(
                'device: "cuda", but PyTorch finds no GPU in this process (CUDA_VISIBLE_DEVICES is'
                f' {visible!r}); use "cpu"'
            )
        self._load()

    @torch.inference_mode()
    def score(self, images, prompts, metadata):
        size = self.batch_size
        parts = [slice(i, i + size) for i in range(0, len(images), size)]
        batches = [self._score(images[part], prompts[part], metadata[part]) for part in parts]
        # One transfer for all batches. torch.cat refuses an empty list.
        return Scores(
            torch.cat(batches).float().cpu().numpy() if batches else np.zeros(0, np.float32)
        )

    @abstractmethod
    def _load(self) -> None:
        """Load the model to `self.device` in `self.torch_dtype`."""

    @abstractmethod
    def _score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        """Score one batch, n at most `batch_size`: uint8 [n, H, W, 3] -> fp32 [n]."""
