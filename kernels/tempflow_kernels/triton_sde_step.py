"""The SDE step in Triton: one launch reads a parent row once, and writes all its children and their
log-probabilities.

A program owns one block of one row. It computes the mean, draws each child's noise in registers,
rounds the child to its storage dtype, and sums the squared deviations of the rounded values. Rows
with tau = 0 branch past the noise and the sums. Fused multiply-adds are explicit and the compiler's
own are off, so that the arithmetic does not depend on the compiler's version.
"""

import torch
import triton
import triton.language as tl

from .triton_common import PARTS, arrives_last, log_density, round_to, sum_parts
from .triton_noise import normal_block

# Elements per program. Not measured on a GPU yet: 16 elements per thread are two to four 16-byte
# loads per stream.
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
    """x, velocity [N, D]; a, b, tau fp32 [N]; key int64 [N, B]; x_next [N, B, D]; log_prob fp32 [N,
    B]; parts fp32 [N, B, blocks]; counter int32 [N], zero. One program per block of a row."""
    pid = tl.program_id(0)
    i_row = (pid // blocks).to(tl.int64)
    i_block = pid % blocks
    o_elem = i_block * BLOCK + tl.arange(0, BLOCK)
    mask = o_elem < numel
    b_x = tl.load(x + i_row * numel + o_elem, mask=mask, other=0.0).to(tl.float32)
    b_v = tl.load(velocity + i_row * numel + o_elem, mask=mask, other=0.0).to(tl.float32)
    mean = tl.fma(b_v, tl.load(b + i_row), b_x * tl.load(a + i_row))
    s_tau = tl.load(tau + i_row)
    first = i_row * children
    o_child = tl.arange(0, TILE_B)
    if s_tau == 0:
        value = round_to(mean, x_next.dtype.element_ty)
        for i in range(children):
            tl.store(x_next + (first + i) * numel + o_elem, value, mask=mask)
        if i_block == 0:
            tl.store(
                log_prob + first + o_child, tl.zeros([TILE_B], tl.float32), mask=o_child < children
            )
    else:
        for i in range(children):
            noise = normal_block(tl.load(key + first + i), i_block, BLOCK, WIDTH)
            value = round_to(tl.fma(noise, s_tau, mean), x_next.dtype.element_ty)
            tl.store(x_next + (first + i) * numel + o_elem, value, mask=mask)
            deviation = tl.where(mask, value.to(tl.float32) - mean, 0.0)
            tl.store(parts + (first + i) * blocks + i_block, tl.sum(deviation * deviation, axis=0))
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
