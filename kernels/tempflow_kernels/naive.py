"""Plain PyTorch versions of every op: the CPU path, the oracle of the tests, and the documentation.

Each function takes the arguments of the public op of the same name (`ops.py`) and can be checked by
eye against the formulas in kernels/README.md. Arithmetic is fp32, or float64 where the latents are
float64 (used by gradient checks; the public ops refuse it). Sums run over a fixed binary tree, so a
row's result does not depend on the batch it sits in, nor on the number of threads. Nothing here is
fused: the Triton kernels are for speed.
"""

import math
from typing import NamedTuple

import torch

# Philox-4x32-10 multipliers and key increments: Salmon et al., "Parallel Random Numbers: As Easy as
# 1, 2, 3" (SC 2011).
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10
WORD = 0xFFFFFFFF
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
# Counters per pass of `normal`: the int64 temporaries of one pass stay in the cache of a CPU core.
CHUNK = 8192


class GroupStats(NamedTuple):
    """What `group_loss` measures, detached. Scalars are means over the rows with weight != 0 (0 if
    there are none).

    ratio: fp32 [N, B], exp(log pi_theta - log pi_old), before clipping; 1 in rows of weight 0.
    log_prob: fp32 [N, B], log-probability of the children under `velocity`; 0 where tau = 0.
    kl: fp32 [], mean KL to the reference policy; 0 without velocity_ref.
    clip_fraction: fp32 [], share of children whose ratio lies outside [1 - clip_low, 1 +
    clip_high].
    approx_kl: fp32 [], mean of (log ratio)^2 / 2, the distance from the old policy.
    """

    ratio: torch.Tensor
    log_prob: torch.Tensor
    kl: torch.Tensor
    clip_fraction: torch.Tensor
    approx_kl: torch.Tensor


def philox(counter, key):
    """Four 32-bit words (held in int64) of Philox-4x32-10.

    counter: four int64 tensors of 32-bit words; key: two of them, broadcastable against the
    counter. int64 products wrap, which keeps the low 64 bits: an arithmetic shift and a mask give
    the high word.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0 = ((p1 >> 32) & WORD) ^ (c1 ^ k0)
        c2 = ((p0 >> 32) & WORD) ^ (c3 ^ k1)
        c1, c3 = p1 & WORD, p0 & WORD
        k0, k1 = (k0 + PHILOX_W0) & WORD, (k1 + PHILOX_W1) & WORD
    return c0, c1, c2, c3


def box_muller(w0, w1):
    """Two independent normals from two 32-bit words: sqrt(-2 ln u) (cos t, sin t), t = pi (w1 as a
    signed word) / 2^31.

    u = w0 / 2^32 + 2^-33 lies in (0, 1], so |normal| <= 6.77 and the logarithm is finite. cos t is
    taken as sin(pi / 2 - |t|) and |sin t| as its cosine, so that fp32 rounds an angle in [-pi/2,
    pi/2] and not in [-pi, pi].
    """
    radius = torch.sqrt(-2.0 * torch.log(w0.to(torch.float32) * 2.0**-32 + 2.0**-33))
    signed = w1 - ((w1 >> 31) << 32)
    angle = (2**30 - signed.abs()).to(torch.float32) * (math.pi / 2**31)
    sine = torch.cos(angle)
    return radius * torch.sin(angle), radius * torch.where(signed < 0, -sine, sine)


def normal(key, numel):
    """Standard normals fp32 [*key.shape, numel]: element j comes from word j % 4 of Philox(counter
    j // 4, key)."""
    flat = key.reshape(-1, 1)
    k0, k1 = flat & WORD, (flat >> 32) & WORD
    blocks = -(-numel // 4)
    out = torch.empty(flat.shape[0], blocks, 4, dtype=torch.float32, device=key.device)
    columns = max(1, CHUNK // max(1, flat.shape[0]))
    for start in range(0, blocks, columns):
        c0 = torch.arange(start, min(start + columns, blocks), device=key.device)[None]
        zero = torch.zeros_like(c0)
        w0, w1, w2, w3 = philox((c0, zero, zero, zero), (k0, k1))
        out[:, start : start + columns] = torch.stack(
            box_muller(w0, w1) + box_muller(w2, w3), dim=-1
        )
    return out.reshape(flat.shape[0], blocks * 4)[:, :numel].contiguous().reshape(*key.shape, numel)


def tree_sum(values):
    """Sum over the last dimension as a binary tree of element-wise additions: the same bits for
    every batch."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        pairs = values[..., :half] + values[..., half : 2 * half]
        if values.shape[-1] % 2:
            pairs = torch.cat([pairs, values[..., -1:]], dim=-1)
        values = pairs
    return values[..., 0]


def tree_mean(values):
    return tree_sum(values) / values.shape[-1]


def wide(tensor, rows):
    """[N, ...] -> [N, D] in the working precision: fp32, or float64 for float64 latents."""
    return tensor.reshape(rows, -1).to(torch.promote_types(tensor.dtype, torch.float32))


def log_density(deviation, tau):
    """Mean Gaussian log density [N, B] of children [N, B, D] that lie `deviation` from their mean;
    0 where tau = 0."""
    tau = tau[:, None]
    safe = torch.where(tau == 0, 1.0, tau)
    log_prob = (
        -tree_mean(deviation * deviation) / (2 * safe * safe) - torch.log(safe) - HALF_LOG_2PI
    )
    return torch.where(tau == 0, 0.0, log_prob)


def sde_step(x, velocity, a, b, tau, key, out_dtype):
    """x' = a x + b v + tau eps, rounded, and its log-probability; shapes as in `ops.sde_step`."""
    rows, children = key.shape
    state, v = wide(x, rows), wide(velocity, rows)
    mean = (a[:, None] * state + b[:, None] * v)[:, None]
    x_next = mean.to(out_dtype).expand(-1, children, -1).contiguous()
    log_prob = torch.zeros(rows, children, dtype=mean.dtype, device=x.device)
    # A CPU skips the rows without noise. A GPU must not wait to know them: it adds 0 * noise, and
    # log_density gives 0.
    noisy = (
        (tau != 0).nonzero()[:, 0]
        if x.device.type == "cpu"
        else torch.arange(rows, device=x.device)
    )
    if len(noisy):
        mean = mean[noisy]
        sample = (mean + tau[noisy, None, None] * normal(key[noisy], mean.shape[-1])).to(out_dtype)
        x_next[noisy] = sample
        log_prob[noisy] = log_density(sample.to(mean.dtype) - mean, tau[noisy])
    return x_next.reshape(rows, children, *x.shape[1:]), log_prob


def surrogate(advantage, log_ratio, clip_low, clip_high):
    """max(-A r, -A clip(r)) of each child, its derivative in log r, and r = exp(log r).

    With A = 0 it is 0 however large r is: 0 * inf would be NaN. NaN in any argument stays.
    """
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    free = -advantage * torch.where(advantage == 0, log_ratio, ratio)
    bound = -advantage * torch.where(advantage == 0, log_ratio, clipped)
    return torch.maximum(free, bound), torch.where(free < bound, 0.0, free), ratio


def kl_divergence(v, v_ref, b, tau, kl_form):
    """KL [N] to the reference policy, and the factor [N] of mean((v - v_ref)^2) in it.

    `x` form: means differ by b (v - v_ref), so the factor is b^2 / (2 tau^2), and 0 where tau = 0.
    `v` form: 1.
    """
    factor = torch.ones_like(tau)
    if kl_form == "x":
        factor = torch.where(tau == 0, 0.0, 0.5 * (b / torch.where(tau == 0, 1.0, tau)) ** 2)
    return torch.where(factor == 0, 0.0, factor * tree_mean((v - v_ref) ** 2)), factor


def group_loss_forward(
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
    """The loss (shapes as in `ops.group_loss`) and what its gradient needs.

    Returns loss [], ratio [N, B], log_prob [N, B], scalars [3] = (kl, clip_fraction, approx_kl),
    and the coefficients pull [N, B], kl_pull [N] of `group_loss_backward`. Differentiable in
    velocity by autograd, too; tests compare both.
    """
    rows, children = advantage.shape
    v, state, next_state = (
        wide(velocity, rows),
        wide(x, rows),
        wide(x_next, rows).reshape(rows, children, -1),
    )
    numel = v.shape[1]
    live, safe_tau = weight != 0, torch.where(tau == 0, 1.0, tau)
    deviation = next_state - (a[:, None] * state + b[:, None] * v)[:, None]
    log_prob = log_density(deviation, tau)
    if ratio == "guard":
        v_old = v.detach() if velocity_old is None else wide(velocity_old, rows)
        eps = (next_state - (a[:, None] * state + b[:, None] * v_old)[:, None]) / safe_tau[
            :, None, None
        ]
        log_ratio = tree_mean(eps * (b[:, None] * (v - v_old))[:, None])
        log_ratio = torch.where(tau[:, None] == 0, 0.0, log_ratio)
    else:
        log_ratio = log_prob - (log_prob.detach() if log_prob_old is None else log_prob_old)
    value, slope, ratio_value = surrogate(advantage, log_ratio, clip_low, clip_high)
    row_loss = weight * value.mean(dim=1)
    kl, factor = torch.zeros_like(row_loss), torch.zeros_like(row_loss)
    if velocity_ref is not None:
        kl, factor = kl_divergence(v, wide(velocity_ref, rows), b, tau, kl_form)
        if kl_coef != 0:
            row_loss = row_loss + kl_coef * kl
    loss = torch.where(live, row_loss, 0.0).mean()

    # d log_ratio / d v is b / (tau^2 D) times (child - centre); b / (tau D) under guard.
    scale = b / (numel * (safe_tau if ratio == "guard" else safe_tau**2))
    pull = slope * (weight * scale / (rows * children))[:, None]
    pull = torch.where((live & (tau != 0))[:, None], pull, 0.0)
    kl_pull = torch.where(live & (kl_coef != 0), 2 * kl_coef * factor / (rows * numel), 0.0)
    scalars = policy_scalars(log_ratio, ratio_value, kl, live, clip_low, clip_high)
    return loss, torch.where(live[:, None], ratio_value, 1.0), log_prob, scalars, pull, kl_pull


def policy_scalars(log_ratio, ratio, kl, live, clip_low, clip_high):
    """kl, clip_fraction, approx_kl [3]: means over the rows that count, 0 if none does."""
    outside = ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)).to(kl.dtype)
    columns = torch.stack([kl, outside.mean(dim=1), (log_ratio**2 / 2).mean(dim=1)])
    return torch.where(live, columns, 0.0).sum(dim=1) / live.sum().clamp(min=1)


def group_loss_backward(
    grad_loss, velocity, x, x_next, a, b, pull, kl_pull, velocity_ref, velocity_old
):
    """d loss / d velocity = grad_loss (sum_i pull_i (x_next_i - centre) + kl_pull (v - v_ref)), in
    velocity's dtype.

    centre is the mean of the policy whose deviations the ratio uses: the old one's if velocity_old
    is given (guard). What has coefficient 0 is left out, so that NaN in a row of weight 0 stays
    there.
    """
    rows, children = pull.shape
    v, state, next_state = (
        wide(velocity, rows),
        wide(x, rows),
        wide(x_next, rows).reshape(rows, children, -1),
    )
    centre = a[:, None] * state + b[:, None] * (
        v if velocity_old is None else wide(velocity_old, rows)
    )
    grad = torch.zeros_like(v)
    for i in range(children):
        pull_i = pull[:, i, None]
        grad += torch.where(pull_i == 0, 0.0, pull_i * (next_state[:, i] - centre))
    if velocity_ref is not None:
        grad += torch.where(
            kl_pull[:, None] == 0, 0.0, kl_pull[:, None] * (v - wide(velocity_ref, rows))
        )
    return (grad_loss * grad).to(velocity.dtype).reshape(velocity.shape)
