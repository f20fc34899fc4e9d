"""The SDE step in Triton: one launch reads each parent row once and writes all its children and
their log-probabilities.

A program works on one block of one row. It computes the mean, draws each child's noise in
registers, rounds the child to its storage dtype, and sums the squared deviations of the rounded
values. Rows with tau = 0 skip the noise and the sums. Fused multiply-adds are written out and the
compiler's own are switched off, so that the arithmetic does not depend on the compiler's version.
"""

import torch
import triton
import triton.language as tl

from .triton_common import PARTS, arrives_last, log_density, round_to, sum_parts
from .triton_noise import normal_block

# Elements per program. Not measured on a GPU yet. With 4 warps a thread has 16 elements, which are
# two to four 16-byte loads from each tensor.
BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def sde_step_kernel(
    x,
    velocity,
    a,
    b,
    tau,
    key,
    x_next,
    log_prob,
    parts,
    counter,
    inv_numel,
    numel,
    children,
    blocks,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_B: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One step of N rows with B children each. One program per block of a row.

    Reads x, velocity [N, D]; a, b, tau fp32 [N]; key int64 [N, B]. Writes x_next [N, B, D] and
    log_prob fp32 [N, B]. Scratch: parts fp32 [N, B, blocks]; counter int32 [N], zero.
    """
    i_program = tl.program_id(0)
    # int64: offsets of rows may pass 2^31, offsets inside a row may not (checks.MAX_NUMEL).
    i_row = (i_program // blocks).to(tl.int64)
    i_block = i_program % blocks
    o_elem = i_block * BLOCK + tl.arange(0, BLOCK)
    m_elem = o_elem < numel
    b_x = tl.load(x + i_row * numel + o_elem, mask=m_elem, other=0.0).to(tl.float32)  # [BLOCK]
    b_v = tl.load(velocity + i_row * numel + o_elem, mask=m_elem, other=0.0).to(tl.float32)
    b_mean = tl.fma(b_v, tl.load(b + i_row), b_x * tl.load(a + i_row))
    s_tau = tl.load(tau + i_row)
    first = i_row * children
    o_child = tl.arange(0, TILE_B)
    # A branch per row, the same for all threads of a program: ODE rows cost no noise.
    if s_tau == 0:
        b_next = round_to(b_mean, x_next.dtype.element_ty)
        for i in range(children):
            tl.store(x_next + (first + i) * numel + o_elem, b_next, mask=m_elem)
        # One program of the row is enough; the log-probability needs no sum here.
        if i_block == 0:
            tl.store(
                log_prob + first + o_child, tl.zeros([TILE_B], tl.float32), mask=o_child < children
            )
    else:
        for i in range(children):
            b_noise = normal_block(tl.load(key + first + i), i_block, BLOCK, WIDTH)
            b_next = round_to(tl.fma(b_noise, s_tau, b_mean), x_next.dtype.element_ty)
            tl.store(x_next + (first + i) * numel + o_elem, b_next, mask=m_elem)
            # Of the rounded child, which is what training will read. Masked elements have noise
            # too, and must not enter the sum.
            b_d = tl.where(m_elem, b_next.to(tl.float32) - b_mean, 0.0)
            tl.store(parts + (first + i) * blocks + i_block, tl.sum(b_d * b_d, axis=0))
        if arrives_last(counter + i_row, blocks):
            square_sum = sum_parts(parts + first * blocks, children, blocks, TILE_B, PARTS)
            density = log_density(square_sum, s_tau, inv_numel)
            tl.store(log_prob + first + o_child, density, mask=o_child < children)


def sde_step(x, velocity, a, b, tau, key, out_dtype):
    """Launch; arguments and results as in `naive.sde_step`."""
    rows, children = key.shape
    numel = x[0].numel()
    blocks = triton.cdiv(numel, BLOCK)
    x_next = torch.empty(rows, children, *x.shape[1:], dtype=out_dtype, device=x.device)
    log_prob = torch.empty(rows, children, dtype=torch.float32, device=x.device)
    parts = torch.empty(rows, children, blocks, dtype=torch.float32, device=x.device)
    counter = torch.zeros(rows, dtype=torch.int32, device=x.device)
    # Elements of one 16-byte access to the narrowest tensor: the noise is made in that layout.
    width = 16 // min(x.element_size(), velocity.element_size(), out_dtype.itemsize)
    sde_step_kernel[(rows * blocks,)](
        x.contiguous(),
        velocity.contiguous(),
        a.contiguous(),
        b.contiguous(),
        tau.contiguous(),
        key.contiguous(),
        x_next,
        log_prob,
        parts,
        counter,
        1.0 / numel,
        numel,
        children,
        blocks,
        WIDTH=width,
        BLOCK=BLOCK,
        TILE_B=triton.next_power_of_2(children),
        PARTS=PARTS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return x_next, log_prob
