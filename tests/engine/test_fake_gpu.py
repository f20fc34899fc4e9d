"""The simulated GPU itself: it must see what it is there to see, or the checks that stand on it are
worth nothing."""

import numpy as np
import pytest
import torch
from fake_gpu import READ, FakeGpu
from torch.utils.checkpoint import checkpoint


@pytest.fixture(scope="module")
def gpu():
    return FakeGpu()


WAITS = {
    "item": (lambda x: x.sum().item(), READ),
    "bool": (lambda x: bool((x > 0).all()), READ),
    "tolist": (lambda x: x.tolist(), READ),
    "equal": (lambda x: torch.equal(x, x), READ),
    "cpu": (lambda x: x.cpu(), "copy cuda -> cpu"),
    "copy": (lambda x: x.copy_(torch.zeros(4, 8)), "copy cpu -> cuda"),
    "to": (lambda x: torch.zeros(4).to(x.device), "copy cpu -> cuda"),
    "tensor": (lambda x: torch.tensor([1, 2], device=x.device), "copy cpu -> cuda"),
    "as_tensor": (lambda x: torch.as_tensor(3, device=x.device), "copy cpu -> cuda"),
    "list index": (lambda x: x[[0, 2]], "copy cpu -> cuda"),
    "CPU index": (lambda x: x[torch.tensor([0, 2])], "index copied from the CPU"),
    "boolean index": (lambda x: x[x > 0], "size of a boolean index read"),
    "nonzero": (lambda x: x.nonzero(), "size of nonzero read"),
}


@pytest.mark.parametrize("action, kind", WAITS.values(), ids=WAITS)
def test_what_makes_the_host_wait_is_counted_at_its_line(gpu, action, kind):
    with gpu, gpu.watch() as before:
        x = torch.zeros(4, 8, device=gpu.device)
    assert not before.waits
    with gpu, gpu.watch() as seen:
        try:
            action(x)
        except torch._subclasses.fake_tensor.DynamicOutputShapeException:
            pass  # the wait was counted; nothing here needs the result
    assert [event[0] for event in seen.waits] == [kind]
    assert "engine/test_fake_gpu.py" in next(iter(seen.waits))[1]


def test_what_stays_on_one_side_makes_nobody_wait(gpu):
    with gpu, gpu.watch() as seen:
        x = torch.zeros(4, 8, device=gpu.device, dtype=torch.bfloat16)
        (x @ x.T).softmax(-1)[1:].float()[:, torch.arange(2, device=gpu.device)].fill_(
            3
        ) + torch.tensor(2.0)
        assert (
            torch.arange(3).tolist() == [0, 1, 2]
            and torch.ones(2).numpy().sum() == 2
            and np.ones(2).sum() == 2
        )
    assert not seen.waits and seen.kernels == 8


def test_devices_do_not_mix(gpu):
    with gpu, pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device=gpu.device) + torch.zeros(3)


def test_bytes(gpu):
    """The most at once, in blocks of 512; views are free, and memory returns when its last view
    goes."""
    with gpu, gpu.watch() as seen:
        start = gpu.live
        x = torch.empty(1000, device=gpu.device)
        assert gpu.live - start == 4096
        row = x.view(10, 100)[3]
        del x
        assert gpu.live - start == 4096
        del row
        torch.empty(100, device=gpu.device)
        assert gpu.live == start
    assert seen.bytes == 4096


def test_a_backward_runs_in_the_simulation(gpu):
    """Whatever ran before in this process; a checkpointed block is computed again. Three matrices
    beside weight and input at the most: block's inside, its gradient and the weight's."""
    torch.ones(2, requires_grad=True).sum().backward()
    size = 512
    with gpu:
        weight = torch.nn.Parameter(torch.empty(size, size, device=gpu.device))
        x = torch.empty(size, size, device=gpu.device)
        with gpu.watch() as seen:
            y = checkpoint(lambda x: (x @ weight).exp(), x, use_reentrant=False)
            held = gpu.live - seen.start
            y.sum().backward()
        assert weight.grad.device == gpu.device and held == 4 * size**2 and not seen.waits
        del y
        assert gpu.live == seen.start + 4 * size**2
        assert 3 * 4 * size**2 <= seen.bytes <= 4 * 4 * size**2 + 8 * 512
    assert torch.ones(2, requires_grad=True).square().sum().backward() is None


@pytest.mark.parametrize("heads, mask", [(128, False), (512, False), (128, True)])
def test_attention_has_no_square_matrix(gpu, heads, mask):
    """Fused, as on a GPU: less than one tokens x tokens matrix is ever held."""
    with gpu:
        q = torch.empty(1, 1, 4096, heads, device=gpu.device, dtype=torch.bfloat16)
        bias = torch.ones(1, 1, 1, 4096, device=gpu.device, dtype=torch.bool) if mask else None
        with gpu.watch() as seen:
            out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=bias)
    assert out.shape == q.shape and out.device == gpu.device and seen.bytes < 4096 * 4096


def test_nothing_of_it_stays_behind(gpu):
    attention, numpy = torch.nn.functional.scaled_dot_product_attention, torch.Tensor.numpy
    with gpu:
        assert torch.nn.functional.scaled_dot_product_attention is not attention
    assert (
        torch.nn.functional.scaled_dot_product_attention is attention
        and torch.Tensor.numpy is numpy
    )
    assert torch.zeros(2).tolist() == [0, 0] and type(torch.zeros(2)) is torch.Tensor


def test_silu_is_one_kernel_each_way(gpu):
    """Its input and result, and in the backward one gradient more."""
    size = 4 * 512 * 512
    with gpu:
        x = torch.empty(512, 512, device=gpu.device, requires_grad=True)
        with gpu.watch() as seen:
            y = torch.nn.SiLU()(x)
            held = gpu.live - seen.start
            y.backward(torch.empty_like(y))
    assert held == size and seen.bytes == 3 * size
