"""The one place for names of other libraries that are not public: each says where it was read, why
it is used, and what fails without it.

Read in CPython 3.11, torch 2.13.0, diffusers 0.42.1, transformers 5.23.0 and DeepSpeed 0.19.8;
tests/engine/test_compat.py finds out whether the installed versions still have them. Left in place
are names that their libraries hand to subclasses or keep for good: torch's `TorchDispatchMode` and
`tree_leaves`, whose modules alone are underscored, and the operators of `torch.ops.aten`.
"""

from __future__ import annotations

import atexit
import importlib
from contextlib import contextmanager
from typing import Any, Iterator

import torch


# ------------------------------------------------------------------------------------ Python, torch
def run_exit_handlers() -> None:
    """CPython: `atexit._run_exitfuncs`. A process that ends by `os._exit` skips the handlers of the
    libraries in it, and there is no public way to run them. Without it temporary files and trackers
    are left as they are at the end of a rank."""
    atexit._run_exitfuncs()


def storage_key(storage: torch.UntypedStorage) -> int:
    """torch: `UntypedStorage._cdata`, the address of the storage object. What is public,
    `data_ptr()`, is 0 on the meta device. Without it the dry run cannot tell a view from a new
    tensor."""
    return storage._cdata


def operator_of(overload) -> object:
    """torch: `OpOverload._overloadpacket`, the operator of which a dispatch mode sees an overload.
    `torch.utils.flop_counter` looks its formulas up by it. Without it the dry run counts no
    operations."""
    return overload._overloadpacket


def multiplies_bfloat16() -> bool:
    """torch: `torch.cpu._is_avx512_bf16_supported`, whether this processor has instructions for
    bfloat16. torch names no public way to ask. Without it the dtype "auto" cannot be resolved on a
    CPU."""
    return torch.cpu._is_avx512_bf16_supported()


# ---------------------------------------------------------------------------------------- diffusers
def block_classes(module: Any) -> list[str]:
    """diffusers: `ModelMixin._no_split_modules`, the class names of a transformer's blocks, which
    each model sets for device maps. No public attribute lists them. Without it ZeRO-3 gathers every
    layer by itself, many times slower."""
    return list(module._no_split_modules or [])


def compile_repeated_blocks(module: Any, **options) -> None:
    """diffusers: `ModelMixin._repeated_blocks`, which its public `compile_repeated_blocks` reads.
    SD3 sets none, and names its blocks in `_no_split_modules` alone. Without it SD3 is not
    compiled."""
    module._repeated_blocks = module._repeated_blocks or module._no_split_modules
    module.compile_repeated_blocks(**options)


def kept_in_float32(module: torch.nn.Module, dtype: torch.dtype) -> set[str]:
    """diffusers and transformers: `_keep_in_fp32_modules`, parts of names whose weights loading
    leaves in float32: by diffusers in every dtype, by transformers in float16; and of transformers
    `_keep_in_fp32_modules_strict`, in every dtype. Loading says so only by what it returns. Without
    them modules that are made from configs are not in the dtypes of loaded ones."""
    strict, some = (
        getattr(module, f"_keep_in_fp32_modules{more}", None) or () for more in ("_strict", "")
    )
    of_diffusers = hasattr(module, "_repeated_blocks")
    return {*strict, *(some if of_diffusers or dtype == torch.float16 else ())}


def rename_old_keys(module: Any, tensors: dict) -> None:
    """diffusers: `ModelMixin._fix_state_dict_keys_on_load`, which loading applies to names of older
    versions, in place. It is a step within `from_pretrained`. Without it checkpoints with such
    names (old VAEs) are refused, though they would load."""
    if hasattr(module, "_fix_state_dict_keys_on_load"):
        module._fix_state_dict_keys_on_load(tensors)


def has_attention_backends(module: torch.nn.Module) -> bool:
    """diffusers: `_attention_backend`, an attribute of the attention processors that
    `set_attention_backend` sets. That public method passes over those without it in silence.
    Without it model.attention_backend is refused for every model."""
    return any(
        hasattr(getattr(part, "processor", None), "_attention_backend") for part in module.modules()
    )


def unpack_latents(pipe, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """diffusers: `_unpack_latents` of the pipelines of FLUX.1 and Qwen-Image, from packed tokens to
    what their VAEs decode. It is a step within `__call__`. Without it these families cannot
    decode."""
    return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)


def flux_image_ids(
    rows: int, columns: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """diffusers: `FluxPipeline._prepare_latent_image_ids`, the positions of the image's tokens,
    [rows * columns, 3]. It is a step within `__call__`. Without it FLUX.1 has no forward."""
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    return FluxPipeline._prepare_latent_image_ids(1, rows, columns, device, dtype)


# ---------------------------------------------------------------------------------------- DeepSpeed
@contextmanager
def reading_universal_checkpoints(engine) -> Iterator[None]:
    """DeepSpeed: `engine._config.load_universal_checkpoint`. The public key
    `checkpoint.load_universal` is read once, at the start, when nobody knows yet how the checkpoint
    was written. Without it a run cannot resume on another number of ranks under ZeRO."""
    kept = engine._config.load_universal_checkpoint
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = kept


def leave_all_reduce_to_gloo() -> None:
    """DeepSpeed: `deepspeed.comm.torch.build_shm_op`. On CPUs it compiles a faster all-reduce at
    its first start, behind a lock file: a process that is killed meanwhile leaves it, and every
    later start waits for it for ever. No key turns that off. Without it a killed start can block
    all later ones. (`import deepspeed.comm.torch` would give PyTorch itself, which the package
    holds by that name.)"""
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]  # a private name that compat's test holds
