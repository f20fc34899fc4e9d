"""Penalties: closed forms against worked numbers and finite differences, what they are measured
from, and on which states they act."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_cases import small_config
from kernel_cases import assert_close

from tempflow.errors import UserError
from tempflow.estimate import estimate
from tempflow.objectives import Batch
from tempflow.objectives.grpo import Grpo
from tempflow.objectives.nft import Nft
from tempflow.penalties import (
    W2,
    Alpha,
    ChannelKl,
    Chi2,
    Hellinger,
    Jeffreys,
    Kl,
    Renyi,
    TotalVariation,
)
from tempflow.training.batches import select
from tempflow.training.reference_policy import placement
from tempflow.training.update import Part, Updater
from tempflow.types import Advantages, State

FORMULAS = {  # of z^2, in float64
    Kl: lambda z2: z2 / 2,
    Jeffreys: lambda z2: z2,
    Hellinger: lambda z2: 1 - np.exp(-z2 / 8),
    Chi2: lambda z2: np.exp(z2) - 1,
    Renyi: lambda z2: 0.3 * z2 / 2,
    Alpha: lambda z2: (1 - np.exp(-0.21 * z2 / 2)) / 0.21,
    TotalVariation: lambda z2: math.erf(math.sqrt(z2 / 8)),
}
ONE = torch.ones(1)


def made(kind, **options):
    return kind(1.0, **({"order": 0.3} if kind in (Alpha, Renyi) else {}), **options)


@pytest.mark.parametrize(
    "shape", [(2, 6, 3), (2, 3, 2, 3), (2, 3, 1, 2, 3)], ids=["tokens", "image", "video"]
)
def test_the_kl_of_channel_means_sees_what_all_positions_share(shape):
    """Against the divergence of the means' own Gaussian, whose variance is tau^2 over the
    positions; fp32 [N, tokens, C] or [N, C, ...]."""
    channel, positions = (2, (1,)) if len(shape) == 3 else (1, tuple(range(2, len(shape))))
    v, other = torch.randn(
        2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).unbind(0)
    b, tau = torch.tensor([0.2, 0.3]), torch.tensor([0.5, 0.7])
    count, channels = v[0].numel() / shape[channel], shape[channel]
    means = (v - other).mean(positions)
    want = (
        (b.double()[:, None] * means).square().sum(1)
        / (2 * tau.double().square() / count)
        / (count * channels)
    )
    found = ChannelKl(1.0).divergence(v, other, b, tau)  # in fp32
    assert_close("means", found, want, 1e-6)
    assert (found <= Kl(1.0).divergence(v, other, b, tau)).all()
    assert_close(
        "level",
        ChannelKl(1.0).divergence(other + 0.5, other, b, tau),
        Kl(1.0).divergence(other + 0.5, other, b, tau),
        1e-6,
    )
    level = (v - other) - means.reshape(
        *(size if k in (0, channel) else 1 for k, size in enumerate(shape))
    )
    assert ChannelKl(1.0).divergence(other + level, other, b, tau).max() < 1e-12


@pytest.mark.parametrize(
    "kind, apart, value",
    [
        (Kl, 2.0, 2.0),
        (Hellinger, 2.0, 0.3935),
        (Chi2, 2.0, math.exp(4) - 1),
        (Kl, 0.8, 0.32),
        (Hellinger, 0.8, 0.07688),
        (Chi2, 0.8, 0.8965),
        (TotalVariation, 0.8, 0.3108),
        (Jeffreys, 0.8, 0.64),
        (Alpha, 0.8, 0.3095),
        (Renyi, 0.8, 0.096),
    ],
)
def test_worked_numbers(kind, apart, value):
    """One element, b = tau = 1: z is the distance of the velocities."""
    found = made(kind).divergence(torch.tensor([[apart]]), torch.zeros(1, 1), ONE, ONE)
    assert found.item() == pytest.approx(value, rel=2e-4)


@pytest.mark.parametrize(
    "kind, scale",
    # Kl's coefficient is its scale
    [(kind, scale) for kind in FORMULAS for scale in (1.0, 4.0) if kind is not Kl or scale == 1],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_gradients_against_finite_differences(kind, scale):
    g, b, tau = (
        torch.Generator().manual_seed(0),
        torch.tensor([-0.3, -0.1]),
        torch.tensor([0.25, 0.4]),
    )
    v, other = torch.randn(2, 3, 5, generator=g), torch.randn(2, 3, 5, generator=g)
    v.requires_grad_(True)
    penalty = made(kind) if kind is Kl else made(kind, scale=scale)
    penalty.divergence(v, other, b, tau).sum().backward()

    def value(moved):
        z2 = (
            scale
            * (b / tau).double().numpy() ** 2
            * ((moved - other.double().numpy()) ** 2).reshape(2, -1).mean(1)
        )
        return sum(FORMULAS[kind](one) for one in z2)

    start, expected = v.detach().double().numpy(), np.zeros(v.shape)
    for place in np.ndindex(*v.shape):
        step = np.zeros(v.shape)
        step[place] = 1e-5
        expected[place] = (value(start + step) - value(start - step)) / 2e-5
    assert_close("gradient", v.grad, torch.from_numpy(expected).float(), 1e-5)


def test_the_scale_makes_it_the_joint_density():
    """Of D = 6 elements: products of densities have sums of squares."""
    v = torch.tensor([[0.1, -0.2, 0.3, 0.1, 0.0, 0.4]])
    found = Hellinger(1.0, scale=6.0).divergence(v, torch.zeros(1, 6), ONE, 0.5 * ONE)
    assert found.item() == pytest.approx(1 - math.exp(-0.31 / 0.25 / 8), rel=1e-5)


def test_w2_is_the_distance_of_the_means():
    assert W2(1.0).steps == [0, 1, 2]
    found = W2(1.0).divergence(
        torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]), -0.1 * ONE, 0 * ONE
    )
    assert found.item() == pytest.approx(0.01 * 2)


@pytest.mark.parametrize("kind", FORMULAS, ids=lambda kind: kind.__name__)
def test_at_no_distance_and_far_out(kind):
    """No NaN at z = 0; finite however large z is, and chi-squared still pulls there."""
    v = torch.tensor([[1.0, 2.0], [1e6, 2.0], [3.0, 4.0]], requires_grad=True)
    found = made(kind).divergence(
        v, torch.tensor([[1.0, 2.0]] * 3), torch.ones(3), torch.tensor([0.1, 0.1, 0.0])
    )
    found.sum().backward()
    assert found.isfinite().all() and v.grad.isfinite().all()
    assert found[0] == 0 and found[2] == 0 and (v.grad[[0, 2]] == 0).all(), (
        "equal, and a step without noise"
    )
    assert kind is not Chi2 or v.grad[1, 0] > math.exp(20)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Jeffreys(1.0, scale=0.0), "scale: expected a number above 0"),
        (lambda: Alpha(1.0, order=1.0), "order: expected a number above 0 and below 1"),
        (lambda: Kl(1.0, steps=[]), "steps: expected null or a list of places"),
        (lambda: Kl(1.0, steps=[0, True]), "steps: expected null or a list of places"),
    ],
)
def test_options_are_checked(make, words):
    with pytest.raises(UserError, match=words):
        make()


# ------------------------------------------------------------------------------------- in an update
class Line:
    """A policy of one weight, v = w x, whose updates move it by a step; in the place of an engine
    and of a sampler."""

    dtype = torch.float32
    policy = SimpleNamespace(expert=lambda sigma: 0, only=lambda transformer, experts: transformer)

    def __init__(self, start=1.0, base=0.5):
        self.w, self.base, self.references = torch.tensor(start, requires_grad=True), base, 0
        self.engine = lambda x: self.w * x

    @contextmanager
    def reference_transformer(self):
        self.references += 1
        yield lambda x: self.base * x

    def velocity(self, transformer, x, sigma, conditions, dtype):
        return transformer(x)

    def accumulate(self, loss, last):
        loss.backward()

    def step(self, lr_factor):
        self.gradient, self.w.grad = self.w.grad.item(), None
        with torch.no_grad():
            self.w += 0.25
        return abs(self.gradient)

    def updater(self, objective, penalty):
        return Updater(self, self, objective, penalty, lambda units: {})


def part_of(weight=(1.0, 1.0, 0.0), endpoints=False) -> Part:
    """States at steps 0, 2 and 2, the last of them padding, all of x = (1, 2), with nothing to
    learn but the penalty."""
    n, x = len(weight), torch.tensor([[1.0, 2.0]] * len(weight))
    ones = torch.ones(n)
    children = x[:, None].expand(n, 1 if endpoints else 2, 2).contiguous()
    none = torch.zeros(children.shape[:2])
    real = sum(w != 0 for w in weight)
    b, tau = (ones, 0.5**0.5 * ones) if endpoints else (-0.5 * ones, 0.5 * ones)
    step = torch.tensor([0, 2, 2])
    return Part.of(
        [
            Batch(
                [None] * n,
                x,
                children,
                ones,
                0 * ones,
                b,
                tau,
                torch.tensor(weight),
                none,
                None,
                real,
                none == 0,
                [1.0] * n,
                step,
            )
        ],
        real,
    )


PENALTIES = [
    Kl(0.5),
    Kl(0.5, steps=[0, 2]),
    Kl(0.5, "v"),
    Jeffreys(0.5),
    Hellinger(0.5, scale=2.0),
    W2(0.5),
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: f"{type(p).__name__}-{p.steps}")
def test_the_loss_is_its_mean_over_the_states(penalty):
    line = Line()
    found = line.updater(Grpo(), penalty).update(part_of(), 1.0)
    w = torch.tensor(1.0, requires_grad=True)
    value = penalty.divergence(
        w * torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.0]]), -0.5 * ONE, 0.5 * ONE
    )
    (0.5 * value).backward()
    assert found["kl"] == pytest.approx(value.item(), rel=1e-5) and found["loss"] == pytest.approx(
        0.5 * value.item(), rel=1e-5
    )
    assert line.gradient == pytest.approx(w.grad.item(), rel=1e-5) and line.gradient > 0.01
    assert line.references == 1


@pytest.mark.parametrize("kind", [Kl, Jeffreys, TotalVariation, W2])
@pytest.mark.parametrize("steps, share", [([0], 0.5), ([2], 0.5), ([1], 0.0), ([0, 1, 2], 1.0)])
def test_only_states_at_its_steps_pay(kind, steps, share):
    some, everywhere = Line(), Line()
    few = some.updater(Grpo(), kind(0.5, steps=steps)).update(part_of(), 1.0)
    many = everywhere.updater(Grpo(), kind(0.5, steps=None)).update(part_of(), 1.0)
    assert (
        some.gradient == pytest.approx(share * everywhere.gradient, rel=1e-6)
        and everywhere.gradient > 0.01
    )
    assert few["kl"] == pytest.approx(share * many["kl"], rel=1e-6)


@pytest.mark.parametrize("kind", [Kl, Jeffreys, TotalVariation, W2])
@pytest.mark.parametrize("objective", [Grpo(), Nft()], ids=["grpo", "nft"])
def test_the_old_policy_needs_no_reference(kind, objective):
    """The first update has no distance from it, and the second that of the first one's move: 0.25
    (1, 2)."""
    line, endpoints = Line(), isinstance(objective, Nft)
    penalty, updater, part = kind(0.5, to="old"), None, part_of(endpoints=endpoints)
    updater, plain = line.updater(objective, penalty), Line()
    first = updater.update(part, 1.0)
    without = plain.updater(objective, None).update(part_of(endpoints=endpoints), 1.0)
    assert first["kl"] == 0 and first["loss"] == without["loss"] and line.gradient == plain.gradient
    second, batch = updater.update(part, 1.0), part.batches[0]
    expected = penalty.divergence(
        torch.tensor([[1.25, 2.5]]), torch.tensor([[1.0, 2.0]]), batch.b[:1], batch.tau[:1]
    )
    assert second["kl"] == pytest.approx(expected.item(), rel=1e-5) and second["kl"] > 0.01
    assert line.references == 0 and not penalty.needs_reference


def test_a_part_that_is_met_later_remembers_the_old_velocity():
    line, part = Line(), part_of()
    updater = line.updater(Grpo(), Jeffreys(0.5, to="old"))
    updater.remember(part)
    line.step = lambda lr_factor: 0.0
    with torch.no_grad():
        line.w += 0.5
    assert updater.update(part, 1.0)["kl"] == pytest.approx(0.25 * 5 / 2)
    assert line.references == 0


@pytest.mark.parametrize(
    "penalty, kept", [(None, [1]), (Kl(0.1), [0, 1, 2]), (W2(0.1, steps=[2]), [1, 2])]
)
def test_states_where_only_it_acts_are_forwarded(penalty, kept):
    """Three states at steps 0, 1 and 2, of which the second has advantages; and one without a
    reward."""
    x = torch.zeros(2)
    states = [State(None, k, 1.0, 1.0, -0.1, 0.3, x, x[None], np.array([k])) for k in range(3)]
    states.append(State(None, 2, 1.0, 1.0, -0.1, 0.3, x, x[None], np.array([3])))
    credit = Advantages(
        np.array([0, 1, 0, 0], dtype=np.float32),
        np.array([True, True, True, False]),
        np.array([]),
        {},
    )
    assert [one.state.step for one in select(states, credit, penalty)] == kept


# -------------------------------------------------------------------------------------- in a config
@pytest.mark.parametrize(
    "penalty, words",
    [
        (
            {"type": "w2", "coef": 1.0, "steps": [0, 10]},
            "training.penalty.steps: 10 is outside the grid; allowed are 0 to 9",
        ),
        (
            {"type": "tv", "coef": 1.0, "to": "old"},
            'training.penalty.to: "old" .* training.updates must make several',
        ),
        (
            {"type": "alpha", "coef": 1.0, "order": 2.0},
            "training.penalty.order: expected a number above 0 and below 1",
        ),
        (
            {"type": "chi2", "coef": 1.0, "to": "base"},
            "training.penalty.to: expected 'reference' or 'old'",
        ),
    ],
)
def test_a_config_that_cannot_work(penalty, words):
    with pytest.raises(UserError, match=words):
        small_config(
            rollout={"num_steps": 10, "plan": {"branch_steps": [0, 4, 8]}},
            training={"penalty": penalty},
        )


def test_no_copy_is_made_for_the_old_policy():
    """Its velocities are kept instead, as for the guard ratio."""

    def of(penalty, **more):
        return small_config(training={"penalty": penalty, "updates": {"passes": 2}, **more})

    old, reference, guard = (
        of({"coef": 0.1, "to": "old"}),
        of({"coef": 0.1}),
        of(None, objective={"ratio": "guard"}),
    )
    assert placement(old) is None and placement(reference) == "whole" and not old.needs_reference()
    seen = [estimate(config) for config in (old, reference, guard)]
    names = [{item.name for item in one.memory.resident} for one in seen]
    assert "reference copy" not in names[0] and "reference copy" in names[1]
    assert seen[0].total == seen[2].total
    assert [phase.name for phase in seen[0].phases].count("reference") == 0


def test_help_of_inherited_options_is_found():
    from tempflow.registry import options_of

    by_name = {option.name: option.help for option in options_of(Alpha)}
    assert (
        by_name["order"] == "above 0, below 1."
        and by_name["coef"].startswith("weight")
        and all(by_name.values())
    )


def test_a_kernel_is_used_where_it_acts_everywhere():
    assert [
        penalty.kernel for penalty in (Kl(0.1), Kl(0.1, "v", to="old"), Kl(0.1, steps=[1]))
    ] == [(0.1, "x"), (0.1, "v"), None]
