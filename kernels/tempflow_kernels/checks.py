"""Argument checks of the public ops.

The checks read shapes, dtypes and devices, never values: reading a value would make the host wait
for the GPU, and would break CUDA graph capture. Values are therefore not checked.
"""

import torch

LATENT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The last program of a row holds [children, PARTS] partial sums in registers: see triton_common.
MAX_CHILDREN = 64
# Offsets inside a row are int32 in the kernels. The margin leaves room for the last block, whose
# masked offsets reach past the end of the row.
MAX_NUMEL = 2**31 - 2**16


def dtype_name(dtype):
    """ "bfloat16" for torch.bfloat16, as a user writes it."""
    return str(dtype).removeprefix("torch.")


def check_tensor(name, tensor, shape, dtypes, device):
    """Raise TypeError or ValueError unless `tensor` has this shape, is on this device, and has one
    of these dtypes."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(
            f"{name}: expected {' or '.join(map(dtype_name, dtypes))}, got"
            f" {dtype_name(tensor.dtype)}"
        )
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} as x, got one on {tensor.device}")


def check_latents(x, **others):
    """Raise unless x is a non-empty [N, ...] of a latent dtype and the others that are given have
    its shape; dtypes may differ from tensor to tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    # Refused, because an empty batch has no mean and no number of elements per row.
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(
            f"x: expected shape [N, ...] with at least one element, got {list(x.shape)}"
        )
    if x.numel() // x.shape[0] > MAX_NUMEL:
        raise ValueError(
            f"x: expected at most {MAX_NUMEL} elements per row, got {x.numel() // x.shape[0]}"
        )
    check_tensor("x", x, x.shape, LATENT_DTYPES, x.device)
    for name, tensor in others.items():
        if tensor is not None:
            check_tensor(name, tensor, x.shape, LATENT_DTYPES, x.device)


def check_per_row(x, **scalars):
    """Raise unless each tensor is fp32 [N], N the rows of x."""
    # fp32 even for bf16 latents: tau and b enter as b / tau^2, which bf16 would round to 3 digits.
    for name, tensor in scalars.items():
        check_tensor(name, tensor, x.shape[:1], (torch.float32,), x.device)


def check_per_child(x, children, dtype, **tensors):
    """Raise unless each given tensor is [N, children] of this dtype, with 1 to 64 children."""
    if not 1 <= children <= MAX_CHILDREN:
        raise ValueError(f"children: expected 1 to {MAX_CHILDREN} per row, got {children}")
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(name, tensor, (x.shape[0], children), (dtype,), x.device)


def check_choice(name, value, allowed):
    """Raise ValueError unless `value` is one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")
