"""A simulated GPU: tensors on "cuda:0" without hardware or data, and a record of what real code
does to them.

    gpu = FakeGpu()
    with gpu:                                    # may be entered again
        x = torch.zeros(4, 8, device=gpu.device)
        with gpu.watch() as seen:
            value = x.sum().item()
    seen.waits    # Counter of (what made the host wait, file:line): a CUDA graph cannot capture
        those
    seen.kernels  # operations that launch something
    seen.bytes    # the most that was allocated above what was there at the start

CUDA tensors are fake (shape, dtype, device), CPU tensors stay real. An operation that mixes devices
raises, as on a GPU. Values that the host reads are made up: 1, in arrays True, and a single bool is
False.

It cannot see: values, and so what depends on them, a NaN included; what a kernel itself refuses,
such as an alignment; time, streams and races; host waits inside libraries below PyTorch's
dispatcher; and of memory the CUDA context, the allocator's fragmentation, workspaces of cuBLAS and
cuDNN, and the scratch of our own Triton kernels (they are replaced by their shapes). Attention and
SiLU are the fused kernels that a GPU would choose. Collectives and other GPUs do not exist.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes that the allocator rounds up to
READ = "value read by the host"
EVENT = "wait for an event"
# What a CPU build of torch lacks: a device guard, which indexing and autograd ask for, and
# autograd's word that CUDA was built.
STAND_IN = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>
namespace {
using namespace c10;
struct Guard final : public impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
  Stream getDefaultStream(Device) const override { return getStream(getDevice()); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
} guard;
impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);
struct Hooks final : public at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
} hooks;
}
// torch's hooks are a base class without data: exchanging the tables exchanges the objects
extern "C" void swap_hooks() {
  void* theirs = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  void* ours = &hooks;
  void* table;
  std::memcpy(&table, theirs, sizeof table);
  std::memcpy(theirs, ours, sizeof table);
  std::memcpy(ours, &table, sizeof table);
}
"""
# They launch nothing: views, and memory that is not filled.
FREE = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "chunk",
    "detach",
    "diagonal",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "permute",
    "reshape",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
    "view",
    "view_as_complex",
    "view_as_real",
}
SIZED_BY_DATA = {"_unique2", "masked_select", "nonzero", "unique_dim"}
INDEXING = {"_index_put_impl_", "index", "index_put", "index_put_"}


@cache
def stand_in() -> ctypes.CDLL | None:
    """STAND_IN, compiled and loaded; its guard is registered for good. None where torch has the
    real thing."""
    if torch.version.cuda or torch.version.hip:
        return None
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("a simulated GPU on a CPU build of torch needs a C++ compiler")
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "stand_in.cpp", Path(folder) / "stand_in.so"
        source.write_text(STAND_IN)
        includes = [f"-I{root}/include", f"-I{sysconfig.get_paths()['include']}"]
        subprocess.run(
            [
                compiler,
                "-O0",
                "-shared",
                "-fPIC",
                "-std=c++20",
                *includes,
                str(source),
                "-o",
                str(library),
                f"-L{root}/lib",
                "-lc10",
                "-ltorch_cpu",
            ],
            check=True,
        )
        return ctypes.CDLL(str(library))


@cache
def _mode() -> FakeTensorMode:
    """One for all simulated GPUs, because tensors of two cannot meet, and code under test keeps
    some in caches."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def built_with_cuda():
    """Autograd takes CUDA for a device that it knows."""
    library = stand_in()
    if library is None:
        yield
        return
    library.swap_hooks()
    try:
        yield
    finally:
        library.swap_hooks()


def on_gpu(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def place() -> str:
    """file:line of the innermost frame outside torch and this file."""
    frame = sys._getframe(1)
    while frame:
        name = frame.f_code.co_filename
        if not (
            "/torch/" in name or name == __file__ or "contextlib" in name or name.startswith("<")
        ):
            return f"{'/'.join(name.split('/')[-3:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


@dataclass
class Seen:
    """What happened within a `FakeGpu.watch`. waits: by (kind, file:line). bytes: the most
    allocated above `start`. ahead: at every wait for an event, the kernels launched since it, which
    keep the GPU busy meanwhile."""

    start: int
    peak: int
    waits: Counter = field(default_factory=Counter)
    kernels: int = 0
    ahead: list[int] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return self.peak - self.start


class FakeGpu:
    """The device and its record. live: bytes allocated now."""

    device = torch.device("cuda:0")

    def __init__(self):
        stand_in()
        self.live = self.launched = 0
        self.records = self.passed = 0  # events recorded; the last one that is known to be complete
        self._storages: set[int] = set()
        self._pinned: set[int] = set()
        self._watches: list[Seen] = []
        self._entered = ExitStack()

    @contextmanager
    def watch(self):
        """Yields a `Seen` of what happens inside. Watches nest."""
        seen = Seen(self.live, self.live)
        self._watches.append(seen)
        try:
            yield seen
        finally:
            self._watches.remove(seen)

    def note(self, kind: str, waits: bool = True) -> None:
        if waits and self._watches:
            event = kind, place()
            for seen in self._watches:
                seen.waits[event] += 1

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take a CPU tensor's memory for pinned."""
        storage = tensor.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata).atexit = False
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def launch(self) -> None:
        self.launched += 1
        for seen in self._watches:
            seen.kernels += 1

    def allocate(self, tensor: torch.Tensor, given: set[int]) -> None:
        """Count a result's memory, unless it is that of an argument."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages or storage._cdata in given:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._storages.add(storage._cdata)
        self.live += size
        for seen in self._watches:
            seen.peak = max(seen.peak, self.live)
        weakref.finalize(storage, self._free, size, storage._cdata).atexit = False

    def _free(self, size: int, address: int) -> None:
        self.live -= size
        self._storages.discard(address)

    def __enter__(self) -> FakeGpu:
        stack = ExitStack()
        try:
            for context in (
                built_with_cuda(),
                _mode(),
                _Recorder(self),
                # a backward would want a thread for the GPU
                torch.autograd.set_multithreading_enabled(False),
                mock.patch.object(torch.cuda, "current_stream", lambda device=None: None),
                mock.patch.object(torch.cuda, "Event", lambda **options: _Event(self)),
                mock.patch.object(torch.Tensor, "numpy", _numpy(torch.Tensor.numpy)),
                mock.patch.object(FakeTensor, "tolist", self._tolist(), create=True),
                mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
                mock.patch.object(
                    torch.nn.functional, "silu", lambda x, inplace=False: _Silu.apply(x)
                ),
                mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
                mock.patch.object(
                    torch.cuda, "get_device_name", lambda device=None: "simulated GPU"
                ),
            ):
                stack.enter_context(context)
        except BaseException:
            stack.close()
            raise
        self._entered = stack
        return self

    def __exit__(self, *error):
        return self._entered.__exit__(*error)

    def _tolist(self):
        def tolist(tensor):
            self.note(READ, on_gpu(tensor))
            return np.ones(
                tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch.")
            ).tolist()

        return tolist


class _Recorder(TorchDispatchMode):
    """Sees every operation before FakeTensorMode does; those on CPU tensors alone run for real."""

    def __init__(self, gpu: FakeGpu):
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, gpu = kwargs or {}, self._gpu
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        asked = kwargs.get("device")
        if not any(isinstance(t, FakeTensor) for t in given) and (
            asked is None or torch.device(asked).type != "cuda"
        ):
            pinned = kwargs.pop("pin_memory", None)
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            return gpu.pin(out) if pinned else out
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        if name == "_local_scalar_dense":
            gpu.note(READ, on_gpu(given[0]))
            return (
                False
                if given[0].dtype == torch.bool
                else 1.0
                if given[0].is_floating_point()
                else 1
            )
        if name == "equal":
            gpu.note(READ)
            return True
        self._waits(name, args, kwargs, given)
        if name == "copy_" and not isinstance(args[0], FakeTensor):  # what comes is made up
            with unset_fake_temporarily():
                return args[0].fill_(1)
        known = {t.untyped_storage()._cdata for t in given if isinstance(t, FakeTensor)}
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, FakeTensor) and on_gpu(t)]
        if made and name not in FREE:
            gpu.launch()
        for tensor in made:
            gpu.allocate(tensor, known)
        return out

    def _waits(self, name: str, args, kwargs, given) -> None:
        gpu = self._gpu
        if name in SIZED_BY_DATA or name == "repeat_interleave" and len(given) == 1:
            gpu.note(f"size of {name} read", any(map(on_gpu, given)))
        if name in ("_to_copy", "copy_"):
            source = given[-1 if name == "copy_" else 0].device.type
            target = torch.device(kwargs.get("device") or given[0].device).type
            crosses = source != target and "meta" not in (source, target)
            asked = kwargs.get("non_blocking") or name == "copy_" and any(args[2:])
            # of memory that is not pinned a copy waits, whatever is asked for
            free = asked and all(gpu.is_pinned(t) for t in given if t.device.type == "cpu")
            gpu.note(f"copy {source} -> {target}", crosses and not free)
        if name in INDEXING and on_gpu(args[0]):
            for index in (t for t in args[1] if t is not None):
                gpu.note("index copied from the CPU", index.device.type == "cpu")
                gpu.note("size of a boolean index read", index.dtype == torch.bool)


class _Event:
    """torch.cuda.Event, as far as the engine uses it; complete when it, or a later one, was waited
    for."""

    def __init__(self, gpu: FakeGpu):
        self._gpu, self._kernels, self._number = gpu, 0, 0

    def record(self, stream) -> None:
        self._gpu.records += 1
        self._kernels, self._number = self._gpu.launched, self._gpu.records

    def query(self) -> bool:
        return 0 < self._number <= self._gpu.passed

    def synchronize(self) -> None:
        self._gpu.note(EVENT)
        for seen in self._gpu._watches:
            seen.ahead.append(self._gpu.launched - self._kernels)
        self._gpu.passed = max(self._gpu.passed, self._number)

    def elapsed_time(self, later: _Event) -> float:
        assert self.query() and later.query(), "it is not complete"
        return float(later._number - self._number)


def _numpy(real):
    def numpy(tensor, *args, **more):
        if isinstance(tensor, FakeTensor):
            return np.ones(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
        return real(tensor, *args, **more)

    return numpy


class _Silu(torch.autograd.Function):
    """A kernel forward and one backward, as on a GPU. Fake tensors take the backward of devices
    that have none: five kernels, and what they hold between them."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.ops.aten.silu(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """The kernel that a GPU chooses: flash attention, or the memory-efficient one for a mask or
    heads wider than 256."""
    aten = torch.ops.aten
    if attn_mask is None and query.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if attn_mask is not None:  # added to the scores; broadcast, not copied
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).expand(
            *query.shape[:3], key.shape[2]
        )
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
    )[0]
