"""The DeepSpeed engine around the transformer, and the copies of its weights that rollouts and
references use.

Only the transformer is inside the engine; optimizer, precision and ZeRO stage are the config's
`deepspeed` section. The rollout copy (`replica`) keeps its storage for the whole run and is
refreshed in place after each update. With LoRA it shares all that is not trained with the engine
(`model.share_base`).
"""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Iterator, cast

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

from tempflow import eight_bit
from tempflow.compat import compile_repeated_blocks
from tempflow.config import Config, Lora
from tempflow.errors import UserError
from tempflow.models import Policy, load_denoiser
from tempflow.models.attention import set_attention_backend
from tempflow.models.lora import fill, layers_of, merged, read_adapters
from tempflow.models.quantized import QuantizedLinear, quantize_layers
from tempflow.training.leaves import call_by_position, leaf_section
from tempflow.training.precision import engine_dtype, frozen_as_loaded, shares_base
from tempflow.training.reference_policy import make_reference
from tempflow.training.shared_base import adopt, bare_copy

ADAPTER = "default"


def add_lora(module: Any, lora: Lora, targets: tuple[str, ...], seed: int) -> None:
    """Freeze the module and add adapters: Gaussian-initialised, or those of `lora.start`. UserError
    where a target names no layer, or the start does not fit."""
    from peft import LoraConfig

    module.requires_grad_(False)
    start = read_adapters(lora) if lora.start else {}
    wanted = list(lora.targets if lora.targets is not None else layers_of(start) or targets)
    layers = [name for name, _ in module.named_modules()]
    unknown = [t for t in wanted if not any(name == t or name.endswith("." + t) for name in layers)]
    if unknown and (lora.targets or start):
        key = "model.lora.targets" if lora.targets else "model.lora.start"
        raise UserError(
            f"{key}: no layer of the transformer is named"
            f" {', '.join(unknown[:5])}{', ...' * (len(unknown) > 5)}"
        )
    wanted = [t for t in wanted if t not in unknown]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapters = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=wanted
        )
        try:
            module.add_adapter(adapters, adapter_name=ADAPTER)
        except ValueError as error:  # layers that peft cannot adapt
            raise UserError(f"model.lora.targets: {error}") from None
    for part in module.modules():
        # peft gives adapters their layer's dtype, which a packed weight does not show.
        if isinstance(base := getattr(part, "base_layer", None), QuantizedLinear):
            part.lora_A.to(base.dtype), part.lora_B.to(base.dtype)
    if start:
        fill(module, start, ADAPTER)


class Runtime:
    """Trains the denoiser of `policy`. It becomes the policy's own without rollout.replica, and a
    copy that shares the base with it where `shares_base` says so; then the policy need not have
    one.

    engine: the DeepSpeed engine. dtype: of its weights and activations. trainable: name ->
    parameter.
    """

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy
        self.dtype = engine_dtype(config.deepspeed)
        self.stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
        module = load_denoiser(config.model.path, self.dtype).train()
        quantize_layers(module, config.model.quantize, policy.device)
        shared = bare_copy(module, self.dtype) if shares_base(config) else None
        if config.model.lora:
            add_lora(module, config.model.lora, policy.lora_targets, config.training.seed)
        else:
            module.requires_grad_(True)
        if config.model.gradient_checkpointing:
            cast(Any, module).enable_gradient_checkpointing()
        set_attention_backend(module, config.model.attention_backend)
        compile_blocks(module, config.training.compile)
        self.reference = make_reference(config, module, policy.device)
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        ds = self._deepspeed_config(module)
        call_by_position(module, ds.get("zero_optimization", {}))
        with frozen_as_loaded(module, ds):
            self.engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=eight_bit.maker(config.deepspeed["optimizer"]),
                model_parameters=list(self.trainable.values()),
                config=ds,
            )
        self.module = self.engine.module
        self._base_lrs = [group["lr"] for group in self.engine.optimizer.param_groups]
        self._sources = (
            self._replica_sources() if shared is None else adopt(shared, self.module, ADAPTER)
        )
        self._start_rollouts(shared)

    def _start_rollouts(self, shared: torch.nn.Module | None) -> None:
        """Prepare the denoiser that the policy rolls out with: `shared`, its own, or without
        rollout.replica the trained one."""
        if not self.config.rollout.replica:
            self.policy.set_denoiser(self.module)
            return
        if shared is not None:
            self.policy.set_denoiser(shared.to(self.policy.device))
        copy = self.policy.denoiser()
        set_attention_backend(copy, self.config.model.attention_backend)
        compile_blocks(copy, self.config.rollout.compile)
        if shared is not None or (self.config.model.lora and self.config.model.lora.start):
            self.refresh(copy)

    def _deepspeed_config(self, module: torch.nn.Module) -> dict:
        ds = copy.deepcopy(self.config.deepspeed)
        if eight_bit.asks_for(ds["optimizer"]):
            del ds["optimizer"]
        if "zero_optimization" in ds:
            ds["zero_optimization"] = leaf_section(ds["zero_optimization"], module)
        ds.setdefault("steps_per_print", 10**9)
        ds.setdefault("zero_allow_untested_optimizer", True)
        return {
            **ds,
            "train_micro_batch_size_per_gpu": self.config.training.states,
            "gradient_accumulation_steps": 1,
        }

    # -------------------------------------------------------------------------------------- updates
    def accumulate(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch; on the last one ranks' gradients are summed.

        DeepSpeed averages over ranks, so the loss is scaled up by their number.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.engine.dp_world_size, scale_wrt_gas=False)

    def step(self, lr_factor: float) -> float | None:
        """Apply the optimizer with learning rate `lr_factor` times the config's; returns the
        gradient norm.

        None where the gradient is not finite: then the weights and the optimizer's state stay as
        they are, on every rank.
        """
        for group, lr in zip(self.engine.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * lr_factor
        norm = self._plain_grad_norm()
        # with ZeRO or half precision DeepSpeed sees to it itself
        if norm is not None and not math.isfinite(norm):
            self.engine.zero_grad()
            return None
        self.engine.step()
        if not self.engine.was_step_applied():
            return None
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def _plain_grad_norm(self) -> float | None:
        """The norm before clipping where DeepSpeed wraps no optimizer, and so reports none."""
        if self.stage > 0 or self.dtype != torch.float32:
            return None
        return torch.nn.utils.get_total_norm(
            [p.grad for p in self.trainable.values() if p.grad is not None]
        ).item()

    def learning_rate(self) -> float:
        return self.engine.optimizer.param_groups[0]["lr"]

    @contextmanager
    def reference_transformer(self) -> Iterator[torch.nn.Module]:
        """The policy before training: the frozen copy, or the engine with its adapters off."""
        if self.reference is not None:
            yield self.reference
            return
        self.module.disable_adapters()
        try:
            yield self.engine
        finally:
            self.module.enable_adapters()

    # -------------------------------------------------------------------------------------- weights
    def gathered(self, parameters: list[torch.nn.Parameter]):
        """A context in which these parameters are whole on every rank."""
        return deepspeed.zero.GatheredParameters(parameters) if self.stage == 3 else nullcontext()

    def full_fp32(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The optimizer's fp32 master of a parameter, whole, on every rank (a collective)."""
        value = safe_get_full_fp32_param(parameter)
        return (parameter if value is None else value).detach().float()

    def trainable_shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shapes of the trainable weights, which ZeRO-3 may hold in slices."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.trainable.items()}

    def _replica_sources(self) -> list[tuple[str, list[str]]]:
        """For each weight of a copy of its own that training changes, the engine's parameters it is
        made of."""
        names = dict(self.module.named_parameters())
        if not self.config.model.lora:
            return [(name, [name]) for name in names]
        layers = sorted(
            name.split(".lora_A.")[0] for name in names if f".lora_A.{ADAPTER}." in name
        )
        parts = ("base_layer.weight", f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight")
        return [(f"{layer}.weight", [f"{layer}.{part}" for part in parts]) for layer in layers]

    @torch.no_grad()
    def refresh(
        self,
        target: torch.nn.Module,
        average: Callable[[list[str]], dict[str, torch.Tensor]] | None = None,
    ) -> None:
        """Write the current weights into a rollout copy, in place (a collective): adapters as they
        are where it shares the base, merged where it has weights of its own.

        average: gives values to use instead of the engine's for those of the parameters named that
        it has.
        """
        if target is self.module:
            return
        named, goal = dict(self.module.named_parameters()), dict(target.named_parameters())
        for bucket in self._buckets(named):
            self._copy(bucket, named, goal, average)

    def _copy(self, bucket: list[tuple[str, list[str]]], named, goal, average) -> None:
        """A bucket of `refresh`; its values are gone before the next one's are made."""
        parts = [part for _, parts in bucket for part in parts]
        values = average(parts) if average else {}
        with self.gathered([named[part] for part in parts if part not in values]):
            values = {part: values.get(part, named[part]) for part in parts}
            for name, parts in bucket:
                goal[name].copy_(self._merge(name, [values[part] for part in parts]))

    def _merge(self, name: str, values: list[torch.Tensor]) -> torch.Tensor:
        if len(values) == 1:
            return values[0]
        weight, down, up = values
        layer: Any = self.module.get_submodule(name.removesuffix(".weight"))
        return merged(weight, down, up, layer.scaling[ADAPTER])

    def _buckets(self, named) -> Iterator[list[tuple[str, list[str]]]]:
        bucket: list[tuple[str, list[str]]] = []
        size = 0
        for source in self._sources:
            elements = sum(
                getattr(named[part], "ds_numel", named[part].numel()) for part in source[1]
            )
            if bucket and size + elements > self.config.rollout.refresh_bucket:
                yield bucket
                bucket, size = [], 0
            bucket.append(source)
            size += elements
        if bucket:
            yield bucket


def compile_blocks(module: torch.nn.Module, how: str) -> None:
    """torch.compile of the repeated blocks, one compilation for all of a kind; "eager" leaves the
    module alone.

    Weights stay where they are, so refreshing them in place goes on working. Compiled code is
    cached on disk.
    """
    if how == "eager":
        return
    compile_repeated_blocks(
        module, mode="max-autotune-no-cudagraphs" if how == "compile-max" else "default"
    )
