"""Copies between host and GPU: what arrives is what was sent, and on the simulated GPU nothing
waits."""

import pytest
import torch
from fake_gpu import FakeGpu

from tempflow import transfer


def groups():
    """Of many dtypes, sizes that fill no line of memory, scalars, views, and nothing at all."""
    return [
        {"a": torch.arange(3.0), "key": torch.tensor([[2**62, -5]]), "no": torch.zeros(0, 4)},
        {},
        {"a": torch.tensor(0.1), "valid": torch.tensor([True, False, True]), "b": rows()},
    ]


def rows():
    return torch.arange(63, dtype=torch.bfloat16).reshape(7, 9).T[1:]


def same(got, expected):
    return [
        {name: (t.dtype, t.shape, t.tolist()) for name, t in group.items()} for group in got
    ] == [{name: (t.dtype, t.shape, t.tolist()) for name, t in group.items()} for group in expected]


def test_one_buffer_holds_what_was_sent(monkeypatch):
    """The packing of a GPU, with a buffer of the CPU in the place of a pinned one."""
    real = torch.empty

    def empty(*size, pin_memory=False, **more):
        assert pin_memory
        return real(*size, **more)

    sent = groups()
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **more: tensor.clone())
    got = transfer.send(sent, "cuda")
    assert same(got, sent)
    held = {t.untyped_storage()._cdata for group in got for t in group.values()}
    starts = [
        t.data_ptr() % transfer.ALIGNED for group in got for t in group.values() if len(t.shape)
    ]
    assert len(held) == 1 and len(set(starts)) == 1


def test_the_cpu_keeps_its_tensors():
    sent = groups()
    got = transfer.send(sent, "cpu")
    assert all(got[n][name] is t for n, group in enumerate(sent) for name, t in group.items())


def test_sending_makes_nobody_wait():
    gpu = FakeGpu()
    with gpu, gpu.watch() as seen:
        got = transfer.send(groups(), gpu.device)
        one = transfer.send_one(torch.ones(5), gpu.device)
    assert not seen.waits and one.device == gpu.device
    assert [{name: (t.dtype, t.shape) for name, t in group.items()} for group in got] == [
        {name: (t.dtype, t.shape) for name, t in group.items()} for group in groups()
    ]


def test_what_is_fetched_is_waited_for_once():
    """Where it is asked for, by the host; moments before it have passed then."""
    gpu = FakeGpu()
    with gpu, gpu.watch() as seen:
        started = transfer.Mark(gpu.device)
        x = torch.zeros(4, 3, device=gpu.device)
        ended = transfer.Mark(gpu.device)
        fetched = transfer.Fetched([x, x > 0])
        x + 1
        assert not seen.waits and not fetched.ready()
        arrived = fetched.wait()
    assert list(seen.waits.values()) == [1] and seen.ahead == [1]
    assert [(t.shape, t.dtype) for t in arrived] == [(x.shape, x.dtype), (x.shape, torch.bool)]
    assert all(t.device.type == "cpu" for t in arrived) and started.seconds_to(ended) > 0


def test_the_cpu_fetches_at_once():
    x = torch.arange(3)
    fetched = transfer.Fetched([x])
    assert fetched.ready() and fetched.wait()[0] is x


@pytest.mark.gpu
def test_a_gpu_gets_what_was_sent():
    """Also from many threads' worth of buffers in turn, none of which waits for the others."""
    sent = [groups() for _ in range(100)]
    got = [transfer.send(one, "cuda") for one in sent]
    assert all(same(there, one) for there, one in zip(got, sent, strict=True))
