"""Argument checks of the public ops. They read shapes, dtypes and devices only: no synchronisation
with a GPU."""

import torch

LATENT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_CHILDREN = 64
# Offsets inside a row are 32-bit in the kernels.
MAX_NUMEL = 2**31 - 2**16


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def check_tensor(name, tensor, shape, dtypes, device):
    """TypeError or ValueError unless `tensor` has this shape and device, and one of these
    dtypes."""
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
    """x is [N, ...] of a latent dtype and not empty; the others, where given, have its shape."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
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
    for name, tensor in scalars.items():
        check_tensor(name, tensor, x.shape[:1], (torch.float32,), x.device)


def check_per_child(x, children, dtype, **tensors):
    if not 1 <= children <= MAX_CHILDREN:
        raise ValueError(f"children: expected 1 to {MAX_CHILDREN} per row, got {children}")
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(name, tensor, (x.shape[0], children), (dtype,), x.device)


def check_choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")
