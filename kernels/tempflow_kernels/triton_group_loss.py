"""The group loss in Triton: one forward launch for the loss and its statistics, one backward launch
for its gradient.

Forward: a program owns one block of one row, reads the state, the velocities and each child once,
and stores its part of the sums. The last program of a row turns the sums into log-probabilities,
ratios, the clipped surrogate, the KL term, and the coefficients that are all the backward needs;
the last program of the launch adds the rows.
Backward: d loss / d velocity is a weighted sum of (child - centre) over the children; a child with
coefficient 0 (clipped, advantage 0, padding) is not read. Fused multiply-adds are explicit, as in
`triton_sde_step`.
"""

import torch
import triton
import triton.language as tl

from .triton_common import PARTS, arrives_last, log_density, round_to, sum_parts

# Elements per program. Not measured on a GPU yet: 16 elements per thread are two to four 16-byte
# loads per stream.
BLOCK = 2048
NUM_WARPS = 4
# Columns of the scratch that collects rows: loss, 1 if the row counts, kl, clip fraction,
# approximate kl.
COLUMNS = 5


@triton.jit
def load_block(pointer, o_elem, mask):
    return tl.load(pointer + o_elem, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def exp_near_zero(value):
    """exp, within half an ulp near 0, where ex2.approx alone is off by 2e-7: 0.2 % of a clip range
    of 1e-4."""
    series = tl.fma(
        value, tl.fma(value, tl.fma(value, tl.fma(value, 1.0 / 24, 1.0 / 6), 0.5), 1.0), 1.0
    )
    return tl.where(tl.abs(value) < 0.015625, series, tl.exp(value))


@triton.jit
def surrogate(advantage, log_ratio, lower, upper):
    """Clipped surrogate of each child, its derivative in log_ratio, the ratio, and whether it lies
    out of range.

    Comparisons send NaN to the branch that keeps it. A child with advantage 0 contributes 0 however
    large its ratio: 0 * inf would be NaN."""
    ratio = exp_near_zero(log_ratio)
    outside = (ratio < lower) | (ratio > upper)
    clipped = tl.where(ratio < lower, lower, tl.where(ratio > upper, upper, ratio))
    free = -advantage * tl.where(advantage == 0, log_ratio, ratio)
    bound = -advantage * tl.where(advantage == 0, log_ratio, clipped)
    is_clipped = free < bound
    return tl.where(is_clipped, bound, free), tl.where(is_clipped, 0.0, free), ratio, outside


@triton.jit
def finish_policy(
    i_row,
    square,
    cross,
    s_b,
    s_tau,
    s_weight,
    log_prob_old,
    advantage,
    ratio_out,
    log_prob_out,
    pull,
    lower,
    upper,
    inv_numel,
    inv_rows,
    inv_children,
    children,
    blocks,
    MODE: tl.constexpr,
    TILE_B: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The policy term of one row from its parts: loss, clip fraction, approximate KL; stores the
    [N, B] outputs."""
    first = i_row * children
    o_child = tl.arange(0, TILE_B)
    m_child = o_child < children
    safe_tau = tl.where(s_tau == 0, 1.0, s_tau)
    density = log_density(
        sum_parts(square + first * blocks, children, blocks, TILE_B, PARTS), safe_tau, inv_numel
    )
    log_prob = tl.where(s_tau == 0, 0.0, density)
    scale = safe_tau * safe_tau
    if MODE == "plain_old":
        log_ratio = log_prob - tl.load(log_prob_old + first + o_child, mask=m_child, other=0.0)
    elif MODE == "guard_old":
        delta = sum_parts(cross + first * blocks, children, blocks, TILE_B, PARTS) * inv_numel
        log_ratio = tl.where(s_tau == 0, 0.0, tl.div_rn(delta, safe_tau))
        scale = safe_tau
    else:
        log_ratio = log_prob - log_prob
        if MODE == "guard":
            scale = safe_tau
    value, slope, ratio, outside = surrogate(
        tl.load(advantage + first + o_child, mask=m_child, other=0.0), log_ratio, lower, upper
    )
    # d log_ratio / d velocity is b / (tau^2 D) times (child - centre); b / (tau D) under guard.
    slope = slope * (s_weight * inv_rows * inv_children) * (s_b * inv_numel / scale)
    tl.store(
        pull + first + o_child, tl.where((s_weight == 0) | (s_tau == 0), 0.0, slope), mask=m_child
    )
    tl.store(ratio_out + first + o_child, tl.where(s_weight == 0, 1.0, ratio), mask=m_child)
    tl.store(log_prob_out + first + o_child, log_prob, mask=m_child)
    return (
        s_weight * tl.sum(tl.where(m_child, value, 0.0), axis=0) * inv_children,
        tl.sum(tl.where(m_child & outside, 1.0, 0.0), axis=0) * inv_children,
        tl.sum(tl.where(m_child, 0.5 * log_ratio * log_ratio, 0.0), axis=0) * inv_children,
    )


@triton.jit
def finish_kl(
    i_row, kl_parts, s_b, s_tau, inv_numel, blocks, KL: tl.constexpr, PARTS: tl.constexpr
):
    """KL of one row, and the factor of mean((v - v_ref)^2) in it."""
    factor = s_tau * 0.0 + 1.0
    if KL == "x":
        safe_tau = tl.where(s_tau == 0, 1.0, s_tau)
        factor = tl.where(s_tau == 0, 0.0, 0.5 * (s_b / safe_tau) * (s_b / safe_tau))
    mean_square = (
        tl.sum(sum_parts(kl_parts + i_row * blocks, 1, blocks, 1, PARTS), axis=0) * inv_numel
    )
    return tl.where(factor == 0, 0.0, factor * mean_square), factor


@triton.jit
def finish_launch(
    row_stats, loss, scalars, rows, inv_rows, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):
    """loss [] and scalars [3] from row_stats [COLUMNS, N]: the loss over all rows, the rest over
    those that count."""
    totals = sum_parts(row_stats, COLUMNS, rows, 8, PARTS)
    o_column = tl.arange(0, 8)
    counting = tl.maximum(tl.sum(tl.where(o_column == 1, totals, 0.0), axis=0), 1.0)
    tl.store(loss + o_column, totals * inv_rows, mask=o_column == 0)
    tl.store(scalars + o_column - 2, totals / counting, mask=(o_column >= 2) & (o_column < COLUMNS))


@triton.jit
def group_loss_kernel(
    velocity,
    x,
    x_next,
    velocity_ref,
    velocity_old,
    a,
    b,
    tau,
    log_prob_old,
    advantage,
    weight,
    loss,
    ratio,
    log_prob,
    scalars,
    pull,
    kl_pull,
    square,
    cross,
    kl_parts,
    row_stats,
    counter,
    lower,
    upper,
    kl_coef,
    inv_numel,
    inv_rows,
    inv_children,
    numel,
    rows,
    children,
    blocks,
    MODE: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_B: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """velocity*, x [N, D]; x_next [N, B, D]; a, b, tau, weight, kl_pull [N]; log_prob*, advantage,
    ratio, pull [N, B]; square, cross [N, B, blocks]; kl_parts [N, blocks]; row_stats [5, N];
    scalars [3]; counter int32 [N + 1], zero.
    MODE: plain | plain_old | guard | guard_old ("old" is given); KL: none | x | v. One program per
    block of a row."""
    pid = tl.program_id(0)
    i_row = (pid // blocks).to(tl.int64)
    i_block = pid % blocks
    o_elem = i_block * BLOCK + tl.arange(0, BLOCK)
    mask = o_elem < numel
    s_a = tl.load(a + i_row)
    s_b = tl.load(b + i_row)
    s_tau = tl.load(tau + i_row)
    # Masked elements load 0 everywhere, so every difference below is 0 there.
    b_ax = s_a * load_block(x + i_row * numel, o_elem, mask)
    b_v = load_block(velocity + i_row * numel, o_elem, mask)
    mean = tl.fma(b_v, s_b, b_ax)
    if KL != "none":
        b_d = b_v - load_block(velocity_ref + i_row * numel, o_elem, mask)
        tl.store(kl_parts + i_row * blocks + i_block, tl.sum(b_d * b_d, axis=0))
    if MODE == "guard_old":
        b_old = load_block(velocity_old + i_row * numel, o_elem, mask)
        mean_old = tl.fma(b_old, s_b, b_ax)
        delta = s_b * (b_v - b_old)
    for i in range(children):
        i_child = i_row * children + i
        b_next = load_block(x_next + i_child * numel, o_elem, mask)
        deviation = b_next - mean
        tl.store(square + i_child * blocks + i_block, tl.sum(deviation * deviation, axis=0))
        if MODE == "guard_old":
            tl.store(
                cross + i_child * blocks + i_block,
                tl.sum((b_next - mean_old) * delta, axis=0),  # type: ignore[possibly-undefined]  # bound under the same constexpr condition
            )

    if arrives_last(counter + i_row, blocks):
        s_weight = tl.load(weight + i_row)
        row_loss, clip_fraction, approx_kl = finish_policy(
            i_row,
            square,
            cross,
            s_b,
            s_tau,
            s_weight,
            log_prob_old,
            advantage,
            ratio,
            log_prob,
            pull,
            lower,
            upper,
            inv_numel,
            inv_rows,
            inv_children,
            children,
            blocks,
            MODE,
            TILE_B,
            PARTS,
        )
        live = s_weight != 0
        kl = 0.0
        if KL != "none":
            kl, factor = finish_kl(i_row, kl_parts, s_b, s_tau, inv_numel, blocks, KL, PARTS)
            if kl_coef != 0:
                row_loss += kl_coef * kl
            kl_slope = 2.0 * kl_coef * factor * inv_numel * inv_rows
            tl.store(kl_pull + i_row, tl.where(live & (kl_coef != 0), kl_slope, 0.0))
        tl.store(row_stats + i_row, tl.where(live, row_loss, 0.0))
        tl.store(row_stats + rows + i_row, tl.where(live, 1.0, 0.0))
        tl.store(row_stats + 2 * rows + i_row, tl.where(live, kl, 0.0))
        tl.store(row_stats + 3 * rows + i_row, tl.where(live, clip_fraction, 0.0))
        tl.store(row_stats + 4 * rows + i_row, tl.where(live, approx_kl, 0.0))
        if arrives_last(counter + rows, rows):
            finish_launch(row_stats, loss, scalars, rows, inv_rows, COLUMNS, PARTS)


@triton.jit
def group_loss_backward_kernel(
    grad_loss,
    velocity,
    x,
    x_next,
    velocity_ref,
    velocity_old,
    a,
    b,
    pull,
    kl_pull,
    grad,
    numel,
    children,
    blocks,
    OLD_CENTRE: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_loss []; grad [N, D] = grad_loss (sum_i pull_i (x_next_i - centre) + kl_pull (velocity -
    velocity_ref))."""
    pid = tl.program_id(0)
    i_row = (pid // blocks).to(tl.int64)
    i_block = pid % blocks
    o_elem = i_block * BLOCK + tl.arange(0, BLOCK)
    mask = o_elem < numel
    b_v = load_block(velocity + i_row * numel, o_elem, mask)
    b_centre = b_v
    if OLD_CENTRE:
        b_centre = load_block(velocity_old + i_row * numel, o_elem, mask)
    b_x = load_block(x + i_row * numel, o_elem, mask)
    centre = tl.fma(b_centre, tl.load(b + i_row), tl.load(a + i_row) * b_x)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(children):
        s_pull = tl.load(pull + i_row * children + i)
        if s_pull != 0:
            b_next = load_block(x_next + (i_row * children + i) * numel, o_elem, mask)
            total = tl.fma(b_next - centre, s_pull, total)
    if KL:
        s_pull = tl.load(kl_pull + i_row)
        if s_pull != 0:
            total = tl.fma(
                b_v - load_block(velocity_ref + i_row * numel, o_elem, mask), s_pull, total
            )
    total = total * tl.load(grad_loss)
    tl.store(grad + i_row * numel + o_elem, round_to(total, grad.dtype.element_ty), mask=mask)


def forward(
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
    """Launch; arguments and results as in `naive.group_loss_forward`."""
    rows, children = advantage.shape
    numel = x[0].numel()
    blocks = triton.cdiv(numel, BLOCK)
    old = velocity_old if ratio == "guard" else log_prob_old
    kl = "none" if velocity_ref is None else kl_form

    def empty(*shape):
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    velocity = velocity.contiguous()
    loss, scalars, kl_pull = (
        empty(),
        empty(3),
        torch.zeros(rows, dtype=torch.float32, device=x.device),
    )
    ratio_out, log_prob, pull = empty(rows, children), empty(rows, children), empty(rows, children)
    square = empty(rows, children, blocks)
    cross = torch.empty_like(square) if ratio == "guard" and velocity_old is not None else square
    group_loss_kernel[(rows * blocks,)](
        velocity,
        x.contiguous(),
        x_next.contiguous(),
        contiguous_or(velocity_ref, velocity),
        contiguous_or(velocity_old, velocity),
        a.contiguous(),
        b.contiguous(),
        tau.contiguous(),
        contiguous_or(log_prob_old, advantage),
        advantage.contiguous(),
        weight.contiguous(),
        loss,
        ratio_out,
        log_prob,
        scalars,
        pull,
        kl_pull,
        square,
        cross,
        empty(rows, blocks),
        empty(COLUMNS, rows),
        torch.zeros(rows + 1, dtype=torch.int32, device=x.device),
        1 - clip_low,
        1 + clip_high,
        kl_coef,
        1 / numel,
        1 / rows,
        1 / children,
        numel,
        rows,
        children,
        blocks,
        MODE=ratio if old is None else ratio + "_old",
        KL=kl,
        BLOCK=BLOCK,
        TILE_B=triton.next_power_of_2(children),
        COLUMNS=COLUMNS,
        PARTS=PARTS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return loss, ratio_out, log_prob, scalars, pull, kl_pull


def backward(grad_loss, velocity, x, x_next, a, b, pull, kl_pull, velocity_ref, velocity_old):
    """Launch; arguments and results as in `naive.group_loss_backward`."""
    rows, children = pull.shape
    numel = x[0].numel()
    blocks = triton.cdiv(numel, BLOCK)
    velocity = velocity.contiguous()
    grad = torch.empty_like(velocity)
    group_loss_backward_kernel[(rows * blocks,)](
        grad_loss,
        velocity,
        x.contiguous(),
        x_next.contiguous(),
        contiguous_or(velocity_ref, velocity),
        contiguous_or(velocity_old, velocity),
        a.contiguous(),
        b.contiguous(),
        pull,
        kl_pull,
        grad,
        numel,
        children,
        blocks,
        OLD_CENTRE=velocity_old is not None,
        KL=velocity_ref is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return grad


def contiguous_or(tensor, placeholder):
    """A kernel's pointer argument cannot be None: an absent tensor is replaced by one that is not
    read."""
    return placeholder if tensor is None else tensor.contiguous()
