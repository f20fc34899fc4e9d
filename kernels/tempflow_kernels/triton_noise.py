"""Counter-based normals in Triton: Philox-4x32-10, then Box-Muller with fp32 polynomials.

The jit helpers are what `triton_sde_step` inlines; the kernel writes the noise by itself. The words
equal those of `naive.philox` bit for bit. The polynomials replace libdevice's log, sin and cos,
whose slow paths use local memory and whose fast ones (lg2.approx, sin.approx) are off by up to
1e-6: these stay within fp32 rounding of `naive.box_muller`, and have no branch.
"""

import torch
import triton
import triton.language as tl

# Elements per program. Not measured on a GPU yet: 16 per thread make 4 independent Philox calls in
# flight.
BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def philox_words(c0, k0, k1):
    """Four uint32 words of Philox-4x32-10 with counter (c0, 0, 0, 0); c0 uint32 [..], k0 and k1
    uint32 scalars."""
    c1 = tl.zeros_like(c0)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
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
    """-2 ln u for u in [2^-33, 1]: u = m 2^e with m in [2/3, 4/3), and a polynomial in f = m - 1
    (error 3e-8)."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    q = tl.fma(f, -0.28052717, 0.30777079)
    q = tl.fma(f, q, -0.27991614)
    q = tl.fma(f, q, 0.32831922)
    q = tl.fma(f, q, -0.40022337)
    q = tl.fma(f, q, 0.50015640)
    q = tl.fma(f, q, -0.66666394)
    q = tl.fma(f, q, 0.99999875)
    # -2 ln 2 per unit of e; `exponent` is e * 2^23
    return tl.fma(f, tl.fma(f, q, -2.0), exponent.to(tl.float32) * -1.6525917e-07)


@triton.jit
def box_muller(w0, w1):
    """Two normals from two uint32 words, as in `naive.box_muller`."""
    radius = tl.sqrt(minus_two_log(tl.fma(w0.to(tl.float32), 2.3283064e-10, 1.1641532e-10)))
    signed = w1.to(tl.int32, bitcast=True)
    # cos(angle) = sin(pi/2 s), |sin(angle)| = cos(pi/2 s) with s in [-1, 1]: errors 3e-9 and 5e-8
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
    sine = (sine.to(tl.int32, bitcast=True) ^ (signed & -0x80000000)).to(tl.float32, bitcast=True)
    return radius * cosine, radius * sine


@triton.jit
def four_normals(counter, k0, k1):
    """The four normals of each counter, int32 [..] >= 0."""
    w0, w1, w2, w3 = philox_words(counter.to(tl.uint32), k0, k1)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def normal_block(key, i_block, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Normals of elements [i_block * BLOCK, (i_block + 1) * BLOCK) of the int64 scalar key: fp32
    [BLOCK].

    A thread makes WIDTH neighbours, 4 or 8: as many as its 16-byte accesses hold, or they would
    pass through shared memory on their way to the store. The joins put the neighbours in order, the
    last one varying fastest.
    """
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    if WIDTH == 4:
        z0, z1, z2, z3 = four_normals(i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4), k0, k1)
        noise = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    else:
        counter = i_block * (BLOCK // 4) + 2 * tl.arange(0, BLOCK // 8)
        e0, e1, e2, e3 = four_normals(counter, k0, k1)
        o0, o1, o2, o3 = four_normals(counter + 1, k0, k1)
        noise = tl.join(
            tl.join(tl.join(e0, o0), tl.join(e2, o2)), tl.join(tl.join(e1, o1), tl.join(e3, o3))
        )
    return noise.reshape(BLOCK)


@triton.jit
def normal_kernel(key, out, numel, blocks, BLOCK: tl.constexpr):
    """key int64 [K], out fp32 [K, numel]; one program per block of one row."""
    pid = tl.program_id(0)
    i_row = (pid // blocks).to(tl.int64)
    i_block = pid % blocks
    o_elem = i_block * BLOCK + tl.arange(0, BLOCK)
    noise = normal_block(tl.load(key + i_row), i_block, BLOCK, 4)
    tl.store(out + i_row * numel + o_elem, noise, mask=o_elem < numel)


def normal(key, numel):
    """fp32 [*key.shape, numel]."""
    flat = key.contiguous().view(-1)
    out = torch.empty(flat.shape[0], numel, dtype=torch.float32, device=key.device)
    blocks = triton.cdiv(numel, BLOCK)
    if out.numel():
        normal_kernel[(flat.shape[0] * blocks,)](
            flat, out, numel, blocks, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False
        )
    return out.view(*key.shape, numel)
