"""All uses of private names of other libraries, each with its reason and what fails without it.

Read in CPython 3.11, torch 2.13.0, diffusers 0.42.1, transformers 5.23.0 and DeepSpeed 0.19.8.
tests/engine/test_compat.py checks that the installed versions still have them. Not collected here
are names that their libraries support for extensions: torch's `TorchDispatchMode` and
`tree_leaves`, of which only the modules are underscored, and the operators of `torch.ops.aten`.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import itertools
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Iterable, Iterator
from weakref import WeakKeyDictionary

import torch


def _module(name: str) -> Any:
    """A module whose private names are replaced; Any, because types know public names only."""
    return importlib.import_module(name)


# ------------------------------------------------------------------------------------ Python, torch
def run_exit_handlers() -> None:
    """CPython: `atexit._run_exitfuncs`, runs the exit handlers now.

    `os._exit` skips the exit handlers of libraries, and no public function runs them. Without it a
    rank would leave temporary files behind and trackers unfinished.
    """
    atexit._run_exitfuncs()


def storage_key(storage: torch.UntypedStorage) -> int:
    """torch: `UntypedStorage._cdata`, the address of the storage object.

    The public `data_ptr()` is 0 on the meta device. Without it the dry run could not tell a view
    from a new tensor.
    """
    return storage._cdata


def operator_of(overload) -> object:
    """torch: `OpOverload._overloadpacket`, the operator that an overload belongs to.

    A dispatch mode sees overloads, and `torch.utils.flop_counter` has formulas by operator. Without
    it the dry run could not count operations.
    """
    return overload._overloadpacket


def multiplies_bfloat16() -> bool:
    """torch: `torch.cpu._is_avx512_bf16_supported`, whether the CPU has bfloat16 instructions.

    torch has no public function for it. Without it the dtype "auto" could not be resolved on a CPU.
    """
    return torch.cpu._is_avx512_bf16_supported()


# ---------------------------------------------------------------------------------------- diffusers
def block_classes(module: Any) -> list[str]:
    """diffusers: `ModelMixin._no_split_modules`, the class names of a transformer's blocks.

    Each model sets it for device maps; no public attribute lists them. Without it ZeRO-3 would
    gather every layer by itself, which is many times slower.
    """
    return list(module._no_split_modules or [])


def compile_repeated_blocks(module: Any, **options) -> None:
    """diffusers: `ModelMixin._repeated_blocks`, which the public `compile_repeated_blocks` reads.

    SD3 does not set it; its blocks are named in `_no_split_modules` only. Without it SD3 could not
    be compiled.
    """
    module._repeated_blocks = module._repeated_blocks or module._no_split_modules
    module.compile_repeated_blocks(**options)


def kept_in_float32(module: torch.nn.Module, dtype: torch.dtype) -> set[str]:
    """diffusers and transformers: `_keep_in_fp32_modules`, parts of names of weights that loading
    keeps in float32.

    diffusers does so for every dtype, transformers for float16 only, and for every dtype with
    `_keep_in_fp32_modules_strict`. There is no public function for it. Without them modules made
    from configs would have other dtypes than loaded ones.
    """
    # transformers' models lack this attribute of diffusers' ModelMixin, so it tells the two apart.
    strict, some = (
        getattr(module, f"_keep_in_fp32_modules{more}", None) or () for more in ("_strict", "")
    )
    of_diffusers = hasattr(module, "_repeated_blocks")
    return {*strict, *(some if of_diffusers or dtype == torch.float16 else ())}


def rename_old_keys(module: Any, tensors: dict) -> None:
    """diffusers: `ModelMixin._fix_state_dict_keys_on_load`, renames old versions' keys in place.

    It is a step within `from_pretrained`. Without it checkpoints with such keys (old VAEs) would be
    refused, although diffusers can load them.
    """
    if hasattr(module, "_fix_state_dict_keys_on_load"):
        module._fix_state_dict_keys_on_load(tensors)


def has_attention_backends(module: torch.nn.Module) -> bool:
    """diffusers: `_attention_backend`, the attribute of attention processors that
    `set_attention_backend` sets.

    That public method silently ignores processors without it, so the key would have no effect on
    such models. Without the name model.attention_backend would be refused for every model.
    """
    return any(
        hasattr(getattr(part, "processor", None), "_attention_backend") for part in module.modules()
    )


def unpack_latents(pipe, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """diffusers: `_unpack_latents` of the FLUX.1 and Qwen-Image pipelines, turns packed tokens into
    latents that their VAEs decode.

    It is a step within `__call__`. Without it these families could not decode.
    """
    return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)


def flux_image_ids(
    rows: int, columns: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """diffusers: `FluxPipeline._prepare_latent_image_ids`, positions of image tokens [rows *
    columns, 3].

    It is a step within `__call__`. Without it FLUX.1 could not be run.
    """
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    return FluxPipeline._prepare_latent_image_ids(1, rows, columns, device, dtype)


# ---------------------------------------------------------------------------------------- DeepSpeed
@contextmanager
def reading_universal_checkpoints(engine) -> Iterator[None]:
    """DeepSpeed: `engine._config.load_universal_checkpoint`, set within the block.

    The public key `checkpoint.load_universal` is read at the start, before it is known how the
    checkpoint was written. Without it a run could not resume on another number of ranks under ZeRO.
    """
    # Put back afterwards: this run's own checkpoints are not universal ones.
    kept = engine._config.load_universal_checkpoint
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = kept


def leave_all_reduce_to_gloo() -> None:
    """DeepSpeed: `deepspeed.comm.torch.build_shm_op`, replaced by a function that does nothing.

    On CPUs DeepSpeed compiles a faster all-reduce at the first start, behind a lock file. A process
    that is killed meanwhile leaves the file, and every later start waits for it forever. No key
    turns this off.
    """
    # `import deepspeed.comm.torch` would bind PyTorch itself, which that package has by this name.
    _module("deepspeed.comm.torch").build_shm_op = lambda: None


@lru_cache(maxsize=1)
def spare_zero3_its_records() -> None:
    """DeepSpeed: `deepspeed.utils.nvtx.enable_nvtx`; `print_rank_0` and
    `debug_param2name_id_shape_device` of `zero.partition_parameters`, `print_rank_0` and
    `iter_params` of `zero.partitioned_param_coordinator`. For every weight that a stage 3 gathers
    and gives back it marks ranges for a profiler and forms lines that nobody prints, and for every
    block walks through the modules again. No key turns that off. Without it a micro-batch does the
    same with more of the host's time."""
    zero = "deepspeed.runtime.zero"
    _module("deepspeed.utils.nvtx").enable_nvtx = False
    partition = _module(f"{zero}.partition_parameters")
    coordinator = _module(f"{zero}.partitioned_param_coordinator")
    partition.debug_param2name_id_shape_device = id
    for part in (partition, coordinator):
        part.print_rank_0 = _when_asked(part.print_rank_0)
    coordinator.iter_params = _parameters_once(coordinator.iter_params)


def keep_signatures(module: torch.nn.Module) -> None:
    """DeepSpeed: `pre_bwd_fn` and `post_bwd_fn`, the autograd functions that stage 3 gives every
    module, and `LinearFunctionForZeroStage3`. PyTorch inspects the signature of such a function at
    every call, unless it bears one. Without it a call costs the host some 50 microseconds more."""
    linear = importlib.import_module("deepspeed.runtime.zero.linear")
    found = [linear.LinearFunctionForZeroStage3]
    for part in module.modules():
        found += [vars(part)[name] for name in ("pre_bwd_fn", "post_bwd_fn") if name in vars(part)]
    for function in found:
        function.forward.__signature__ = inspect.signature(function.forward)


def _when_asked(printed):
    """`print_rank_0` that finds out its rank for lines that are printed alone."""

    def print_rank_0(message, debug=False, force=False):
        if debug or force:
            printed(message, debug, force)

    return print_rank_0


def _parameters_once(each_time):
    """`iter_params` that walks through a module's parts once: an engine's modules keep their
    parameters."""
    found: WeakKeyDictionary[torch.nn.Module, tuple] = WeakKeyDictionary()

    def iter_params(module: Any, recurse: bool = False) -> Iterable[torch.nn.Parameter]:
        if not recurse:
            return each_time(module)
        if module not in found:
            found[module] = tuple(module.parameters())
        external = (parameter for _, parameter in module.ds_external_parameters())
        return itertools.chain(found[module], external)

    return iter_params
