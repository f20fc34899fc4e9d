"""Bytes of weights, gradients and optimizer state that DeepSpeed puts on each GPU.

They depend on the ZeRO stage, the dtypes, offloading and the optimizer; read in DeepSpeed 0.19.
"""

from __future__ import annotations

import math

import torch

from tempflow import eight_bit
from tempflow.errors import UserError, shown

# Tensors of state for each weight, by the optimizer's name in lower case; 2 for names not listed.
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
# Values of deepspeed.data_types.grad_accum_dtype.
ACCUMULATE = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


class Zero:
    """Bytes of the training engine on one GPU, and in its process's host memory if offloaded.

    Attributes `parameters`, `gradients`, `optimizer` (with fp32 weights) and `buffers` are in use
    all the time, `step` in addition while the optimizer runs. `offloaded` is in host memory.
    `whole_fp32` is a copy of all trained weights in fp32.

    Args:
        ds: the `deepspeed` section.
        gpus: number of GPUs.
        weights: `model.Weights` of the transformer.
        dtype: in which it is trained.

    Raises:
        UserError: a key of the section has the wrong type.
    """

    def __init__(self, ds: dict, gpus: int, weights, dtype: torch.dtype):
        self._zero = ds.get("zero_optimization", {})
        self._gpus, self._weights, self._dtype = gpus, weights, dtype
        self.stage = int(self._zero.get("stage", 0))
        self._accumulate = self._accumulation(ds)
        self._states, self._torch_adam = _optimizer(ds["optimizer"])
        self._eight_bit = eight_bit.asks_for(ds["optimizer"])
        # From stage 1 on each rank updates an equal part of the weights.
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
        # The CPU's optimizer has its gradients on the host too, in fp32.
        self.offloaded += own * 4 if offload_optimizer and self.stage else 0
        self.step = 0 if self.optimizer == 0 else self._step()

    def _parameters(self) -> int:
        """Bytes of parameters: at stage 3 a part of each tensor, else all. What a forward gathers
        from other GPUs is among the buffers."""
        if self.stage < 3:
            return self._weights.bytes
        return self._weights.bytes - self._weights.lasting + self.share

    def _optimizer_state(self) -> int:
        """Bytes of this GPU's optimizer state."""
        if self.stage:
            return self._flat(self._own)
        # torch's Adam counts steps in a tensor for each parameter.
        counters = 4 * self._weights.tensors if self._torch_adam else 0
        return self._own_states + counters

    def _flat(self, elements: int) -> int:
        """Bytes from stage 1 on, where fp32 weights and states are flat tensors of `elements`."""
        if self._eight_bit:
            return elements * 4 + eight_bit.state_bytes(elements)
        return elements * 4 * (1 + self._states)

    @property
    def _own_states(self) -> int:
        """Bytes of states at stage 0, where each parameter has its own, in its dtype."""
        if self._eight_bit:
            return self._weights.eight_bit
        return self._weights.trained * self._dtype.itemsize * self._states

    def _gradients(self, offloaded: bool) -> int:
        """Bytes of gradients; `offloaded`: the optimizer is on the CPU."""
        trained, accumulate = self._weights.trained, self._accumulate.itemsize
        if self.stage == 0:
            return trained * self._dtype.itemsize
        if self.stage == 1:
            # Every GPU sums all gradients over micro-batches. DeepSpeed's BF16 optimizer (bf16
            # weights, fp32 sums) updates from the sums in place; other optimizers get a copy of
            # this GPU's part.
            in_place = (
                self._dtype == torch.bfloat16
                and self._accumulate == torch.float32
                and not offloaded
            )
            return trained * accumulate + (0 if in_place else self._own * accumulate)
        return 0 if offloaded else self._own * accumulate

    def _buffers(self) -> int:
        """Bytes of the buckets through which gradients are exchanged, and at stage 3 of gathered
        weights."""
        # The BF16 optimizer of stage 1 reduces its sums where they are, without buckets.
        if (
            self.stage == 0
            or self.stage == 1
            and self._dtype == torch.bfloat16
            and self._accumulate == torch.float32
        ):
            return 0
        bucket = self._number("reduce_bucket_size", 5e8)
        size = (self._accumulate if self.stage == 1 else self._dtype).itemsize
        # With overlap_comm one bucket is filled while the other is sent.
        double = self.stage < 3 and self._zero.get("overlap_comm") is True
        held = bucket * size * (1 + double) if self._zero.get("contiguous_gradients", True) else 0
        if self.stage < 3:
            return held
        return held + self.gathered

    @property
    def gathered(self) -> int:
        """Most bytes of weights that stage 3 gathers at once, around the layer that runs."""
        live = self._number("stage3_max_live_parameters", 1e9) + self._number(
            "stage3_prefetch_bucket_size", 5e7
        )
        return min(self._weights.lasting, live * self._dtype.itemsize)

    @property
    def share(self) -> int:
        """Bytes of one GPU's share of weights that are spread over all."""
        return -(-self._weights.lasting // self._gpus)

    @property
    def saved_weights(self) -> int:
        """Bytes of weights in a checkpoint's DeepSpeed files, of all ranks together."""
        # At stage 3 the files have the fp32 weights only, which belong to the optimizer.
        return self._weights.trained * self._dtype.itemsize if self.stage < 3 else 0

    @property
    def saved_optimizer(self) -> int:
        """Bytes of optimizer state in these files, from stage 1 on with fp32 weights."""
        return self._flat(self._weights.trained) if self.stage else self._own_states

    def _step(self) -> int:
        """Bytes of temporary tensors while the optimizer runs."""
        # torch's AdamW makes a temporary tensor of the size of what it updates; gradients that are
        # not fp32 are converted first. At stage 3 it updates a group of weights at a time.
        updated = self._own
        if self.stage == 3:
            updated = min(updated, max(1, self._number("sub_group_size", 1e9)))
        converted = self.stage > 0 and self._accumulate != torch.float32
        return updated * 4 * (self._torch_adam + converted)

    def _accumulation(self, ds: dict) -> torch.dtype:
        """The dtype in which gradients are summed over micro-batches. Raises UserError."""
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
        """Whether the table `key` moves something off the GPU. Raises UserError."""
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
        """A number of elements in zero_optimization, as JSON has it: 5e8 is a float. Raises
        UserError."""
        value = self._zero.get(key, default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # Not math.isfinite, which raises for integers beyond float's range.
        if not number or not 0 <= value < math.inf:
            raise UserError(
                f"deepspeed.zero_optimization.{key}: expected a number of elements, got"
                f" {shown(value)}"
            )
        return int(value)


def _optimizer(table: dict) -> tuple[int, bool]:
    """Tensors of state per weight, and whether PyTorch's Adam is used, from the table `optimizer`.

    Raises UserError.
    """
    kind, params = table.get("type"), table.get("params", {})
    if not isinstance(kind, str):
        raise UserError(
            f'deepspeed.optimizer.type: expected a name such as "AdamW", got {shown(kind)}'
        )
    if not isinstance(params, dict):
        raise UserError(f"deepspeed.optimizer.params: expected a table, got {shown(params)}")
    states = STATES.get(kind.lower(), 2)
    # These keep a momentum only if asked to.
    if kind.lower() in ("sgd", "musgd", "rmsprop") and params.get("momentum"):
        states += 1
    return states, bool(params.get("torch_adam")) and kind.lower() in ("adam", "adamw")
