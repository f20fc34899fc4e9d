"""Helpers of the step and the loss: rounding to a storage dtype, and sums over a latent that
several programs work on.

A sum takes one launch and no floating-point atomics. Every program stores its part. An integer
counter tells a program that it is the last to arrive, and that program adds the parts in the order
of their index. Which program is last varies from run to run, but the order of the additions does
not, so results are bitwise equal.
"""

import os

import triton
import triton.language as tl

# Parts that the last program adds at a time; with 64 children a tile holds 32 values per thread.
PARTS = 64
HALF_LOG_2PI = tl.constexpr(0.9189385332046727)
# Read when this module is imported, as @triton.jit does.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """fp32 values rounded to the nearest value of `dtype`, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        # The interpreter truncates when it casts to bf16. Rounding the bits first leaves it nothing
        # to cut off: add half of the last kept bit, less one where the kept part is even.
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        # NaN keeps its own bits: adding to them could carry into the exponent and the sign.
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def arrives_last(counter, programs):
    """Publish what this program stored. True in the last of `programs` programs that call it on
    this int32 counter, which starts at 0."""
    # The barrier waits for the stores of all threads of this program. The atomic then releases them
    # to the other programs and acquires theirs.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1


@triton.jit
def sum_parts(parts, rows, blocks, TILE_ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Row sums, fp32 [TILE_ROWS], of `parts`, fp32 [rows, blocks], which other programs have
    written; 0 past `rows`."""
    o_row = tl.arange(0, TILE_ROWS)[:, None]
    o_part = tl.arange(0, PARTS)[None, :]
    total = tl.zeros([TILE_ROWS, PARTS], tl.float32)
    for start in range(0, blocks, PARTS):
        mask = (o_row < rows) & (start + o_part < blocks)
        # .cg reads from the L2 cache, where the stores of the other programs are. The L1 cache is
        # not coherent between multiprocessors.
        total += tl.load(
            parts + o_row * blocks + start + o_part, mask=mask, other=0.0, cache_modifier=".cg"
        )
    return tl.sum(total, axis=1)


@triton.jit
def log_density(square_sum, tau, inv_numel):
    """Mean over elements of the Gaussian log density of children whose squared deviations sum to
    `square_sum`, fp32 [TILE_B]; tau fp32, not 0."""
    # div_rn rounds correctly; Triton's `/` may be compiled to an approximate division.
    return -tl.div_rn(square_sum * inv_numel, 2.0 * tau * tau) - tl.log(tau) - HALF_LOG_2PI
