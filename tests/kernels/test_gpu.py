"""What only a GPU can show. The sweeps of the other files run their `triton` half on it, too."""

import pytest
import torch
from kernel_cases import assert_close, drift, loss_case, step_case

from tempflow_kernels import group_loss, normal, sde_step

pytestmark = pytest.mark.gpu
CLIP = {"clip_low": 1e-3, "clip_high": 1e-3}


def loss_and_gradient(case, **options):
    velocity = case["velocity"].detach().requires_grad_()
    loss, stats = group_loss(**{**case, "velocity": velocity}, **CLIP, **options)
    (gradient,) = torch.autograd.grad(loss, velocity)
    return loss.detach(), gradient, *stats


def test_cpu_and_gpu_draw_the_same_noise():
    key = torch.arange(-20, 20).reshape(8, 5) * 123456789123456789
    assert_close("normal", normal(key.cuda(), 10007), normal(key, 10007), rel=2e-7)


@pytest.mark.parametrize("rows, children", [(1, 6), (9, 6), (36, 1)])
def test_many_runs_give_the_same_bits(rows, children):
    """A sum that saw another program's part too early, or in another order, would differ in some
    run."""
    case = step_case(rows, (4096, 64), children, still_rows=[0] if rows > 1 else [], device="cuda")
    want = sde_step(**case, children=children)
    loss_inputs = loss_case(rows, (64, 64), children, device="cuda")
    options = {"velocity_ref": drift(loss_inputs["velocity"], 0.1), "kl_coef": 0.01}
    want_loss = loss_and_gradient(loss_inputs, **options)
    for _ in range(100):
        found = sde_step(**case, children=children)
        assert all(torch.equal(got, expected) for got, expected in zip(found, want))
        found = loss_and_gradient(loss_inputs, **options)
        assert all(torch.equal(got, expected) for got, expected in zip(found, want_loss))


def captured(function):
    """A CUDA graph of function(), and what it returns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph, output


def test_step_in_a_cuda_graph():
    """Replayed on new inputs in the captured addresses, twice: equal to eager, bit for bit."""
    static = step_case(4, (5000,), 3, device="cuda")
    graph, output = captured(lambda: sde_step(**static, children=3))
    for seed in (1, 2):
        case = step_case(4, (5000,), 3, still_rows=[seed], seed=seed, device="cuda")
        for name, tensor in case.items():
            static[name].copy_(tensor)
        graph.replay()
        assert all(
            torch.equal(got, want) for got, want in zip(output, sde_step(**case, children=3))
        )


def test_loss_in_a_cuda_graph():
    static = loss_case(4, (5000,), 3, device="cuda")
    graph, output = captured(lambda: loss_and_gradient(static))
    for seed in (1, 2):
        case = loss_case(4, (5000,), 3, padding_rows=[seed], seed=seed, device="cuda")
        for name, tensor in case.items():
            static[name].copy_(tensor)
        graph.replay()
        assert all(torch.equal(got, want) for got, want in zip(output, loss_and_gradient(case)))


def test_nothing_synchronises():
    case = step_case(4, (5000,), 3, still_rows=[1], device="cuda")
    losses = loss_case(4, (5000,), 3, device="cuda")
    sde_step(**case, children=3), loss_and_gradient(losses)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sde_step(**case, children=3), loss_and_gradient(losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_arguments():
    case = step_case(4, (5000,), 3, device="cuda:1")
    want = sde_step(**step_case(4, (5000,), 3, device="cuda:0"), children=3)
    assert all(
        torch.equal(got.cpu(), expected.cpu())
        for got, expected in zip(sde_step(**case, children=3), want)
    )


def test_compiles_with_inductor():
    case = step_case(4, (5000,), 3, device="cuda")

    def step(x, velocity, a, b, tau, key):
        return sde_step(x, velocity, a, b, tau, key=key, children=3)

    compiled = torch.compile(step, fullgraph=True)
    assert all(torch.equal(got, want) for got, want in zip(compiled(**case), step(**case)))


def test_a_second_stream_is_independent():
    """Two streams step at once: neither's scratch is the other's."""
    cases = [step_case(3, (200_000,), 4, seed=seed, device="cuda") for seed in (1, 2)]
    want = [sde_step(**case, children=4) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for case, stream in zip(cases, streams):
            with torch.cuda.stream(stream):
                found.append(sde_step(**case, children=4))
        torch.cuda.synchronize()
        assert all(
            torch.equal(g, w) for got, expected in zip(found, want) for g, w in zip(got, expected)
        )
