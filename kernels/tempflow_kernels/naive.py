"""Plain PyTorch versions of every op: the CPU path, the oracle of the tests, and a readable form of
the formulas.

Each function takes the arguments of the public op of the same name (`ops.py`) and can be checked by
eye against the formulas in kernels/README.md. Arithmetic is fp32, or float64 where the latents are
float64 (used by gradient checks; the public ops refuse it). Sums run over a fixed binary tree, so a
row's result depends neither on the other rows of its batch nor on the number of threads. Nothing
here is fused; the Triton kernels are for speed.
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
# Counters per pass of `normal`: the int64 temporaries of one pass fit in the cache of a CPU core.
CHUNK = 8192


class GroupStats(NamedTuple):
    """Statistics of a `group_loss` call, detached.

    Scalars are means over the rows whose weight is not 0, and 0 if there are none.
    """

    ratio: torch.Tensor
    """fp32 [N, B], exp(log pi_theta - log pi_old) before clipping; 1 in rows of weight 0."""
    log_prob: torch.Tensor
    """fp32 [N, B], log-probability of the children under `velocity`; 0 where tau = 0."""
    kl: torch.Tensor
    """fp32 [], mean KL to the reference policy; 0 without velocity_ref."""
    clip_fraction: torch.Tensor
    """fp32 [], share of children whose ratio lies outside [1 - clip_low, 1 + clip_high]."""
    approx_kl: torch.Tensor
    """fp32 [], mean of (log ratio)^2 / 2, an estimate of the KL to the old policy."""


def philox(counter, key):
    """Four 32-bit words, held in int64, of Philox-4x32-10.

    Args:
        counter: four int64 tensors of 32-bit words.
        key: two int64 tensors of 32-bit words, broadcastable against the counter.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # torch has no uint64 product. The int64 product wraps and so keeps the low 64 bits; the
        # shift below copies the sign bit in from the left, and the mask removes it again.
        p0, p1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0 = ((p1 >> 32) & WORD) ^ (c1 ^ k0)
        c2 = ((p0 >> 32) & WORD) ^ (c3 ^ k1)
        c1, c3 = p1 & WORD, p0 & WORD
        k0, k1 = (k0 + PHILOX_W0) & WORD, (k1 + PHILOX_W1) & WORD
    return c0, c1, c2, c3


def box_muller(w0, w1):
    """Two independent normals from two 32-bit words: sqrt(-2 ln u) (cos t, sin t) with
    t = pi (w1 as a signed word) / 2^31."""
    # u = w0 / 2^32 + 2^-33 lies in (0, 1], so the logarithm is finite and |normal| <= 6.77.
    radius = torch.sqrt(-2.0 * torch.log(w0.to(torch.float32) * 2.0**-32 + 2.0**-33))
    signed = w1 - ((w1 >> 31) << 32)
    # cos t is computed as sin(pi / 2 - |t|), and |sin t| as the cosine of the same angle, so that
    # fp32 rounds an angle in [-pi/2, pi/2] instead of one in [-pi, pi]. The subtraction of integers
    # is exact.
    angle = (2**30 - signed.abs()).to(torch.float32) * (math.pi / 2**31)
    sine = torch.cos(angle)
    return radius * torch.sin(angle), radius * torch.where(signed < 0, -sine, sine)


def normal(key, numel):
    """Standard normals, fp32 [*key.shape, numel]. Element j comes from word j % 4 of
    Philox(counter j // 4, key)."""
    flat = key.reshape(-1, 1)
    # The masks also turn the sign of a negative key into plain bits.
    k0, k1 = flat & WORD, (flat >> 32) & WORD
    blocks = -(-numel // 4)
    out = torch.empty(flat.shape[0], blocks, 4, dtype=torch.float32, device=key.device)
    # Passes over columns, not rows: each then has work for all rows, however few there are.
    columns = max(1, CHUNK // max(1, flat.shape[0]))
    for start in range(0, blocks, columns):
        c0 = torch.arange(start, min(start + columns, blocks), device=key.device)[None]
        # The upper counter words stay 0: 2^32 counters make 2^34 elements, more than a row has.
        zero = torch.zeros_like(c0)
        w0, w1, w2, w3 = philox((c0, zero, zero, zero), (k0, k1))
        out[:, start : start + columns] = torch.stack(
            box_muller(w0, w1) + box_muller(w2, w3), dim=-1
        )
    return out.reshape(flat.shape[0], blocks * 4)[:, :numel].contiguous().reshape(*key.shape, numel)


def tree_sum(values):
    """Sum over the last dimension as a binary tree of element-wise additions."""
    # torch.sum chooses its order of additions by shape and thread count, so a row's last bits would
    # depend on the batch around it. Element-wise additions have one order.
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        pairs = values[..., :half] + values[..., half : 2 * half]
        if values.shape[-1] % 2:
            pairs = torch.cat([pairs, values[..., -1:]], dim=-1)
        values = pairs
    return values[..., 0]


def tree_mean(values):
    """`tree_sum` over the number of values."""
    return tree_sum(values) / values.shape[-1]


def wide(tensor, rows):
    """Reshape [N, ...] to [N, D] and cast to the working precision: fp32, or float64 for float64
    latents."""
    return tensor.reshape(rows, -1).to(torch.promote_types(tensor.dtype, torch.float32))


def log_density(deviation, tau):
    """Mean over elements of the Gaussian log density, equation (2) of docs/method.md.

    Args:
        deviation: [N, B, D], children minus their mean.
        tau: [N].

    Returns:
        [N, B]; 0 where tau = 0.
    """
    tau = tau[:, None]
    # 1 in place of 0 before dividing: `where` selects after both sides are computed, and an inf in
    # the side that is not selected would still give NaN gradients.
    safe = torch.where(tau == 0, 1.0, tau)
    log_prob = (
        -tree_mean(deviation * deviation) / (2 * safe * safe) - torch.log(safe) - HALF_LOG_2PI
    )
    return torch.where(tau == 0, 0.0, log_prob)


def sde_step(x, velocity, a, b, tau, key, out_dtype):
    """x' = a x + b v + tau eps, rounded to `out_dtype`, and its log-probability. Shapes as in
    `ops.sde_step`."""
    rows, children = key.shape
    state, v = wide(x, rows), wide(velocity, rows)
    mean = (a[:, None] * state + b[:, None] * v)[:, None]
    x_next = mean.to(out_dtype).expand(-1, children, -1).contiguous()
    log_prob = torch.zeros(rows, children, dtype=mean.dtype, device=x.device)
    # A CPU skips the rows without noise. On a GPU `nonzero` would make the host wait, so every row
    # draws noise there; rows with tau = 0 add 0 * noise, and log_density gives 0.
    noisy = (
        (tau != 0).nonzero()[:, 0]
        if x.device.type == "cpu"
        else torch.arange(rows, device=x.device)
    )
    if len(noisy):
        mean = mean[noisy]
        sample = (mean + tau[noisy, None, None] * normal(key[noisy], mean.shape[-1])).to(out_dtype)
        x_next[noisy] = sample
        # Of the rounded sample, because training reads the stored child: a log-probability of the
        # unrounded one would give ratios that are not 1 before the first update.
        log_prob[noisy] = log_density(sample.to(mean.dtype) - mean, tau[noisy])
    return x_next.reshape(rows, children, *x.shape[1:]), log_prob


def surrogate(advantage, log_ratio, clip_low, clip_high):
    """The clipped surrogate max(-A r, -A clip(r)) of each child, its derivative in log r, and
    r = exp(log r).

    NaN in any argument gives NaN.
    """
    # Where A = 0 the finite log r replaces r: r overflows to inf, and 0 * inf would be NaN.
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    free = -advantage * torch.where(advantage == 0, log_ratio, ratio)
    bound = -advantage * torch.where(advantage == 0, log_ratio, clipped)
    # d(-A r) / d log r is -A r itself. `free < bound` is False for NaN, so a NaN stays.
    return torch.maximum(free, bound), torch.where(free < bound, 0.0, free), ratio


def kl_divergence(v, v_ref, b, tau, kl_form):
    """The KL to the reference policy, fp32 [N], and the factor [N] of mean((v - v_ref)^2) in it.

    In the "x" form the means of the step differ by b (v - v_ref), so the factor is b^2 / (2 tau^2),
    and 0 where tau = 0. In the "v" form the factor is 1.
    """
    factor = torch.ones_like(tau)
    if kl_form == "x":
        factor = torch.where(tau == 0, 0.0, 0.5 * (b / torch.where(tau == 0, 1.0, tau)) ** 2)
    # A row without noise may hold anything in v_ref, and 0 * NaN would be NaN.
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
    """The loss and what its gradient needs. Arguments as in `ops.group_loss`.

    Returns loss [], ratio [N, B], log_prob [N, B], scalars [3] = (kl, clip_fraction, approx_kl),
    and the coefficients pull [N, B] and kl_pull [N] of `group_loss_backward`. The loss can also be
    differentiated in velocity by autograd; tests compare both gradients.
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
        # Without an old velocity the old policy is this one: the difference is 0, its gradient not.
        v_old = v.detach() if velocity_old is None else wide(velocity_old, rows)
        eps = (next_state - (a[:, None] * state + b[:, None] * v_old)[:, None]) / safe_tau[
            :, None, None
        ]
        log_ratio = tree_mean(eps * (b[:, None] * (v - v_old))[:, None])
        log_ratio = torch.where(tau[:, None] == 0, 0.0, log_ratio)
    else:
        # x - x.detach() is exactly 0, so the ratio of a first update is exactly 1.
        log_ratio = log_prob - (log_prob.detach() if log_prob_old is None else log_prob_old)
    value, slope, ratio_value = surrogate(advantage, log_ratio, clip_low, clip_high)
    row_loss = weight * value.mean(dim=1)
    kl, factor = torch.zeros_like(row_loss), torch.zeros_like(row_loss)
    if velocity_ref is not None:
        kl, factor = kl_divergence(v, wide(velocity_ref, rows), b, tau, kl_form)
        # With coefficient 0 the KL is only measured: adding 0 * kl would spread a NaN to the loss.
        if kl_coef != 0:
            row_loss = row_loss + kl_coef * kl
    # The mean is over all N rows, padding included; the caller's weights account for that.
    loss = torch.where(live, row_loss, 0.0).mean()

    # d log_ratio / d v is b / (tau^2 D) times (child - center); b / (tau D) under guard.
    scale = b / (numel * (safe_tau if ratio == "guard" else safe_tau**2))
    pull = slope * (weight * scale / (rows * children))[:, None]
    pull = torch.where((live & (tau != 0))[:, None], pull, 0.0)
    kl_pull = torch.where(live & (kl_coef != 0), 2 * kl_coef * factor / (rows * numel), 0.0)
    scalars = policy_scalars(log_ratio, ratio_value, kl, live, clip_low, clip_high)
    return loss, torch.where(live[:, None], ratio_value, 1.0), log_prob, scalars, pull, kl_pull


def policy_scalars(log_ratio, ratio, kl, live, clip_low, clip_high):
    """kl, clip_fraction and approx_kl, [3]: means over the live rows, 0 if there are none."""
    outside = ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)).to(kl.dtype)
    columns = torch.stack([kl, outside.mean(dim=1), (log_ratio**2 / 2).mean(dim=1)])
    return torch.where(live, columns, 0.0).sum(dim=1) / live.sum().clamp(min=1)


def group_loss_backward(
    grad_loss, velocity, x, x_next, a, b, pull, kl_pull, velocity_ref, velocity_old
):
    """d loss / d velocity = grad_loss (sum_i pull_i (x_next_i - center) + kl_pull (v - v_ref)), in
    velocity's dtype: equation (4) of docs/method.md.

    The center is the mean of the step under the policy whose deviations the ratio uses: the old
    policy's if velocity_old is given (guard), otherwise the current one's.
    """
    rows, children = pull.shape
    v, state, next_state = (
        wide(velocity, rows),
        wide(x, rows),
        wide(x_next, rows).reshape(rows, children, -1),
    )
    center = a[:, None] * state + b[:, None] * (
        v if velocity_old is None else wide(velocity_old, rows)
    )
    grad = torch.zeros_like(v)
    # A loop over the children holds [N, D] at a time; one expression would hold [N, B, D].
    for i in range(children):
        pull_i = pull[:, i, None]
        # Selected, not multiplied: a row of weight 0 may hold NaN, and 0 * NaN is NaN.
        grad += torch.where(pull_i == 0, 0.0, pull_i * (next_state[:, i] - center))
    if velocity_ref is not None:
        grad += torch.where(
            kl_pull[:, None] == 0, 0.0, kl_pull[:, None] * (v - wide(velocity_ref, rows))
        )
    return (grad_loss * grad).to(velocity.dtype).reshape(velocity.shape)
