"""Inputs, float64 oracles and the one comparison that the kernel tests share.

The oracles follow the formulas of kernels/README.md child by child, with torch.distributions and
autograd, and share no code with the package but the Philox words, which have known answers of their
own (test_noise.py).
"""

import math

import torch
from torch.distributions import Normal

from tempflow_kernels import naive

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def assert_close(name, got, want, rel, scale=None):
    """||got - want|| / scale <= rel, scale = ||want|| if not given; NaN and inf must be in the same
    places."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = (kind(got) != kind(want)).nonzero()
        assert not len(wrong), f"{name}: {kind.__name__} differs at {wrong[:5].tolist()}"
    finite = torch.isfinite(want)
    difference = torch.where(finite, got - want, 0.0)
    scale = torch.where(finite, want, 0.0).norm().item() if scale is None else scale
    error = difference.norm().item() / max(scale, 1e-30)
    worst = difference.abs().flatten().topk(min(3, difference.numel()))
    assert error <= rel, (
        f"{name}: relative RMS {error:.2e} > {rel:.0e}, max abs {worst.values[0]:.2e} at"
        f" {worst.indices.tolist()}: got {got.flatten()[worst.indices].tolist()}, expected"
        f" {want.flatten()[worst.indices].tolist()}"
    )


def assert_rounded(name, got, want, rel, scale):
    """Every element of `got`, of a 16-bit dtype, within one ulp of float64 `want`, beside fp32
    errors of `rel` * scale.

    scale: the size, by element or overall, of the terms that `want` sums: they may cancel below an
    ulp of theirs.
    """
    limits = torch.finfo(got.dtype)
    ulp = (want.abs() * limits.eps).clamp(min=limits.smallest_normal * limits.eps)
    error = (got.detach().cpu().double() - want).abs()
    wrong = (~(error <= ulp + rel * scale)).nonzero()
    assert not len(wrong), (
        f"{name}: {len(wrong)} elements off by more than an ulp, first {wrong[:5].tolist()}"
    )


def flow_coefficients(sigma, sigma_next, eta):
    """(a, b, tau) of the `flow` SDE, float64 [N]; eta 0 gives the ODE step."""
    dt = sigma_next - sigma
    std = eta * torch.sqrt(sigma / (1 - sigma))
    return (
        1 + std**2 * dt / (2 * sigma),
        (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt,
        std * torch.sqrt(-dt),
    )


def step_case(rows, shape, children, dtype=torch.float32, still_rows=(), seed=0, device="cpu"):
    """Random arguments of sde_step at random sigmas; rows in `still_rows` have tau = 0."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.rand(rows, generator=generator, dtype=torch.float64) * 0.8 + 0.15
    eta = torch.full((rows,), 0.7, dtype=torch.float64)
    eta[list(still_rows)] = 0
    a, b, tau = flow_coefficients(sigma, sigma - 0.1, eta)
    case = {
        "x": torch.randn(rows, *shape, generator=generator).to(dtype),
        "velocity": torch.randn(rows, *shape, generator=generator).to(dtype),
        "a": a.float(),
        "b": b.float(),
        "tau": tau.float(),
        "key": torch.randint(-(2**63), 2**63 - 1, (rows, children), generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in case.items()}


def exact_normal(key, numel):
    """float64 [*key.shape, numel]: Box-Muller on the Philox words; u is the fp32 value that the
    definition says."""
    key = key.cpu()
    counter = torch.arange(-(-numel // 4))
    zero = torch.zeros_like(counter)
    low, high = key[..., None] & 0xFFFFFFFF, (key[..., None] >> 32) & 0xFFFFFFFF
    words = naive.philox((counter, zero, zero, zero), (low, high))
    pairs = []
    for w0, w1 in (words[:2], words[2:]):
        radius = torch.sqrt(-2 * torch.log((w0.float() * 2.0**-32 + 2.0**-33).double()))
        angle = 2 * math.pi * w1.double() / 2**32
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1).flatten(-2)[..., :numel]


def per_row(values, like):
    """float64 [N, 1, ...] that broadcasts against `like` [N, ...]."""
    return values.detach().cpu().double().reshape(-1, *[1] * (like.ndim - 1))


def exact_mean(x, velocity, a, b):
    return (
        per_row(a, x) * x.detach().cpu().double() + per_row(b, x) * velocity.detach().cpu().double()
    )


def exact_log_prob(x_next, mean, tau):
    """float64 [N, B], from torch.distributions; x_next [N, B, ...], mean [N, ...] float64."""
    out = torch.zeros(x_next.shape[:2], dtype=torch.float64)
    for n in range(x_next.shape[0]):
        if tau[n] != 0:
            density = Normal(mean[n], tau[n].cpu().double()).log_prob(
                x_next[n].detach().cpu().double()
            )
            out = torch.cat(
                [out[:n], density.reshape(len(density), -1).mean(dim=1)[None], out[n + 1 :]]
            )
    return out


def exact_step(x, velocity, a, b, tau, key):
    """float64 children [N, B, ...] before rounding, and the mean [N, ...]."""
    mean = exact_mean(x, velocity, a, b)
    noise = exact_normal(key, x[0].numel()).reshape(*key.shape, *x.shape[1:])
    return mean[:, None] + per_row(tau, noise) * noise, mean


def exact_loss(
    velocity,
    x,
    x_next,
    a,
    b,
    tau,
    log_prob_old,
    advantage,
    weight,
    *,
    clip_low,
    clip_high,
    velocity_ref=None,
    kl_coef=0.0,
    kl_form="x",
    ratio="plain",
    velocity_old=None,
):
    """(loss, d loss / d velocity, ratio, log_prob) in float64, one child at a time."""
    v = velocity.detach().cpu().double().requires_grad_()
    mean = per_row(a, x) * x.cpu().double() + per_row(b, x) * v
    log_prob = exact_log_prob(x_next, mean, tau)
    rows, children = advantage.shape
    terms, ratios = [], torch.ones(rows, children, dtype=torch.float64)
    for n in range(rows):
        if weight[n] == 0:
            continue
        t, scale = tau[n].cpu().double(), b[n].cpu().double()
        for i in range(children):
            if ratio == "guard":
                v_old = (
                    (velocity if velocity_old is None else velocity_old)[n].detach().cpu().double()
                )
                mean_old = a[n].cpu().double() * x[n].cpu().double() + scale * v_old
                eps = (
                    (x_next[n, i].cpu().double() - mean_old) / t
                    if t != 0
                    else torch.zeros_like(mean_old)
                )
                log_ratio = (eps * (mean[n] - mean_old)).mean()
            else:
                old = (
                    log_prob[n, i].detach()
                    if log_prob_old is None
                    else log_prob_old[n, i].cpu().double()
                )
                log_ratio = log_prob[n, i] - old
            r, advantage_i = log_ratio.exp(), advantage[n, i].cpu().double()
            clipped = r.clamp(1 - clip_low, 1 + clip_high)
            terms.append(
                weight[n].cpu().double()
                * torch.maximum(-advantage_i * r, -advantage_i * clipped)
                / children
            )
            ratios[n, i] = r.detach()
        if kl_coef:
            square = ((v[n] - velocity_ref[n].cpu().double()) ** 2).mean()
            if kl_form == "x":
                ref = (
                    a[n].cpu().double() * x[n].cpu().double()
                    + scale * velocity_ref[n].cpu().double()
                )
                square = ((mean[n] - ref) ** 2).mean() / (2 * t**2) if t != 0 else 0.0 * square
            terms.append(kl_coef * square)
    loss = sum(terms, torch.zeros((), dtype=torch.float64) + 0 * v.sum()) / rows
    (gradient,) = torch.autograd.grad(loss, v)
    return loss.detach(), gradient, ratios, log_prob.detach()


def loss_case(
    rows, shape, children, dtype=torch.float32, still_rows=(), padding_rows=(), seed=0, device="cpu"
):
    """Random arguments of group_loss whose ratios lie well inside or well outside a clip range of
    1e-3."""
    case = step_case(rows, shape, children, dtype, still_rows, seed, device)
    generator = torch.Generator().manual_seed(seed + 1)
    children_exact, mean = exact_step(**case)
    key = case.pop("key")
    case["x_next"] = children_exact.to(dtype).to(device)
    log_prob = exact_log_prob(case["x_next"], mean, case["tau"])
    shift = torch.tensor([-2e-2, -3e-4, 1e-4, 4e-4, 1e-2])[
        torch.randint(0, 5, key.shape, generator=generator)
    ]
    case["log_prob_old"] = (
        torch.where(case["tau"].cpu()[:, None] == 0, 0.0, log_prob - shift).float().to(device)
    )
    case["advantage"] = torch.randn(key.shape, generator=generator).to(device)
    case["weight"] = torch.rand(rows, generator=generator).to(device) + 0.5
    case["weight"][list(padding_rows)] = 0
    return case


def drift(velocity, size, seed=7):
    """Another policy's velocity, `size` away."""
    generator = torch.Generator().manual_seed(seed)
    return (velocity.cpu().float() + size * torch.randn(velocity.shape, generator=generator)).to(
        velocity
    )
