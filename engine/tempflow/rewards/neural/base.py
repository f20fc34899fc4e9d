"""What the neural rewards share: their options, their device, scoring in batches."""

from __future__ import annotations

import os

import numpy as np
import torch

from tempflow.errors import UserError
from tempflow.rewards.protocol import Reward, Scores

_DEVICES = ("cpu", "cuda")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelReward(Reward):
    """A reward that runs a model; a subclass defines `_load` and `_score`.

    path: a folder or a hub repository; empty for `PATH`, the published weights. revision: branch, tag or commit of a
    hub repository. device: "cpu" or "cuda", which is the GPU of the rank that the worker serves. dtype: of the model's
    weights and activations; empty for `DTYPE`. batch_size: pictures a forward.
    """

    ID = ""
    PATH = ""
    DTYPE = "float32"

    def __init__(
        self, path: str = "", revision: str = "main", device: str = "cpu", dtype: str = "", batch_size: int = 16
    ):
        dtype = dtype or self.DTYPE
        if device not in _DEVICES:
            raise UserError(f'{self._key("device")}: expected "cpu" or "cuda" (the rank\'s own GPU), got {device!r}')
        if dtype not in _DTYPES:
            raise UserError(f"{self._key('dtype')}: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
        if batch_size < 1:
            raise UserError(f"{self._key('batch_size')}: expected 1 or more, got {batch_size}")
        self._path, self._revision = path or self.PATH, revision
        self._device, self._dtype, self._batch_size = device, _DTYPES[dtype], batch_size

    def load(self, threads=1):
        if self._device == "cuda" and not torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            raise UserError(
                f'{self._key("device")}: "cuda", but PyTorch finds no GPU here (CUDA_VISIBLE_DEVICES is {visible!r}); use "cpu"'
            )
        self._load()

    @torch.inference_mode()
    def score(self, images, prompts, metadata):
        size = self._batch_size
        batches = [self._score(images[i : i + size], prompts[i : i + size]) for i in range(0, len(images), size)]
        return Scores(torch.cat(batches).float().cpu().numpy() if batches else np.zeros(0, np.float32))

    def _load(self) -> None:
        """Load the model onto `self._device` in `self._dtype`."""
        raise NotImplementedError

    def _score(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        """images: uint8 [n, H, W, 3] -> fp32 [n]."""
        raise NotImplementedError

    def _key(self, option: str) -> str:
        """How an error message names an option."""
        return f"rewards.{self.ID}.{option}"
