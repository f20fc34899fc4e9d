"""How DeepSpeed spreads weights, gradients and optimizer state over GPUs, by ZeRO stage and dtype
(as of DeepSpeed 0.19)."""

from __future__ import annotations

import math

import torch

from tempflow import eight_bit
from tempflow.errors import UserError, shown

STATES = {
    "adam": 2,
    "adamw": 2,
    "lamb": 2,
    "onebitadam": 3,
    "onebitlamb": 3,
    "zerooneadam": 3,
    "muadam": 2,
    "muadamw": 2,
    "radam": 2,
    "nadam": 2,
    "adamax": 2,
    "sgd": 0,
    "musgd": 0,
    "lion": 1,
    "adagrad": 1,
    "rmsprop": 1,
    "muon": 1,
}
ACCUMULATE = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


class Zero:
    """Bytes on one of `gpus` GPUs for weights trained in `dtype`, and in its process's host memory
    where offloaded.

    parameters, gradients, optimizer (with fp32 master weights), buffers: all the time; step: on top
    while the optimizer runs.
    """

    def __init__(self, ds: dict, gpus: int, weights, dtype: torch.dtype):
        self._zero = ds.get("zero_optimization", {})
        self._gpus, self._weights, self._dtype = gpus, weights, dtype
        self.stage = int(self._zero.get("stage", 0))
        self._accumulate = self._accumulation(ds)
        self._states, self._torch_adam = _optimizer(ds["optimizer"])
        self._eight_bit = eight_bit.asks_for(ds["optimizer"])
        own = -(-weights.trained // gpus) if self.stage else weights.trained
        self._own = own
        self.whole_fp32 = 4 * weights.trained
        offload_optimizer, offload_parameters = (
            self._offloads("offload_optimizer"),
            self._offloads("offload_param"),
        )
        parameters, state = self._parameters(), self._optimizer_state()
        self.gradients = self._gradients(offload_optimizer)
        self.buffers = self._buffers()
        self.parameters = 0 if offload_parameters and self.stage == 3 else parameters
        self.optimizer = 0 if offload_optimizer and self.stage else state
        self.offloaded = (parameters - self.parameters) + (state - self.optimizer)
        self.offloaded += own * 4 if offload_optimizer and self.stage else 0
        self.step = 0 if self.optimizer == 0 else self._step()

    def _parameters(self) -> int:
        """Of stage 3 a partition of each tensor; what is gathered from the others for a forward is
        among the buffers."""
        if self.stage < 3:
            return self._weights.bytes
        return self._weights.bytes - self._weights.lasting + self.share

    def _optimizer_state(self) -> int:
        if self.stage:
            return self._flat(self._own)
        counters = 4 * self._weights.tensors if self._torch_adam else 0
        return self._own_states + counters

    def _flat(self, elements: int) -> int:
        """From stage 1 on: fp32 master weights and states, as one tensor."""
        if self._eight_bit:
            return elements * 4 + eight_bit.state_bytes(elements)
        return elements * 4 * (1 + self._states)

    @property
    def _own_states(self) -> int:
        """At stage 0: states of each tensor by itself."""
        if self._eight_bit:
            return self._weights.eight_bit
        return self._weights.trained * self._dtype.itemsize * self._states

    def _gradients(self, offloaded: bool) -> int:
        trained, accumulate = self._weights.trained, self._accumulate.itemsize
        if self.stage == 0:
            return trained * self._dtype.itemsize
        if self.stage == 1:
            # Whole sums over the micro-batches; with bf16 and fp32 sums DeepSpeed's BF16 optimizer
            # updates from them in place, else a partition of them is copied out for the step.
            in_place = (
                self._dtype == torch.bfloat16
                and self._accumulate == torch.float32
                and not offloaded
            )
            return trained * accumulate + (0 if in_place else self._own * accumulate)
        return 0 if offloaded else self._own * accumulate

    def _buffers(self) -> int:
        """Buckets for gradients under way, and at stage 3 the weights gathered for the layers that
        run."""
        if (
            self.stage == 0
            or self.stage == 1
            and self._dtype == torch.bfloat16
            and self._accumulate == torch.float32
        ):
            return 0
        bucket = self._number("reduce_bucket_size", 5e8)
        size = (self._accumulate if self.stage == 1 else self._dtype).itemsize
        double = self.stage < 3 and self._zero.get("overlap_comm") is True
        held = bucket * size * (1 + double) if self._zero.get("contiguous_gradients", True) else 0
        if self.stage < 3:
            return held
        return held + self.gathered

    @property
    def gathered(self) -> int:
        """Of weights spread over the GPUs, those that are whole around the layer that runs."""
        live = self._number("stage3_max_live_parameters", 1e9) + self._number(
            "stage3_prefetch_bucket_size", 5e7
        )
        return min(self._weights.lasting, live * self._dtype.itemsize)

    @property
    def share(self) -> int:
        """Of weights spread over the GPUs, those of one."""
        return -(-self._weights.lasting // self._gpus)

    @property
    def saved_weights(self) -> int:
        """Of the weights in a checkpoint's DeepSpeed files, all ranks together; at stage 3 they
        hold the fp32 masters alone."""
        return self._weights.trained * self._dtype.itemsize if self.stage < 3 else 0

    @property
    def saved_optimizer(self) -> int:
        """Of the optimizer's state there, with fp32 master weights from stage 1 on."""
        return self._flat(self._weights.trained) if self.stage else self._own_states

    def _step(self) -> int:
        """torch's AdamW makes a temporary of the size of what it updates at a time; gradients
        become fp32 first."""
        updated = self._own
        if self.stage == 3:
            updated = min(updated, max(1, self._number("sub_group_size", 1e9)))
        converted = self.stage > 0 and self._accumulate != torch.float32
        return updated * 4 * (self._torch_adam + converted)

    def _accumulation(self, ds: dict) -> torch.dtype:
        asked = ds.get("data_types", {})
        asked = asked.get("grad_accum_dtype") if isinstance(asked, dict) else asked
        if asked is None:
            return self._dtype
        if not isinstance(asked, str) or asked not in ACCUMULATE:
            raise UserError(
                f"deepspeed.data_types.grad_accum_dtype: expected one of {', '.join(ACCUMULATE)},"
                f" got {shown(asked)}"
            )
        return ACCUMULATE[asked]

    def _offloads(self, key: str) -> bool:
        value = self._zero.get(key)
        if value is None:
            return False
        device = value.get("device", "none") if isinstance(value, dict) else None
        if device not in ("none", "cpu", "nvme", None) or device is None:
            raise UserError(
                f'deepspeed.zero_optimization.{key}: expected a table with device "cpu", "nvme" or'
                f' "none", got {shown(value)}'
            )
        return device != "none"

    def _number(self, key: str, default: float) -> int:
        value = self._zero.get(key, default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # no isfinite, which has no answer for the largest integers
        if not number or not 0 <= value < math.inf:
            raise UserError(
                f"deepspeed.zero_optimization.{key}: expected a number of elements, got"
                f" {shown(value)}"
            )
        return int(value)


def _optimizer(table: dict) -> tuple[int, bool]:
    """(state tensors per weight, whether it is torch's Adam) of the `optimizer` table."""
    kind, params = table.get("type"), table.get("params", {})
    if not isinstance(kind, str):
        raise UserError(
            f'deepspeed.optimizer.type: expected a name such as "AdamW", got {shown(kind)}'
        )
    if not isinstance(params, dict):
        raise UserError(f"deepspeed.optimizer.params: expected a table, got {shown(params)}")
    states = STATES.get(kind.lower(), 2)
    if kind.lower() in ("sgd", "musgd", "rmsprop") and params.get("momentum"):
        states += 1
    return states, bool(params.get("torch_adam")) and kind.lower() in ("adam", "adamw")
