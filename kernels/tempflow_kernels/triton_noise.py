"""Counter-based normals in Triton: Philox-4x32-10, then Box-Muller with fp32 polynomials.

`triton_sde_step` inlines the jit helpers; `normal_kernel` writes the noise alone. The random words
equal those of `naive.philox` bit for bit. Polynomials replace libdevice's log, sin and cos, whose
slow paths use local memory. The hardware approximations (lg2.approx, sin.approx) are off by up to
1e-6. The polynomials stay within fp32 rounding of `naive.box_muller` and have no branch.
"""

import torch
import triton
import triton.language as tl

# Elements per program. Not measured on a GPU yet. With 4 warps a thread makes 16 elements, which is
# 4 independent Philox calls in flight.
BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def philox_words(c0, k0, k1):
    """Four uint32 words of Philox-4x32-10 with counter (c0, 0, 0, 0). c0: uint32 [..]; k0, k1:
    uint32 scalars."""
    c1 = tl.zeros_like(c0)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        # One 32 x 32 -> 64 bit multiplication each, of which both halves are used.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def minus_two_log(u):
    """-2 ln u, fp32, for u in [2^-33, 1]: u = m 2^e with m in [2/3, 4/3), and a polynomial in
    f = m - 1 whose error is 3e-8."""
    bits = u.to(tl.int32, bitcast=True)
    # 0x3F2AAAAB is 2/3 in fp32. Subtracting it before the mantissa is masked off puts m in
    # [2/3, 4/3) and not in [1, 2), so that f is small near u = 1, where the logarithm goes to 0.
    exponent = (bits - 0x3F2AAAAB) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    # q(f) = (-2 ln(1 + f) + 2 f) / f^2, so that the leading term -2 f below is exact.
    q = tl.fma(f, -0.28052717, 0.30777079)
    q = tl.fma(f, q, -0.27991614)
    q = tl.fma(f, q, 0.32831922)
    q = tl.fma(f, q, -0.40022337)
    q = tl.fma(f, q, 0.50015640)
    q = tl.fma(f, q, -0.66666394)
    q = tl.fma(f, q, 0.99999875)
    # -2 ln 2 per unit of e, over 2^23 because `exponent` is e * 2^23.
    return tl.fma(f, tl.fma(f, q, -2.0), exponent.to(tl.float32) * -1.6525917e-07)


@triton.jit
def box_muller(w0, w1):
    """Two normals, fp32 [..], from two uint32 words [..], as in `naive.box_muller`."""
    # u = w0 / 2^32 + 2^-33: never 0, whose logarithm is infinite.
    radius = tl.sqrt(minus_two_log(tl.fma(w0.to(tl.float32), 2.3283064e-10, 1.1641532e-10)))
    signed = w1.to(tl.int32, bitcast=True)
    # cos(angle) = sin(pi/2 s) and |sin(angle)| = cos(pi/2 s), with s in [-1, 1] and exact before
    # it is rounded to fp32. The errors of the two polynomials are 3e-9 and 5e-8.
    s = (0x40000000 - tl.abs(signed)).to(tl.float32) * 9.3132257e-10
    z = s * s
    p = tl.fma(z, 0.00015082056, -0.0046722279)
    p = tl.fma(z, p, 0.079688482)
    p = tl.fma(z, p, -0.64596337)
    cosine = tl.fma(z, p, 1.5707963) * s
    q = tl.fma(z, 0.00085969007, -0.020813966)
    q = tl.fma(z, q, 0.25365320)
    q = tl.fma(z, q, -1.2336988)
    sine = tl.fma(z, q, 1.0)
    # The sign bit of w1 is moved into the sine, which is not negative before.
    sine = (sine.to(tl.int32, bitcast=True) ^ (signed & -0x80000000)).to(tl.float32, bitcast=True)
    return radius * cosine, radius * sine


@triton.jit
def four_normals(counter, k0, k1):
    """The four normals, fp32 [..] each, of each counter, int32 [..] >= 0."""
    w0, w1, w2, w3 = philox_words(counter.to(tl.uint32), k0, k1)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def normal_block(key, i_block, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Normals of elements [i_block * BLOCK, (i_block + 1) * BLOCK) of the int64 scalar key, fp32
    [BLOCK].

    A thread makes WIDTH neighboring elements, 4 or 8: as many as one 16-byte access holds. With
    another number the values would pass through shared memory on their way to the store.
    """
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    if WIDTH == 4:
        z0, z1, z2, z3 = four_normals(i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4), k0, k1)
        # A join adds a last dimension of 2, which varies fastest: pairs (z0, z2) and (z1, z3) come
        # out as z0, z1, z2, z3.
        noise = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    else:
        # Two counters per thread, an even one and the odd one after it: 8 neighbors.
        counter = i_block * (BLOCK // 4) + 2 * tl.arange(0, BLOCK // 8)
        e0, e1, e2, e3 = four_normals(counter, k0, k1)
        o0, o1, o2, o3 = four_normals(counter + 1, k0, k1)
        noise = tl.join(
            tl.join(tl.join(e0, o0), tl.join(e2, o2)), tl.join(tl.join(e1, o1), tl.join(e3, o3))
        )
    return noise.reshape(BLOCK)


@triton.jit
def normal_kernel(key, out, numel, blocks, BLOCK: tl.constexpr):
    """key int64 [K]; out fp32 [K, numel]. One program per block of a row."""
    i_program = tl.program_id(0)
    # int64: the offset of a row may pass 2^31, the offset inside one may not (checks.MAX_NUMEL).
    i_row = (i_program // blocks).to(tl.int64)
    i_block = i_program % blocks
    o_elem = i_block * BLOCK + tl.arange(0, BLOCK)
    # fp32 stores: a 16-byte access holds 4 values.
    b_noise = normal_block(tl.load(key + i_row), i_block, BLOCK, 4)
    tl.store(out + i_row * numel + o_elem, b_noise, mask=o_elem < numel)


def normal(key, numel):
    """Launch: fp32 [*key.shape, numel], as `naive.normal`."""
    flat = key.contiguous().view(-1)
    out = torch.empty(flat.shape[0], numel, dtype=torch.float32, device=key.device)
    blocks = triton.cdiv(numel, BLOCK)
    if out.numel():
        normal_kernel[(flat.shape[0] * blocks,)](
            flat, out, numel, blocks, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False
        )
    return out.view(*key.shape, numel)
