"""Kernels around the jit helpers of `triton_noise`, to look at their words and pairs.

Imported after conftest has chosen between GPU and interpreter."""

import torch
import triton
import triton.language as tl

from tempflow_kernels.triton_noise import box_muller, philox_words


@triton.jit
def words_kernel(key, out, COUNT: tl.constexpr):
    value = tl.load(key)
    counter = tl.arange(0, COUNT)
    w0, w1, w2, w3 = philox_words(
        counter.to(tl.uint32), value.to(tl.uint32), (value >> 32).to(tl.uint32)
    )
    tl.store(out + counter, w0.to(tl.int64))
    tl.store(out + COUNT + counter, w1.to(tl.int64))
    tl.store(out + 2 * COUNT + counter, w2.to(tl.int64))
    tl.store(out + 3 * COUNT + counter, w3.to(tl.int64))


@triton.jit
def box_muller_kernel(words, out):
    o = tl.arange(0, 1)
    first, second = box_muller(
        tl.load(words + o).to(tl.uint32), tl.load(words + 1 + o).to(tl.uint32)
    )
    tl.store(out + o, first)
    tl.store(out + 1 + o, second)


def triton_words(key, count, device):
    """int64 [4, count]: the words of counters 0 .. count - 1."""
    out = torch.zeros(4, count, dtype=torch.int64, device=device)
    words_kernel[(1,)](torch.tensor([key], device=device), out, COUNT=count)
    return out


def triton_box_muller(w0, w1, device):
    out = torch.zeros(2, device=device)
    box_muller_kernel[(1,)](torch.cat([w0, w1]).to(device), out)
    return out
