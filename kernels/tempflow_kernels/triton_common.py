"""What the step and the loss share: rounding to a storage dtype, and sums over a latent that many
programs own.

A sum takes one launch and no floating-point atomics. Every program stores its part; an integer
counter tells the program that arrives last, and that one adds the parts in the order of their
index. Which program is last varies, the order of the additions does not: results are bitwise equal
from run to run.
"""

import os

import triton
import triton.language as tl

# Parts that the last program adds at a time; with 64 children a tile holds 32 values per thread.
PARTS = 64
HALF_LOG_2PI = tl.constexpr(0.9189385332046727)
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """fp32 values rounded to the nearest value of `dtype`, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        # The interpreter truncates instead of rounding: round first, and nothing is left to cut
        # off.
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def arrives_last(counter, programs):
    """Publish what this program stored; true in the last of `programs` programs to call it on this
    int32 counter."""
    # The barrier collects the stores of all threads, the atomic releases them and acquires those of
    # the other programs.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1


@triton.jit
def sum_parts(parts, rows, blocks, TILE_ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Row sums of `parts`, fp32 [rows, blocks] written by other programs: fp32 [TILE_ROWS], 0 past
    `rows`."""
    o_row = tl.arange(0, TILE_ROWS)[:, None]
    o_part = tl.arange(0, PARTS)[None, :]
    total = tl.zeros([TILE_ROWS, PARTS], tl.float32)
    for start in range(0, blocks, PARTS):
        mask = (o_row < rows) & (start + o_part < blocks)
        # .cg reads the L2, where the other programs' stores are; the L1 is not coherent.
        total += tl.load(
            parts + o_row * blocks + start + o_part, mask=mask, other=0.0, cache_modifier=".cg"
        )
    return tl.sum(total, axis=1)


@triton.jit
def log_density(square_sum, tau, inv_numel):
    """Mean Gaussian log density of children whose squared deviations sum to `square_sum`; tau !=
    0."""
    return -tl.div_rn(square_sum * inv_numel, 2.0 * tau * tau) - tl.log(tau) - HALF_LOG_2PI
