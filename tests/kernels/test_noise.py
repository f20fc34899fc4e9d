"""The noise: its random words, its normals, and what they do not depend on."""

import math

import pytest
import torch
from kernel_cases import assert_close, exact_normal

from tempflow_kernels import naive, normal

# Known answers of Philox-4x32-10 distributed with Random123: counter, key -> words.
KNOWN_ANSWERS = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_known_answers(name):
    counter, key, words = KNOWN_ANSWERS[name]
    got = naive.philox([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert [int(w) for w in got] == words


@pytest.mark.parametrize("device", ["triton"], indirect=True)
@pytest.mark.parametrize("key", [0, -1, 0x299F31D0A4093822, -(2**63)])
def test_kernel_words_equal_reference_bit_for_bit(device, key):
    from kernel_words import triton_words

    got = triton_words(key, 512, device).cpu() & naive.WORD
    counter = torch.arange(512)
    zero = torch.zeros_like(counter)
    key = torch.tensor(key)
    want = naive.philox((counter, zero, zero, zero), (key & naive.WORD, (key >> 32) & naive.WORD))
    assert torch.equal(got, torch.stack(want))


@pytest.mark.parametrize("numel", [1, 3, 63, 2048, 5001])
def test_normals_match_float64(device, numel):
    key = torch.tensor([[0, 1, -1], [2**40 + 7, -(2**63), 2**63 - 1]])
    got = normal(key.to(device), numel)
    assert got.dtype == torch.float32 and got.shape == (2, 3, numel)
    assert_close("normal", got, exact_normal(key, numel), rel=1.5e-7)


EXTREMES = [
    (0, 0),
    (0, 2**31),
    (2**32 - 1, 2**32 - 1),
    (2**32 - 1, 2**31),
    (12345, 2**30),
    (0, 3 * 2**30),
]


@pytest.mark.parametrize("device", ["triton"], indirect=True)
@pytest.mark.parametrize("words", EXTREMES)
def test_extreme_words_give_finite_normals(device, words):
    w0, w1 = (torch.tensor([w]) for w in words)
    got = torch.stack(naive.box_muller(w0, w1))
    radius = math.sqrt(-2 * math.log((w0.float() * 2.0**-32 + 2.0**-33).double()))
    angle = 2 * math.pi * words[1] / 2**32
    want = radius * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    assert_close("pair", got[:, 0], want, rel=1.5e-7, scale=max(radius, 1e-6))
    from kernel_words import triton_box_muller

    assert_close(
        "kernel's pair",
        triton_box_muller(w0, w1, device),
        got[:, 0],
        rel=2e-7,
        scale=max(radius, 1e-6),
    )


def test_an_element_depends_on_its_key_and_index_only(device):
    key = torch.arange(12, device=device).reshape(4, 3) * 987654321987
    all_of_it = normal(key, 4099)
    assert torch.equal(normal(key[2:3, 1:2], 1001), all_of_it[2:3, 1:2, :1001])
    assert torch.equal(normal(key.T, 4099), all_of_it.transpose(0, 1))


SAMPLES = 2**20


@pytest.fixture(scope="module")
def samples():
    """Normals [16, 2^16] of keys that differ in few bits, as consecutive children have."""
    return naive.normal(torch.arange(16), SAMPLES // 16).double()


def test_moments(samples):
    """Mean, variance, skewness, kurtosis within five standard errors of a normal's."""
    z = samples.flatten()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        error = ((z**power).mean() - moment).abs() / math.sqrt(variance / SAMPLES)
        assert error < 5, f"moment {power} is {error:.1f} standard errors off"


def test_distribution(samples):
    """Kolmogorov-Smirnov statistic below the 1e-6 critical value, and no tail cut off where samples
    should be."""
    z = samples.flatten().sort().values
    uniform = torch.special.ndtr(z)
    grid = torch.arange(1, SAMPLES + 1, dtype=torch.float64) / SAMPLES
    assert (uniform - grid).abs().max() * math.sqrt(SAMPLES) < 2.7
    assert 4.2 < z[-1] < 6.5 and -6.5 < z[0] < -4.2


@pytest.mark.parametrize("kind", ["neighbours", "same call", "children", "next key squared"])
def test_no_correlation(samples, kind):
    """Between neighbouring elements, elements of one Philox call, children with consecutive keys,
    and their squares."""
    pairs = {
        "neighbours": (samples[:, :-1], samples[:, 1:]),
        "same call": (samples[:, 0::4], samples[:, 2::4]),
        "children": (samples[:-1], samples[1:]),
        "next key squared": (samples[:-1] ** 2 - 1, samples[1:] ** 2 - 1),
    }
    u, v = (t.flatten() for t in pairs[kind])
    correlation = (u * v).mean() / (u.std() * v.std())
    assert correlation.abs() * math.sqrt(len(u)) < 5


def test_keys_that_differ_in_the_high_word_differ(device):
    z = normal(torch.tensor([1, 1 + 2**32, 1 - 2**63], device=device), 64).cpu()
    assert (z[0] != z[1]).all() and (z[0] != z[2]).all()
