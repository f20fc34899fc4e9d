"""Objectives: what a pull gives is the gradient that it says, and the kernel's own clip is one of
them."""

import pytest
import torch
from kernel_cases import assert_close

from tempflow.objectives import Batch, Objective, Old
from tempflow.objectives.base import step_distance
from tempflow.objectives.grpo import Grpo
from tempflow.penalties import Kl, Penalty

N, B, SHAPE = 5, 4, (3, 7)


def batch_of(seed=0, weight=(1.0, 0.5, 2.0, 1.0, 0.0), advantage=None, valid=None) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x, tau = torch.randn(N, *SHAPE, generator=g), 0.2 + 0.3 * torch.rand(N, generator=g)
    children = x[:, None] + tau.reshape(-1, 1, 1, 1) * torch.randn(N, B, *SHAPE, generator=g)
    advantage = torch.randn(N, B, generator=g) if advantage is None else advantage
    valid = torch.ones(N, B, dtype=torch.bool) if valid is None else valid
    ones = torch.ones(N)
    return Batch(
        [None] * N,
        x,
        children,
        0.5 * ones,
        ones,
        -0.1 * ones,
        tau,
        torch.tensor(weight),
        advantage * valid,
        None,
        N,
        valid,
        [0.5] * N,
    )


def velocities(seed=1, apart=0.2):
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(N, *SHAPE, generator=g)
    return old + apart * torch.randn(N, *SHAPE, generator=g), old


def old_of(objective, batch, velocity) -> Old:
    return Old(objective.measure(velocity, batch, None).log_prob, velocity)


def gradient(objective, batch, velocity, old, penalty=None, reference=None):
    velocity = velocity.clone().requires_grad_(True)
    loss, seen = objective.loss(velocity, batch, old, penalty, reference)
    loss.backward()
    return velocity.grad, loss, seen


class PulledGrpo(Grpo):
    """Through its pull, instead of the kernel's clip."""

    loss = Objective.loss


@pytest.mark.parametrize("penalty", [None, Kl(0.3), Kl(0.3, "v")], ids=["none", "kl-x", "kl-v"])
@pytest.mark.parametrize("first", [True, False])
def test_the_clip_through_its_pull_is_the_kernels(first, penalty):
    fused, pulled, batch = Grpo(3e-4, 5e-4), PulledGrpo(3e-4, 5e-4), batch_of()
    new, before = velocities(apart=0.02)
    old = None if first else old_of(fused, batch, before)
    one, _, seen = gradient(fused, batch, new, old, penalty, before)
    other, _, also = gradient(pulled, batch, new, old, penalty, before)
    assert_close("gradient", other, one, 1e-5)
    assert first or 0 < seen.clip_fraction < 1, "some are clipped, and some not"
    for name in ("ratio", "log_prob", "kl", "clip_fraction"):
        assert_close(name, getattr(also, name), getattr(seen, name), 1e-5, scale=1.0)


class Squared(Objective):
    """L = (log ratio - A)^2 / 2."""

    def pull(self, advantage, log_ratio, distance):
        return advantage - log_ratio


class Distance(Objective):
    """L = A times the log ratio where the step is near the old one."""

    keeps_velocity = True

    def pull(self, advantage, log_ratio, distance):
        return torch.where(distance < 1e-4, 0.0, advantage)


def test_any_loss_of_log_ratios_by_its_pull():
    objective, batch = Squared(), batch_of()
    new, before = velocities()
    old = old_of(objective, batch, before)
    found, _, _ = gradient(objective, batch, new, old)
    v = new.double().requires_grad_(True)
    mean = batch.a.reshape(-1, 1, 1) * batch.x.double() + batch.b.reshape(-1, 1, 1) * v
    density = -((batch.children.double() - mean[:, None]) ** 2).flatten(2).mean(2) / (
        2 * batch.tau[:, None].double() ** 2
    )
    ratio = density - (
        density.detach() * 0
        + old.log_prob.double()
        + torch.log(batch.tau[:, None].double())
        + 0.9189385332046727
    )
    rows = ((ratio - batch.advantage) ** 2 / 2).mean(1)
    (batch.weight * rows).mean().backward()
    assert_close("gradient", found, v.grad.float(), 1e-4)


def test_the_distance_is_the_kl_of_the_step():
    batch, (new, before) = batch_of(), velocities()
    d = step_distance(new, before, batch)
    expected = batch.b**2 * ((new - before) ** 2).flatten(1).mean(1) / (2 * batch.tau**2)
    assert_close("distance", d[:, 0], expected, 1e-6)
    assert (step_distance(new, None, batch) == 0).all()
    far, _, _ = gradient(Distance(), batch, new, old_of(Distance(), batch, before))
    near, _, _ = gradient(Distance(), batch, before, old_of(Distance(), batch, before))
    assert far.abs().max() > 0 and near.abs().max() == 0


def test_a_class_with_neither_is_refused():
    with pytest.raises(TypeError, match="Neither.* defines neither `pull` nor `loss`"):
        type("Neither", (Objective,), {})


# ---------------------------------------------------------------------------------------- penalties
@pytest.mark.parametrize("form", ["x", "v"])
def test_the_kernels_kl_is_the_written_one(form):
    """Whatever the weights: every state that counts has its divergence in the mean."""
    penalty, batch = Kl(0.7, form), batch_of(advantage=torch.zeros(N, B))
    new, reference = velocities()
    found, loss, seen = gradient(Grpo(), batch, new, None, penalty, reference)
    v = new.clone().requires_grad_(True)
    divergence = torch.where(
        batch.weight != 0, penalty.divergence(v, reference, batch.b, batch.tau), 0.0
    )
    (0.7 * divergence.sum() / N).backward()
    assert_close("gradient", found, v.grad, 1e-5)
    assert seen.kl.item() == pytest.approx(divergence.sum().item() / 4, rel=1e-5)


def test_a_penalty_needs_no_kernel():
    assert Penalty.kernel is None and Kl(0.1).kernel == (0.1, "x")
