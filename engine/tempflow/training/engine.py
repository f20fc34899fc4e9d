"""The DeepSpeed engine around the transformer, and the copies of its weights for rollouts and the
reference policy.

Only the transformer is inside the engine. Optimizer, precision and ZeRO stage come from the
config's `deepspeed` section. The rollout copy (`rollout.replica`) keeps its storage for the whole
run and is refreshed in place after each iteration. With LoRA it shares all frozen tensors with the
engine (`model.share_base`).
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
from tempflow.compat import compile_repeated_blocks, keep_signatures, spare_zero3_its_records
from tempflow.config import Config, Lora
from tempflow.errors import UserError
from tempflow.models import Policy, load_denoiser
from tempflow.models.attention import set_attention_backend
from tempflow.models.lora import fill, layers_of, merged, read_adapters
from tempflow.models.quantized import QuantizedLinear, quantize_layers
from tempflow.training.leaves import call_by_position, checkpoint_block, leaf_section
from tempflow.training.precision import engine_dtype, frozen_as_loaded, shares_base
from tempflow.training.reference_policy import make_reference
from tempflow.training.shared_base import adopt, bare_copy

ADAPTER = "default"  # peft's name of the one adapter


def add_lora(module: Any, lora: Lora, targets: tuple[str, ...], seed: int) -> None:
    """Freeze a module and add LoRA adapters to it.

    Args:
        module: the transformer.
        lora: rank, alpha, targets, and the adapters to start from, if any.
        targets: names of the layers to adapt, if neither `lora.targets` nor `lora.start` says.
        seed: of the Gaussian initialization.

    Raises:
        UserError: a target names no layer or a layer that peft cannot adapt, or the adapters of
            `lora.start` do not fit.
    """
    # Imported here, because full fine-tuning does not need it.
    from peft import LoraConfig

    module.requires_grad_(False)
    start = read_adapters(lora) if lora.start else {}
    wanted = list(lora.targets if lora.targets is not None else layers_of(start) or targets)
    layers = [name for name, _ in module.named_modules()]
    unknown = [t for t in wanted if not any(name == t or name.endswith("." + t) for name in layers)]
    # The family's own targets may name layers that this checkpoint lacks; a user's may not.
    if unknown and (lora.targets or start):
        key = "model.lora.targets" if lora.targets else "model.lora.start"
        raise UserError(
            f"{key}: no layer of the transformer is named"
            f" {', '.join(unknown[:5])}{', ...' * (len(unknown) > 5)}"
        )
    wanted = [t for t in wanted if t not in unknown]
    # The same adapters on every rank, and torch's global generator as it was.
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
        # peft gives adapters the dtype of their layer's weight, which is an integer type where the
        # weight is packed.
        if isinstance(base := getattr(part, "base_layer", None), QuantizedLinear):
            part.lora_A.to(base.dtype), part.lora_B.to(base.dtype)
    if start:
        fill(module, start, ADAPTER)


class Runtime:
    """The training engine around a denoiser, and the refresh of rollout copies from it.

    Args:
        config: a checked config.
        policy: the policy to train. Without `rollout.replica` its denoiser becomes the trained one;
            where `shares_base` is true, a copy that shares the frozen weights with the trained one.
            In both cases it may come without a denoiser.

    Attributes:
        engine: the DeepSpeed engine.
        module: the module inside it.
        dtype: of its weights and activations.
        stage: the ZeRO stage.
        reference: the frozen copy for a penalty; None without one, or with LoRA.
        trainable: the trained parameters by name.
    """

    # The order of the constructor matters. The bare copy must be made before adapters are added.
    # Compiling and the reference copy come before DeepSpeed, which under ZeRO-3 cuts the parameters
    # into slices. The copy's tensors are bound after it, because it moves and casts them.
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
            cast(Any, module).enable_gradient_checkpointing(
                checkpoint_block if self.stage == 3 else None
            )
        set_attention_backend(module, config.model.attention_backend)
        compile_blocks(module, config.training.compile)
        self.reference = make_reference(config, module, policy.device)
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        ds = self._deepspeed_config(module)
        call_by_position(module, ds.get("zero_optimization", {}))
        spare_zero3_its_records()
        with frozen_as_loaded(module, ds):
            self.engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=eight_bit.maker(config.deepspeed["optimizer"]),
                model_parameters=list(self.trainable.values()),
                config=ds,
            )
        self.module = self.engine.module
        keep_signatures(self.module)
        self._base_lrs = [group["lr"] for group in self.engine.optimizer.param_groups]
        self._sources = (
            self._replica_sources() if shared is None else adopt(shared, self.module, ADAPTER)
        )
        self._start_rollouts(shared)

    def _start_rollouts(self, shared: torch.nn.Module | None) -> None:
        """Prepare the policy's denoiser for rollouts: the trained module without rollout.replica,
        otherwise `shared` or, where that is None, the policy's own."""
        if not self.config.rollout.replica:
            self.policy.set_denoiser(self.module)
            return
        if shared is not None:
            self.policy.set_denoiser(shared.to(self.policy.device))
        copy = self.policy.denoiser()
        set_attention_backend(copy, self.config.model.attention_backend)
        compile_blocks(copy, self.config.rollout.compile)
        # A copy with weights of its own was loaded from the checkpoint, and so is up to date unless
        # training starts from given adapters.
        if shared is not None or (self.config.model.lora and self.config.model.lora.start):
            self.refresh(copy)

    def _deepspeed_config(self, module: torch.nn.Module) -> dict:
        ds = copy.deepcopy(self.config.deepspeed)
        # DeepSpeed does not know this optimizer; it is given to `initialize` as a client's own.
        if eight_bit.asks_for(ds["optimizer"]):
            del ds["optimizer"]
        if "zero_optimization" in ds:
            ds["zero_optimization"] = leaf_section(
                ds["zero_optimization"], module, self.config.model.gradient_checkpointing
            )
        ds.setdefault("steps_per_print", 10**9)  # the run has its own console
        ds.setdefault("zero_allow_untested_optimizer", True)
        return {
            **ds,
            "train_micro_batch_size_per_gpu": self.config.training.states,
            # `accumulate` sets the boundary itself: the number of micro-batches varies.
            "gradient_accumulation_steps": 1,
        }

    # -------------------------------------------------------------------------------------- updates
    def close(self) -> None:
        """Let DeepSpeed give back its hooks and buckets, which at stage 3 are 2 GB unless the
        section says otherwise. They would last as long as the process, which may train again."""
        self.engine.destroy()

    def accumulate(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch (a collective).

        Args:
            loss: fp32 [], this rank's share of the mean over the states of all ranks.
            last: whether it is the last micro-batch of the optimizer step; the gradients of all
                ranks are then summed.
        """
        # DeepSpeed averages gradients over ranks, but the losses are shares of one mean and must
        # be summed, so the loss is scaled by the number of ranks.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.engine.dp_world_size, scale_wrt_gas=False)

    def step(self, lr_factor: float) -> float | None:
        """Apply the optimizer (a collective).

        Args:
            lr_factor: factor of the config's learning rate.

        Returns:
            The norm of the gradient before clipping. None if the gradient is not finite; the
            weights and the optimizer's state are then unchanged on every rank.
        """
        # Set directly, without DeepSpeed's scheduler: the factor may follow the clock.
        for group, lr in zip(self.engine.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * lr_factor
        norm = self._plain_grad_norm()
        # With ZeRO or half precision DeepSpeed skips such a step itself.
        if norm is not None and not math.isfinite(norm):
            self.engine.zero_grad()
            return None
        self.engine.step()
        if not self.engine.was_step_applied():
            return None
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def _plain_grad_norm(self) -> float | None:
        """The gradient norm before clipping in fp32 at ZeRO stage 0; None elsewhere."""
        # There DeepSpeed does not wrap the optimizer, reports no norm and skips no step.
        if self.stage > 0 or self.dtype != torch.float32:
            return None
        return torch.nn.utils.get_total_norm(
            [p.grad for p in self.trainable.values() if p.grad is not None]
        ).item()

    def learning_rate(self) -> float:
        """The learning rate of the newest step."""
        return self.engine.optimizer.param_groups[0]["lr"]

    @contextmanager
    def reference_transformer(self) -> Iterator[torch.nn.Module]:
        """The policy before training: the frozen copy, or with LoRA the engine with its adapters
        switched off."""
        if self.reference is not None:
            yield self.reference
            return
        # The engine, not its module: under ZeRO-3 its forward gathers the weights.
        self.module.disable_adapters()
        try:
            yield self.engine
        finally:
            self.module.enable_adapters()

    # -------------------------------------------------------------------------------------- weights
    def gathered(self, parameters: list[torch.nn.Parameter]):
        """A context in which these parameters are whole on every rank (a collective at stage 3)."""
        return deepspeed.zero.GatheredParameters(parameters) if self.stage == 3 else nullcontext()

    def full_fp32(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The optimizer's fp32 master copy of a parameter, whole, on every rank (a collective)."""
        # None where there is no master copy: at stage 0 the parameter itself is fp32.
        value = safe_get_full_fp32_param(parameter)
        return (parameter if value is None else value).detach().float()

    def trainable_shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of each trained weight."""
        # Under ZeRO-3 a parameter's own shape is that of its slice; ds_shape is that of the whole.
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.trainable.items()}

    def _replica_sources(self) -> list[tuple[str, list[str]]]:
        """(weight, parameters) pairs: each weight that training changes in a copy with weights of
        its own, and the engine's parameters that it is computed from."""
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
        """Write the current weights into a rollout copy, in place (a collective).

        Adapters are copied where the copy shares the base, and merged where it has weights of its
        own. Captured graphs stay valid, because no weight moves.

        Args:
            target: the rollout copy; nothing happens if it is the trained module itself.
            average: returns averages for those of some named parameters that have one; these are
                used instead of the engine's values.
        """
        if target is self.module:
            return
        named, goal = dict(self.module.named_parameters()), dict(target.named_parameters())
        for bucket in self._buckets(named):
            self._copy(bucket, named, goal, average)

    def _copy(self, bucket: list[tuple[str, list[str]]], named, goal, average) -> None:
        """Copy one bucket of `refresh`. Its gathered values are freed before the next bucket."""
        parts = [part for _, parts in bucket for part in parts]
        values = average(parts) if average else {}
        # Gathering in one call for a bucket, not one for each weight, saves messages.
        with self.gathered([named[part] for part in parts if part not in values]):
            values = {part: values.get(part, named[part]) for part in parts}
            for name, parts in bucket:
                goal[name].copy_(self._merge(name, [values[part] for part in parts]))

    def _merge(self, name: str, values: list[torch.Tensor]) -> torch.Tensor:
        """A weight of the copy from its parts: the part itself, or base, down and up merged."""
        if len(values) == 1:
            return values[0]
        weight, down, up = values
        layer: Any = self.module.get_submodule(name.removesuffix(".weight"))
        return merged(weight, down, up, layer.scaling[ADAPTER])

    def _buckets(self, named) -> Iterator[list[tuple[str, list[str]]]]:
        """`_sources` in groups of at most rollout.refresh_bucket elements, or of one weight."""
        bucket: list[tuple[str, list[str]]] = []
        size = 0
        for source in self._sources:
            elements = sum(
                # Of the whole parameter: under ZeRO-3 numel() is that of this rank's slice.
                getattr(named[part], "ds_numel", named[part].numel())
                for part in source[1]
            )
            if bucket and size + elements > self.config.rollout.refresh_bucket:
                yield bucket
                bucket, size = [], 0
            bucket.append(source)
            size += elements
        if bucket:
            yield bucket


def compile_blocks(module: torch.nn.Module, how: str) -> None:
    """Compile the repeated blocks of a transformer, once for all blocks of a kind.

    Weights stay where they are, so they can still be refreshed in place. torch caches the compiled
    code on disk.

    Args:
        module: the transformer.
        how: "eager" (do nothing), "compile", or "compile-max", which tries more kernels.
    """
    if how == "eager":
        return
    compile_repeated_blocks(
        module, mode="max-autotune-no-cudagraphs" if how == "compile-max" else "default"
    )
