"""The public ops: argument checks, dispatch, and their registration as torch custom ops
(`torch.ops.tempflow`).

torch.compile treats a custom op as opaque: it sees the shapes of the results (the fakes) and the
gradient, but not the choice between Triton and the reference. That choice is made when the op runs
(`dispatch`), by the device of its arguments. The ops launch without synchronizing, so a CUDA graph
can capture them, and autocast does not change the dtypes of their arguments.
Formulas, symbols and their derivation: kernels/README.md.
"""

from typing import Optional

import torch
from torch import Tensor

from . import naive
from .checks import (
    LATENT_DTYPES,
    check_choice,
    check_latents,
    check_per_child,
    check_per_row,
    check_tensor,
)
from .dispatch import use_triton
from .naive import GroupStats

__all__ = ["GroupStats", "group_loss", "normal", "sde_step"]


def normal(key: Tensor, numel: int) -> Tensor:
    """Standard normals from counter-based random bits (Philox-4x32-10, then Box-Muller).

    Element j of a row depends on the row's key and on j only, not on the shape of the call nor on
    the device: the random words are equal bit for bit, the normals up to fp32 rounding.

    Args:
        key: int64 of any shape, one 64-bit key per row of noise.
        numel: elements per row, at least 1.

    Returns:
        fp32 [*key.shape, numel].

    Raises:
        TypeError: an argument has the wrong type or dtype. The message names it.
        ValueError: numel is less than 1.
    """
    if not isinstance(key, Tensor):
        raise TypeError(f"key: expected a tensor, got {type(key).__name__}")
    check_tensor("key", key, key.shape, (torch.int64,), key.device)
    if numel < 1:
        raise ValueError(f"numel: expected at least 1, got {numel}")
    return torch.ops.tempflow.normal(key, numel)


def sde_step(
    x: Tensor,
    velocity: Tensor,
    a: Tensor,
    b: Tensor,
    tau: Tensor,
    *,
    key: Tensor,
    children: int = 1,
    out_dtype: Optional[torch.dtype] = None,
) -> tuple[Tensor, Tensor]:
    """One SDE or ODE step of a batch of rows with B children each: x' = a x + b v + tau eps
    (kernels/README.md, "The step").

    Arithmetic is fp32. NaN and inf propagate. Not differentiable.

    Args:
        x: [N, ...] of bf16, fp16 or fp32.
        velocity: [N, ...] of bf16, fp16 or fp32, not necessarily x's dtype.
        a: fp32 [N].
        b: fp32 [N].
        tau: fp32 [N]; 0 makes the step of a row an ODE step, which draws no noise.
        key: int64 [N, B]; child i of row n gets the noise `normal(key[n, i], ...)`.
        children: B, 1 to 64.
        out_dtype: dtype of x_next: bf16, fp16 or fp32; None: x's.

    Returns:
        x_next [N, B, ...] in out_dtype, and log_prob fp32 [N, B], the mean over elements of the
        Gaussian log density of the *rounded* x_next; 0 where tau = 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value. Messages name the argument,
            what came and what is allowed.
    """
    check_latents(x, velocity=velocity)
    check_per_row(x, a=a, b=b, tau=tau)
    check_per_child(x, children, torch.int64, key=key)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    check_choice("out_dtype", out_dtype, LATENT_DTYPES)
    return torch.ops.tempflow.sde_step(x, velocity, a, b, tau, key, out_dtype)


def group_loss(
    velocity: Tensor,
    x: Tensor,
    x_next: Tensor,
    a: Tensor,
    b: Tensor,
    tau: Tensor,
    log_prob_old: Optional[Tensor],
    advantage: Tensor,
    weight: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    velocity_ref: Optional[Tensor] = None,
    kl_coef: float = 0.0,
    kl_form: str = "x",
    ratio: str = "plain",
    velocity_old: Optional[Tensor] = None,
) -> tuple[Tensor, GroupStats]:
    """The clipped policy loss of N groups of B children that share a state and a velocity
    (kernels/README.md, "The loss").

        loss = mean_n [ w_n mean_i max(-A_ni r_ni, -A_ni clip(r_ni, 1 - clip_low, 1 + clip_high)) +
            kl_coef KL_n ]

    The first update after a rollout needs no stored old policy. With log_prob_old=None (and
    velocity_old=None under guard) the old policy is the current one, detached: r is exactly 1, and
    the gradient is that of the loss at r = 1.

    Rows with weight 0 are padding. Whatever they hold, they add exactly 0 to the loss and the
    gradient, their KL included, and do not enter the scalars of the statistics; the mean over N
    still counts them. A child with advantage 0 adds 0 whatever its ratio. NaN anywhere else, also
    in an advantage, makes the loss NaN.

    The loss is differentiable in velocity alone. The gradient has velocity's dtype and is of order
    1 / (N D tau) for N rows of D elements, which underflows in fp16 unless the loss is scaled.
    Results are bitwise reproducible.

    Args:
        velocity: [N, ...] of bf16, fp16 or fp32.
        x: [N, ...], the states; dtypes as velocity's, not necessarily the same one.
        x_next: [N, B, ...], the children, 1 <= B <= 64.
        a: fp32 [N].
        b: fp32 [N].
        tau: fp32 [N].
        log_prob_old: fp32 [N, B], or None; not used under guard.
        advantage: fp32 [N, B].
        weight: fp32 [N].
        clip_low: the ratio is clipped below at 1 - clip_low; at least 0.
        clip_high: the ratio is clipped above at 1 + clip_high; at least 0.
        velocity_ref: [N, ...], needed if kl_coef is not 0; with kl_coef 0 its KL is only measured.
        kl_coef: weight of the KL.
        kl_form: "x", the KL of the means, b^2 mean((v - v_ref)^2) / (2 tau^2), 0 where tau = 0; or
            "v", mean((v - v_ref)^2).
        ratio: "plain": log r = log_prob - log_prob_old. "guard" (GRPO-Guard, arXiv 2510.22319):
            log r = mean(eps Delta) with eps = (x_next - mean_old) / tau and Delta = b (velocity -
            velocity_old).
        velocity_old: [N, ...], the old policy's, for guard.

    Returns:
        The loss, fp32 [], and the detached GroupStats.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value. Messages name the argument.
    """
    # Only to build the expected shape: a wrong x_next is refused below, with a message about it.
    children = x_next.shape[1] if isinstance(x_next, Tensor) and x_next.ndim > 1 else 1
    check_latents(x, velocity=velocity, velocity_ref=velocity_ref, velocity_old=velocity_old)
    check_per_row(x, a=a, b=b, tau=tau, weight=weight)
    check_tensor("x_next", x_next, (x.shape[0], children, *x.shape[1:]), LATENT_DTYPES, x.device)
    check_per_child(x, children, torch.float32, log_prob_old=log_prob_old)
    check_tensor("advantage", advantage, (x.shape[0], children), (torch.float32,), x.device)
    check_loss_options(
        clip_low, clip_high, velocity_ref, kl_coef, kl_form, ratio, log_prob_old, velocity_old
    )
    loss, ratio_value, log_prob, scalars, _, _ = torch.ops.tempflow.group_loss(
        velocity,
        x,
        x_next,
        a,
        b,
        tau,
        log_prob_old,
        advantage,
        weight,
        clip_low,
        clip_high,
        velocity_ref,
        kl_coef,
        kl_form,
        ratio,
        velocity_old,
    )
    kl, clip_fraction, approx_kl = scalars.detach().unbind()
    return loss, GroupStats(ratio_value.detach(), log_prob.detach(), kl, clip_fraction, approx_kl)


def check_loss_options(
    clip_low, clip_high, velocity_ref, kl_coef, kl_form, ratio, log_prob_old, velocity_old
):
    """Raise ValueError for options of `group_loss` that contradict each other."""
    check_choice("kl_form", kl_form, ("x", "v"))
    check_choice("ratio", ratio, ("plain", "guard"))
    # `not (>=)` and not `<`: NaN is refused too.
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low, clip_high: expected at least 0, got {clip_low}, {clip_high}")
    if kl_coef != 0 and velocity_ref is None:
        raise ValueError(f"velocity_ref: expected a tensor, as kl_coef is {kl_coef}, got None")
    if ratio == "guard" and log_prob_old is not None and velocity_old is None:
        raise ValueError(
            "velocity_old: ratio='guard' needs the old policy's velocity beside log_prob_old, got"
            " None"
        )
    if ratio == "plain" and velocity_old is not None:
        raise ValueError(
            "velocity_old: only ratio='guard' uses it, got a tensor with ratio='plain'"
        )


@torch.library.custom_op("tempflow::normal", mutates_args=())
def normal_op(key: Tensor, numel: int) -> Tensor:
    # Imported where they are used, here and below: a CPU installation works without Triton.
    if use_triton(key.device):
        from .triton_noise import normal as draw
    else:
        draw = naive.normal
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(key):
        return draw(key, numel)


@normal_op.register_fake
def normal_fake(key, numel):
    return key.new_empty(*key.shape, numel, dtype=torch.float32)


@torch.library.custom_op("tempflow::sde_step", mutates_args=())
def sde_step_op(
    x: Tensor,
    velocity: Tensor,
    a: Tensor,
    b: Tensor,
    tau: Tensor,
    key: Tensor,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if use_triton(x.device):
        from .triton_sde_step import sde_step as step
    else:
        step = naive.sde_step
    with torch.cuda.device_of(x):
        return step(x, velocity, a, b, tau, key, out_dtype)


@sde_step_op.register_fake
def sde_step_fake(x, velocity, a, b, tau, key, out_dtype):
    return x.new_empty(*key.shape, *x.shape[1:], dtype=out_dtype), key.new_empty(
        key.shape, dtype=torch.float32
    )


@torch.library.custom_op("tempflow::group_loss", mutates_args=())
def group_loss_op(
    velocity: Tensor,
    x: Tensor,
    x_next: Tensor,
    a: Tensor,
    b: Tensor,
    tau: Tensor,
    log_prob_old: Optional[Tensor],
    advantage: Tensor,
    weight: Tensor,
    clip_low: float,
    clip_high: float,
    velocity_ref: Optional[Tensor],
    kl_coef: float,
    kl_form: str,
    ratio: str,
    velocity_old: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if use_triton(x.device):
        from .triton_group_loss import forward
    else:
        forward = naive.group_loss_forward
    with torch.cuda.device_of(x):
        return forward(
            velocity,
            x,
            x_next,
            a,
            b,
            tau,
            log_prob_old,
            advantage,
            weight,
            clip_low,
            clip_high,
            velocity_ref,
            kl_coef,
            kl_form,
            ratio,
            velocity_old,
        )


@group_loss_op.register_fake
def group_loss_fake(
    velocity,
    x,
    x_next,
    a,
    b,
    tau,
    log_prob_old,
    advantage,
    weight,
    clip_low,
    clip_high,
    velocity_ref,
    kl_coef,
    kl_form,
    ratio,
    velocity_old,
):
    # Three different tensors: outputs of a custom op must not be aliases of each other.
    per_child = [advantage.new_empty(advantage.shape) for _ in range(3)]
    return (
        advantage.new_empty(()),
        per_child[0],
        per_child[1],
        advantage.new_empty(3),
        per_child[2],
        weight.new_empty(weight.shape),
    )


@torch.library.custom_op("tempflow::group_loss_backward", mutates_args=())
def group_loss_backward_op(
    grad_loss: Tensor,
    velocity: Tensor,
    x: Tensor,
    x_next: Tensor,
    a: Tensor,
    b: Tensor,
    pull: Tensor,
    kl_pull: Tensor,
    velocity_ref: Optional[Tensor],
    velocity_old: Optional[Tensor],
) -> Tensor:
    if use_triton(x.device):
        from .triton_group_loss import backward
    else:
        backward = naive.group_loss_backward
    with torch.cuda.device_of(x):
        return backward(
            grad_loss, velocity, x, x_next, a, b, pull, kl_pull, velocity_ref, velocity_old
        )


@group_loss_backward_op.register_fake
def group_loss_backward_fake(
    grad_loss, velocity, x, x_next, a, b, pull, kl_pull, velocity_ref, velocity_old
):
    return velocity.new_empty(velocity.shape)


def save_for_gradient(ctx, inputs, output):
    """Keep what the backward reads: the inputs that it needs and the coefficients pull, kl_pull."""
    velocity, x, x_next, a, b = inputs[:5]
    velocity_ref, velocity_old = inputs[11], inputs[15]
    ctx.save_for_backward(
        velocity, x, x_next, a, b, output[4], output[5], velocity_ref, velocity_old
    )


def group_loss_gradient(ctx, grad_loss, *_):
    """The gradient of velocity, the first input; the other 15 inputs are constants."""
    # A second op and not plain code: it is opaque to torch.compile and dispatches by itself.
    grad = torch.ops.tempflow.group_loss_backward(grad_loss, *ctx.saved_tensors)
    return (grad,) + (None,) * 15


group_loss_op.register_autograd(group_loss_gradient, setup_context=save_for_gradient)
