"""DiffusionNFT: states made of finished latents, and its loss against the paper's formula in
float64."""

import numpy as np
import pytest
import torch
from engine_cases import Iteration, PlainRuntime, flat, small_config
from kernel_cases import assert_close
from run_cases import train

from tempflow.objectives import Batch, Old
from tempflow.objectives.nft import Nft
from tempflow.penalties import Kl

N, SHAPE = 6, (3, 5)
TABLE = {"plan": {"type": "flow_grpo", "seeds": 3, "branch_steps": [0, 2]}, "num_steps": 4}
TRAINING = {"objective": {"type": "nft", "draws": 2}, "advantage": {"over": "prompt"}}


def batch_of(advantage) -> Batch:
    g = torch.Generator().manual_seed(0)
    x, target, sigma = (
        torch.randn(N, *SHAPE, generator=g),
        torch.randn(N, 1, *SHAPE, generator=g),
        torch.linspace(0.1, 1, N),
    )
    ones, weight = torch.ones(N), torch.tensor([1.0, 1, 1, 2, 1, 0])
    return Batch(
        [None] * N,
        x,
        target,
        sigma,
        0 * ones,
        ones,
        0.5**0.5 * ones,
        weight,
        torch.tensor(advantage)[:, None],
        None,
        N,
        ones[:, None] > 0,
        sigma.tolist(),
    )


def formula(velocity, before, batch, beta, most):
    """Mean over the states that count of max (r L+ + (1 - r) L-) / beta; L is divided by its own
    mean absolute error, detached."""
    total = 0.0
    for n in range(N):
        if batch.weight[n] == 0:
            continue
        v, old, target, s = (
            velocity[n].double(),
            before[n].double(),
            batch.children[n, 0].double(),
            batch.sigma[n].double(),
        )
        r = min(max(batch.advantage[n, 0].item() / (2 * most) + 0.5, 0), 1)
        errors = []
        for mixed in (beta * v + (1 - beta) * old, (1 + beta) * old - beta * v):
            apart = s * (target - mixed)  # of the predicted x0 from the real one
            errors.append((apart**2).mean() / apart.detach().abs().mean().clamp(min=1e-5))
        total = (
            total + batch.weight[n].double() * most * (r * errors[0] + (1 - r) * errors[1]) / beta
        )
    return total / N


@pytest.mark.parametrize("beta, most", [(1.0, 5.0), (0.1, 2.0)])
@pytest.mark.parametrize("first", [True, False])
def test_the_loss_is_the_papers(first, beta, most):
    objective, batch = (
        Nft(beta=beta, max_advantage=most),
        batch_of([2.0, -1.0, 0.0, 4.0, -9.0, 3.0]),
    )
    g = torch.Generator().manual_seed(1)
    before = torch.randn(N, *SHAPE, generator=g)
    v = (
        before.clone() if first else before + 0.1 * torch.randn(N, *SHAPE, generator=g)
    ).requires_grad_(True)
    old = None if first else Old(objective.measure(before, batch, None).log_prob, before)
    loss, seen = objective.loss(v, batch, old, None, None)
    loss.backward()
    naive = v.detach().clone().requires_grad_(True)
    expected = formula(naive, before, batch, beta, most)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close("gradient", v.grad, naive.grad, 1e-5)
    assert v.grad[2].abs().max() < 1e-6 or not first, "an image of mean reward pulls nowhere"
    assert (v.grad[-1] == 0).all(), "padding"
    assert (seen.ratio == 1).all() == first


def test_it_pulls_towards_what_is_good():
    batch, v = (
        batch_of([3.0, -3.0, 3.0, -3.0, 3.0, 0.0]),
        torch.zeros(N, *SHAPE, requires_grad=True),
    )
    Nft().loss(v, batch, None, None, None)[0].backward()
    towards = (-v.grad * batch.children[:, 0]).flatten(1).sum(1)[:5]
    assert (towards.sign() == torch.tensor([1.0, -1, 1, -1, 1])).all()


def test_a_penalty_is_added():
    batch, reference = batch_of([0.0] * N), torch.zeros(N, *SHAPE)
    v = torch.full((N, *SHAPE), 0.5, requires_grad=True)
    with_it, seen = Nft().loss(
        v, batch, Old(torch.zeros(N, 1), v.detach()), Kl(0.4, "v"), reference
    )
    without, _ = Nft().loss(v, batch, Old(torch.zeros(N, 1), v.detach()), None, None)
    assert with_it.item() - without.item() == pytest.approx(
        0.4 * 0.25 * 5 / 6, rel=1e-5
    ) and seen.kl.item() == pytest.approx(0.25)


@pytest.fixture(scope="module")
def iteration(policy):
    return Iteration(policy, small_config(rollout=TABLE, training=TRAINING))


def test_states_are_noised_endpoints(iteration):
    """Two draws of each of six images, one in each half of the grid, from noise of their own; the
    same again every time."""
    objective, kept, credit = (
        iteration.session.objective,
        iteration.rolled.kept,
        iteration.advantages(),
    )
    states = objective.states(kept, credit)
    assert kept.states == [] and len(kept.endpoints) == 6 and len(states) == 12
    for state, again in zip(states, objective.states(kept, credit), strict=True):
        assert torch.equal(state.x, again.x) and state.sigma == again.sigma
        endpoint = kept.endpoints[state.slots[0]]
        assert endpoint.unit == state.unit
        eps = state.children[0] + endpoint.latent
        assert_close("x", state.x, (1 - state.sigma) * endpoint.latent + state.sigma * eps, 1e-5)
        assert abs(eps.std() - 1) < 0.2
    assert all(one.step < 2 <= other.step for one, other in zip(states[::2], states[1::2]))
    noise = torch.stack(
        [s.children[0] + kept.endpoints[s.slots[0]].latent for s in states]
    ).flatten(1)
    assert (torch.cdist(noise, noise) + 100 * torch.eye(12)).min() > 10


def test_an_update_of_the_shipped_model(iteration):
    """A gradient that is finite, the same in micro-batches of any size."""
    from tempflow.training.credit import make_parts

    gradients = []
    for size in (3, 12):
        session = iteration.session.variant(
            small_config(rollout=TABLE, training={**TRAINING, "micro_batch": size})
        )
        runtime = PlainRuntime(iteration.policy, drift=0.02)
        (part,) = make_parts(session, iteration.rolled, iteration.advantages())
        metrics = iteration.updater(runtime, session.config).update(part, 1.0)
        assert (
            np.isfinite(metrics["loss"])
            and "mismatch/log_prob" not in metrics
            and metrics["ratio/max_dev"] == 0
        )
        gradients.append(flat(runtime.gradient()))
    assert gradients[0].norm() > 1e-6
    assert_close("gradient", gradients[0], gradients[1], 1e-4)


@pytest.mark.slow
def test_it_trains(tmp_path):
    run = train(
        tmp_path,
        "nft",
        processes=None,
        rollout=TABLE,
        training={**TRAINING, "iterations": 2, "updates": {"passes": 2}},
    )
    last = run.rows[-1]
    assert last["images"] == 6 and last["grad_norm"] > 0 and last["ratio/max_dev"] > 0
    assert not any(key.startswith("reward_std/") for key in last), "endpoints belong to no step"
