"""The pulls of the shipped objectives: by hand, against finite differences of the losses as
written, and with masked children."""

import math

import pytest
import torch
from engine_cases import config_table
from kernel_cases import assert_close
from test_objectives import B, N, batch_of, gradient, old_of, velocities

from tempflow import registry
from tempflow.config import parse_config
from tempflow.errors import UserError
from tempflow.objectives import GroupObjective
from tempflow.objectives.grpo import Grpo
from tempflow.objectives.preference import Dgpo, Dmpo, Dpo
from tempflow.objectives.trust_region import Dppo, Hinge, Spo

ON_STATES = ["grpo", "dppo", "hinge", "spo", "dpo", "dmpo", "dgpo"]
GROUPS = {"dpo": Dpo, "dmpo": Dmpo, "dgpo": Dgpo}


def row(*values) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def pull_of(objective, advantage, log_ratio, distance=0.0, valid=None):
    if isinstance(objective, GroupObjective):
        return objective.group_pull(
            advantage,
            log_ratio,
            torch.ones_like(advantage, dtype=torch.bool) if valid is None else valid,
        )
    return objective.pull(advantage, log_ratio, torch.full_like(advantage[:, :1], distance))


# ------------------------------------------------------------------------------------------ by hand
def test_dmpo_by_hand():
    """A = (1, -1) at ratio 1: q = (.5, .5), p = (.8808, .1192), KL = .4338, and the pull is +-.5
    beta."""
    beta, p = 7.0, torch.softmax(row(1.0, -1.0), 1)
    assert p.tolist()[0] == pytest.approx([0.8808, 0.1192], abs=1e-4)
    assert (0.5 * torch.log(0.5 / p)).sum().item() == pytest.approx(0.4338, abs=1e-4)
    assert pull_of(Dmpo(beta), row(1.0, -1.0), row(0.0, 0.0)).tolist()[0] == pytest.approx(
        [0.5 * beta, -0.5 * beta]
    )


@pytest.mark.parametrize("u, dmpo, dpo", [(0.0, -0.736, -0.5), (math.log(0.95 / 0.05), 0.0, -0.05)])
def test_dmpo_ends_where_dpo_goes_on(u, dmpo, dpo):
    """With p = (.95, .05): slopes in u = beta (log ratio - log ratio) are these, the pull of the
    better child their negatives."""
    advantage, log_ratio = row(math.log(0.95), math.log(0.05)), row(u / 2, -u / 2)
    assert pull_of(Dmpo(1.0), advantage, log_ratio).tolist()[0] == pytest.approx(
        [-dmpo, dmpo], abs=5e-4
    )
    assert pull_of(Dpo(1.0), advantage, log_ratio).tolist()[0] == pytest.approx(
        [-dpo, dpo], abs=5e-4
    )


def test_dppo_stops_what_moves_on_too_far():
    """ratio 1.1 and 0.9, beyond delta: stopped where A points the same way."""
    advantage, log_ratio = row(2.0, -2.0, 2.0, -2.0), row(1.1, 1.1, 0.9, 0.9).log()
    near, far = (pull_of(Dppo(1e-3), advantage, log_ratio, d).tolist()[0] for d in (9e-4, 1.1e-3))
    assert near == pytest.approx([2.2, -2.2, 1.8, -1.8])
    assert far == pytest.approx([0, -2.2, 1.8, 0])


def test_hinge_and_spo_by_hand():
    assert pull_of(
        Hinge(0.1), row(2.0, 2.0, -2.0, -2.0), row(0.09, 0.11, -0.09, -0.11)
    ).tolist() == [[2, 0, -2, 0]]
    ratio = row(1.0, 1.1, 1.2, 1.2, 0.8)
    found = pull_of(Spo(0.1), row(2.0, 2.0, 2.0, -2.0, -2.0), ratio.log())
    assert found.tolist()[0] == pytest.approx([2, 0, -2.4, -7.2, 1.6])
    found = pull_of(Spo(0.1, asymmetric=True), row(2.0, 2.0, 2.0, -2.0, -2.0), (ratio - 1e-9).log())
    assert found.tolist()[0] == pytest.approx([2, 2.2, 0, -7.2, 1.6], abs=1e-6), (
        "a clip where A > 0"
    )


def test_dpo_takes_the_best_and_the_worst():
    """u = 4 (.3 - .1): the pull is +-4 sigmoid(-u), and nothing on the others."""
    found = pull_of(Dpo(4.0), row(0.5, 1.5, -2.0, -1.0), row(0.9, 0.3, 0.1, -0.5)).tolist()[0]
    assert found == pytest.approx([0, 4 / (1 + math.exp(0.8)), -4 / (1 + math.exp(0.8)), 0])


def test_dgpo_weighs_by_advantage():
    found = pull_of(Dgpo(3.0), row(1.0, -1.0, 0.5), row(0.2, 0.1, -0.4)).tolist()[0]
    share = 3 / (1 + math.exp(3 * (0.2 - 0.1 - 0.2)))
    assert found == pytest.approx([share, -share, 0.5 * share])


@pytest.mark.parametrize("name", ["dmpo", "dgpo"])
def test_at_ratio_one_a_group_is_pulled_by_its_advantages(name):
    advantage = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantage -= advantage.mean(1, keepdim=True)
    found = pull_of(GROUPS[name](50.0), advantage, torch.zeros_like(advantage)) / advantage
    assert_close("pull / A", found, found[:, :1].expand_as(found), 1e-9)
    assert (found > 0).all()


# ------------------------------------------------------------------------------- finite differences
def surrogate(a, r, low, high):
    return torch.maximum(-a * r, -a * r.clamp(1 - low, 1 + high))


def preferred(a, log_ratio, beta):
    return beta * (log_ratio[a.argmax()] - log_ratio[a.argmin()])


def divergence(a, log_ratio, beta, temperature):
    q = torch.softmax(beta * log_ratio, 0)
    return (q * (q.log() - torch.softmax(a / temperature, 0).log())).sum()


def quadratic(a, r, epsilon):
    return -(a * r - a.abs() * (r - 1) ** 2 / (2 * epsilon))


# The losses of one group, from advantages and log-ratios [B] in float64.
LOSSES = {
    "grpo": (Grpo(0.1, 0.2), lambda a, lr: surrogate(a, lr.exp(), 0.1, 0.2).sum()),
    "dppo near": (Dppo(1.0), lambda a, lr: (-a * lr.exp()).sum()),
    "dppo far": (Dppo(1e-9), lambda a, lr: torch.where(a * lr > 0, 0.0, -a * lr.exp()).sum()),
    "hinge": (Hinge(0.15), lambda a, lr: (0.15 * a.abs() - a * lr).clamp(min=0).sum()),
    "spo": (Spo(0.15), lambda a, lr: quadratic(a, lr.exp(), 0.15).sum()),
    "aspo": (
        Spo(0.15, asymmetric=True),
        lambda a, lr: torch.where(
            a > 0, surrogate(a, lr.exp(), 0.15, 0.15), quadratic(a, lr.exp(), 0.15)
        ).sum(),
    ),
    "dpo": (Dpo(3.0), lambda a, lr: -torch.nn.functional.logsigmoid(preferred(a, lr, 3.0))),
    "dmpo": (Dmpo(3.0, 0.7), lambda a, lr: divergence(a, lr, 3.0, 0.7)),
    "dgpo": (Dgpo(3.0), lambda a, lr: -torch.nn.functional.logsigmoid(3.0 * (a * lr).sum())),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_pull_is_the_slope_of_its_loss(name):
    objective, loss = LOSSES[name]
    g, step = torch.Generator().manual_seed(3), 1e-6
    for _ in range(4):
        a, lr = torch.randn(2, 5, dtype=torch.float64, generator=g) * torch.tensor([[1.0], [0.3]])
        slopes = []
        for moved in step * torch.eye(5, dtype=torch.float64):
            slopes.append((loss(a, lr - moved) - loss(a, lr + moved)) / (2 * step))
        assert_close(
            name,
            pull_of(objective, a[None], lr[None], 1e-3)[0],
            torch.stack(slopes),
            1e-8,
            scale=1.0,
        )


# ------------------------------------------------------------------------------- through the kernel
@pytest.mark.parametrize("name", GROUPS)
def test_masked_children_and_flat_groups_have_no_part(name):
    """The gradient is that of the valid children alone, whatever the masked ones hold; a group
    without spread has none."""
    valid = torch.ones(N, B, dtype=torch.bool)
    valid[:, -1] = valid[2, 1] = False
    batch, objective, (new, before) = batch_of(valid=valid), GROUPS[name](), velocities(apart=0.02)
    batch.advantage[0] = 0.0
    old = old_of(objective, batch, before)
    found, _, seen = gradient(objective, batch, new, old)
    log_ratio = (seen.log_prob - old.log_prob).double()
    pull = objective.batch_pull(batch, log_ratio, None)
    assert (
        (pull[~valid] == 0).all()
        and (pull[0] == 0).all()
        and (pull[1:, :-1].abs().sum(1) > 0).all()
    )
    for n in range(1, N):
        a, lr = batch.advantage[n][valid[n]][None].double(), log_ratio[n][valid[n]][None]
        assert_close(f"state {n}", pull[n][valid[n]], pull_of(objective, a, lr)[0], 1e-5)
    assert found[0].abs().max() == 0 and found[1].abs().max() > 0
    batch.children[~valid] += 3.0
    moved, _, _ = gradient(objective, batch, new, old)
    assert torch.equal(found, moved)


@pytest.mark.parametrize("name", ON_STATES)
def test_the_gradient_is_the_pulls(name):
    """For every objective on states, with an old policy and without: mean over N and B of w pull d
    log p / dv, in float64."""
    objective, batch, (new, before) = (
        registry.build("objective", name),
        batch_of(),
        velocities(apart=0.01),
    )
    for old in (None, old_of(objective, batch, before)):
        found, loss, seen = gradient(objective, batch, new, old)
        v = new.double().requires_grad_(True)
        mean = batch.a.reshape(-1, 1, 1) * batch.x.double() + batch.b.reshape(-1, 1, 1) * v
        density = -((batch.children.double() - mean[:, None]) ** 2).flatten(2).mean(2) / (
            2 * batch.tau[:, None].double() ** 2
        )
        log_ratio = torch.zeros_like(seen.log_prob) if old is None else seen.log_prob - old.log_prob
        apart = (
            batch.b**2
            * (0 if old is None else ((new - before) ** 2).flatten(1).mean(1))
            / (2 * batch.tau**2)
        )
        pull = objective.batch_pull(batch, log_ratio, apart[:, None])
        (-(batch.weight[:, None] * pull.double() * density).mean(1)).mean().backward()
        assert_close(name, found, v.grad.float(), 1e-4)
        assert found.abs().max() > 0 and loss.isfinite()


@pytest.mark.parametrize("objective", [Dppo(1e-5), Hinge(5e-4)], ids=["dppo", "hinge"])
def test_what_is_stopped_is_counted(objective):
    """Of the valid children of each state with weight, as a mean over the states; those with a
    ratio above 1 also by themselves."""
    valid = torch.ones(N, B, dtype=torch.bool)
    valid[1, 2:] = valid[3, 0] = False
    batch, (new, before) = batch_of(valid=valid), velocities(apart=0.02)
    old = old_of(objective, batch, before)
    _, _, seen = gradient(objective, batch, new, old)
    distance = (batch.b**2 * ((new - before) ** 2).flatten(1).mean(1) / (2 * batch.tau**2))[:, None]
    stopped = (objective.batch_pull(batch, seen.log_prob - old.log_prob, distance) == 0) & valid
    shares = [(stopped[n].sum() / valid[n].sum()).item() for n in range(N - 1)]
    above = [
        ((stopped[n] & (seen.ratio[n] > 1)).sum() / valid[n].sum()).item() for n in range(N - 1)
    ]
    assert (
        seen.clip_fraction.item() == pytest.approx(sum(shares) / 4)
        and 0 < sum(above) < sum(shares) < 4
    )
    assert seen.clipped_above.item() == pytest.approx(sum(above) / 4)
    assert gradient(objective, batch, new, None)[2].clip_fraction == 0, (
        "at a ratio of 1 nothing is stopped"
    )


# ------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("plan", ["flow_grpo", "mix_grpo", "tempflow"])
def test_states_of_one_child_are_refused(plan, name):
    one = {"type": plan, "seeds": 4} | ({"children": 1} if plan == "tempflow" else {})
    with pytest.raises(
        UserError,
        match=(
            rf"training.objective: {name} compares .*plan {plan} has one child\..*tempflow .*tree"
        ),
    ):
        parse_config(
            config_table(
                rollout={"plan": one},
                training={"objective": {"type": name}, "advantage": {"over": "prompt"}},
            )
        )


def test_trees_compare_children():
    table = config_table(
        rollout={"plan": {"type": "tree", "seeds": 2}}, training={"objective": {"type": "dmpo"}}
    )
    assert parse_config(table).objective().compares_children
