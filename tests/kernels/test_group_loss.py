"""group_loss and its gradient against float64, on both implementations."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    assert_close,
    assert_rounded,
    drift,
    exact_loss,
    loss_case,
    step_case,
)

from tempflow_kernels import group_loss, naive, sde_step

CLIP = {"clip_low": 1e-3, "clip_high": 2e-3}


def run(case, **options):
    """loss, gradient, stats."""
    velocity = case["velocity"].detach().requires_grad_()
    loss, stats = group_loss(**{**case, "velocity": velocity}, **{**CLIP, **options})
    loss.backward()
    assert velocity.grad.dtype == velocity.dtype
    return loss.detach(), velocity.grad, stats


def check(case, loss, gradient, stats, **options):
    want_loss, want_gradient, want_ratio, want_log_prob = exact_loss(**case, **{**CLIP, **options})
    scale = (
        case["weight"].cpu().double() * case["advantage"].cpu().double().abs().mean(1)
    ).mean().item() + 1e-3
    assert_close("loss", loss, want_loss, rel=1e-6, scale=scale)
    if gradient.dtype == torch.float32:
        assert_close("gradient", gradient, want_gradient, rel=1e-5)
    else:
        assert_rounded(
            "gradient",
            gradient,
            want_gradient,
            rel=1e-5,
            scale=want_gradient.square().mean().sqrt(),
        )
    assert_close("ratio", stats.ratio, want_ratio, rel=1e-6)
    assert_close(
        "log_prob", stats.log_prob, want_log_prob, rel=1e-6, scale=2 * stats.log_prob.numel() ** 0.5
    )


def options_for(case, kl, ratio, given_old):
    """Options of group_loss, and the case with its old policy given or not."""
    options = (
        {}
        if kl is None
        else {"velocity_ref": drift(case["velocity"], 0.2), "kl_coef": 0.05, "kl_form": kl}
    )
    case = dict(case)
    if ratio == "guard":
        options["ratio"] = "guard"
        if given_old:
            options["velocity_old"] = drift(case["velocity"], 0.3, seed=8)
    if not given_old:
        case["log_prob_old"] = None
    return case, options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kl", [None, "x", "v"])
@pytest.mark.parametrize(
    "ratio, given_old", [("plain", True), ("plain", False), ("guard", True), ("guard", False)]
)
def test_matches_float64(device, dtype, kl, ratio, given_old):
    case = loss_case(3, (1100,), 4, DTYPES[dtype], device=device)
    case, options = options_for(case, kl, ratio, given_old)
    check(case, *run(case, **options), **options)


@pytest.mark.parametrize(
    "rows, shape, children",
    [
        (1, (), 1),
        (1, (1,), 6),
        (3, (63,), 6),
        (2, (1000,), 64),
        (5, (3, 7, 11), 1),
        (2, (5, 1229), 3),
        (70, (16,), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_shapes(device, rows, shape, children, ratio):
    case, options = options_for(loss_case(rows, shape, children, device=device), "x", ratio, True)
    check(case, *run(case, **options), **options)


@pytest.mark.parametrize(
    "shape, children", [((16, 64, 64), 2), ((4096, 64), 1)], ids=["SD3", "FLUX"]
)
def test_real_sizes(device, shape, children):
    case, options = options_for(loss_case(1, shape, children, device=device), "x", "plain", True)
    check(case, *run(case, **options), **options)


def test_clipping_is_asymmetric_and_stops_the_gradient(device):
    """A child out of range on the side that its advantage pushes to has no gradient; on the other
    side it keeps it."""
    case = loss_case(1, (500,), 4, device=device)
    log_prob = run(case)[2].log_prob
    case["log_prob_old"] = log_prob - torch.tensor(
        [[1.5e-3, 2.5e-3, -0.5e-3, -1.5e-3]], device=device
    )
    for sign, in_range in ((1, [0, 2, 3]), (-1, [0, 1, 2])):
        case["advantage"] = torch.full((1, 4), float(sign), device=device)
        loss, gradient, stats = run(case)
        check(case, loss, gradient, stats)
        assert stats.clip_fraction == 0.5
        kept = {**case, "advantage": torch.zeros(1, 4, device=device)}
        kept["advantage"][0, in_range] = float(sign)
        assert_close("gradient", run(kept)[1], gradient, rel=1e-6)


@pytest.mark.parametrize("ratio", ["plain", "guard"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 1536, 5001])
def test_first_update_has_ratio_one(device, dtype, ratio, numel):
    """log_prob_old=None, or the statistics' log_prob handed back: every ratio is exactly 1, and the
    gradient flows."""
    case = step_case(3, (numel,), 4, DTYPES[dtype], still_rows=[1], device=device)
    case["x_next"], _ = sde_step(**case, children=4)
    del case["key"]
    case.update(
        advantage=torch.randn(3, 4, device=device),
        weight=torch.ones(3, device=device),
        log_prob_old=None,
    )
    loss, gradient, stats = run(case, ratio=ratio)
    assert (stats.ratio == 1).all() and stats.approx_kl == 0 and stats.clip_fraction == 0
    assert gradient[0].abs().sum() > 0 and gradient[2].abs().sum() > 0 and (gradient[1] == 0).all()
    if ratio == "plain":
        again = run({**case, "log_prob_old": stats.log_prob})
        assert (
            (again[2].ratio == 1).all()
            and torch.equal(again[0], loss)
            and torch.equal(again[1], gradient)
        )


@pytest.mark.parametrize("kind", ["flow", "small tau"])
def test_ratio_between_step_and_loss(device, kind):
    """Sampled log-probabilities and those of the loss agree to a few fp32 roundings: the identity
    step -> loss."""
    case = step_case(2, (4000,), 6, device=device)
    if kind == "small tau":
        case["tau"].fill_(0.02)
    case["x_next"], log_prob = sde_step(**case, children=6)
    del case["key"]
    case.update(
        advantage=torch.ones(2, 6, device=device),
        weight=torch.ones(2, device=device),
        log_prob_old=log_prob,
    )
    assert (run(case)[2].ratio - 1).abs().max() < 1e-6


def poisoned_padding(case, options, rows):
    """The case with NaN or inf in everything that padding rows hold but their weight."""
    case, options = dict(case), dict(options)
    for name, tensor in list(case.items()) + list(options.items()):
        if isinstance(tensor, torch.Tensor) and name != "weight":
            tensor = tensor.clone()
            tensor[rows] = float("inf") if name == "x_next" else float("nan")
            (case if name in case else options)[name] = tensor
    return case, options


@pytest.mark.parametrize("kl", [None, "x", "v"])
@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_rows_of_weight_zero_contribute_nothing(device, ratio, kl):
    """Whatever they hold. The other rows' gradient is what it is in a batch without them, times the
    share of rows."""
    case = loss_case(5, (300,), 3, padding_rows=[0, 3], device=device)
    case, options = options_for(case, kl, ratio, True)
    rows = torch.tensor([0, 3], device=device)
    loss, gradient, stats = run(
        *poisoned_padding(case, options, rows)[:1], **poisoned_padding(case, options, rows)[1]
    )
    check({n: t for n, t in case.items()}, loss, gradient, stats_where(stats, case), **options)
    assert (gradient[rows] == 0).all() and (stats.ratio[rows] == 1).all()
    live = torch.tensor([1, 2, 4], device=device)
    alone = run(
        {n: t[live] for n, t in case.items()},
        **{n: t[live] if isinstance(t, torch.Tensor) else t for n, t in options.items()},
    )
    assert_close("loss", loss, alone[0] * 3 / 5, rel=1e-6)
    assert_close("gradient", gradient[live], alone[1] * 3 / 5, rel=1e-6)
    for name in ("kl", "clip_fraction", "approx_kl"):
        assert_close(name, getattr(stats, name), getattr(alone[2], name), rel=1e-6)


def stats_where(stats, case):
    """The statistics with log_prob, which padding rows report as computed, taken from the oracle
    there."""
    exact = exact_loss(**case, **CLIP)[3].float().to(stats.log_prob.device)
    return stats._replace(log_prob=torch.where(case["weight"][:, None] == 0, exact, stats.log_prob))


def test_padding_alone(device):
    case, options = options_for(
        loss_case(2, (40,), 3, padding_rows=[0, 1], device=device), "x", "plain", True
    )
    loss, gradient, stats = run(case, **options)
    assert (
        loss == 0
        and (gradient == 0).all()
        and stats.kl == stats.clip_fraction == stats.approx_kl == 0
    )


def test_rows_without_noise(device):
    """tau = 0: log_prob 0, ratio 1, no policy gradient, no `x` KL; the `v` KL, which needs no
    noise, stays."""
    for kl in ("x", "v"):
        case, options = options_for(
            loss_case(3, (200,), 2, still_rows=[1], device=device), kl, "plain", True
        )
        loss, gradient, stats = run(case, **options)
        check(case, loss, gradient, stats, **options)
        assert (stats.ratio[1] == 1).all() and (gradient[1] == 0).all() == (kl == "x")


def test_nan_advantage_is_not_dropped(device):
    case = loss_case(3, (50,), 4, device=device)
    case["advantage"][1, 2] = float("nan")
    loss, gradient, _ = run(case)
    assert (
        torch.isnan(loss)
        and torch.isnan(gradient[1]).all()
        and torch.isfinite(gradient[[0, 2]]).all()
    )


@pytest.mark.parametrize(
    "name", ["velocity", "x", "x_next", "a", "b", "tau", "weight", "log_prob_old", "velocity_ref"]
)
def test_nan_makes_the_loss_nan(device, name):
    case, options = options_for(loss_case(3, (2100,), 2, device=device), "x", "plain", True)
    target = options if name in options else case
    target[name] = target[name].clone()
    target[name].reshape(3, -1)[2, -1] = float("nan")
    loss, gradient, _ = run(case, **options)
    assert (
        torch.isnan(loss) and torch.isnan(gradient[2]).any() and torch.isfinite(gradient[:2]).all()
    )


def test_ratios_that_overflow(device):
    """exp(200) = inf: clipped with A > 0, inf with A < 0 as the formula says, 0 with A = 0 (a
    masked child)."""
    case = loss_case(1, (30,), 3, device=device)
    case["log_prob_old"] = run(case)[2].log_prob - 200
    case["advantage"] = torch.tensor([[1.0, 0.0, 0.0]], device=device)
    loss, gradient, stats = run(case)
    assert torch.isinf(stats.ratio).all()
    assert_close("loss", loss, -(1 + CLIP["clip_high"]) / 3 * case["weight"][0].double(), rel=1e-6)
    assert (gradient == 0).all()
    case["advantage"] = torch.tensor([[1.0, -1.0, 0.0]], device=device)
    assert run(case)[0] == float("inf")
    case["log_prob_old"] += 400
    case["advantage"] = torch.tensor([[1.0, -1.0, 0.0]], device=device)
    assert_close(
        "underflow", run(case)[0], (1 - CLIP["clip_low"]) / 3 * case["weight"][0].double(), rel=1e-6
    )


def test_kl_is_measured_without_a_coefficient(device):
    """kl_coef = 0 leaves loss and gradient as they are without a reference, bit for bit, and
    reports its KL."""
    case, options = options_for(loss_case(3, (900,), 2, device=device), "x", "plain", True)
    with_kl = run(case, **options)
    measured = run(case, **{**options, "kl_coef": 0.0})
    without = run(case)
    assert torch.equal(measured[0], without[0]) and torch.equal(measured[1], without[1])
    assert torch.equal(measured[2].kl, with_kl[2].kl) and measured[2].kl > 0 and without[2].kl == 0


def test_statistics(device):
    case, options = options_for(loss_case(4, (300,), 5, device=device), "v", "plain", True)
    _, _, stats = run(case, **options)
    ratio = exact_loss(**case, **CLIP, **options)[2]
    outside = (ratio < 1 - CLIP["clip_low"]) | (ratio > 1 + CLIP["clip_high"])
    assert 0 < outside.double().mean() < 1
    assert_close("clip_fraction", stats.clip_fraction, outside.double().mean(), rel=1e-6)
    assert_close("approx_kl", stats.approx_kl, (ratio.log() ** 2 / 2).mean(), rel=1e-4)
    square = (case["velocity"].double() - options["velocity_ref"].double()) ** 2
    assert_close("kl", stats.kl, square.mean(), rel=1e-6)
    assert not any(tensor.requires_grad for tensor in stats)


def test_calls_repeat_bit_for_bit_and_rows_are_independent(device):
    case, options = options_for(loss_case(3, (9000,), 5, device=device), "x", "guard", True)
    first, second = run(case, **options), run(case, **options)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    row = {n: t[:1] if isinstance(t, torch.Tensor) else t for n, t in {**case, **options}.items()}
    alone = run(row)
    assert torch.equal(alone[2].log_prob, first[2].log_prob[:1]) and torch.equal(
        alone[2].ratio, first[2].ratio[:1]
    )


def test_non_contiguous_inputs(device):
    case, options = options_for(loss_case(2, (6, 50), 3, device=device), "x", "guard", True)
    want = run(case, **options)

    def strided(tensor):
        return (
            torch.stack([tensor, tensor], dim=-1)[..., 0]
            if isinstance(tensor, torch.Tensor)
            else tensor
        )

    got = run(
        {n: strided(t) for n, t in case.items()}, **{n: strided(t) for n, t in options.items()}
    )
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_gradient_scales_with_the_incoming_one(device):
    case = loss_case(2, (100,), 3, device=device)
    velocity = case["velocity"].requires_grad_()
    loss, _ = group_loss(**case, **CLIP)
    (tripled,) = torch.autograd.grad(3 * loss, velocity)
    assert_close("gradient", tripled, 3 * run(case)[1].double(), rel=1e-6)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 4),
    numel=st.integers(1, 3000),
    children=st.integers(1, 9),
    seed=st.integers(0, 2**20),
    kl=st.sampled_from([None, "x", "v"]),
    ratio=st.sampled_from(["plain", "guard"]),
    given_old=st.booleans(),
    data=st.data(),
)
def test_any_shape_and_option(device, rows, numel, children, seed, kl, ratio, given_old, data):
    still = data.draw(st.lists(st.integers(0, rows - 1), unique=True))
    padding = data.draw(st.lists(st.integers(0, rows - 1), unique=True))
    case = loss_case(rows, (numel,), children, torch.float32, still, padding, seed, device)
    case, options = options_for(case, kl, ratio, given_old)
    check(case, *run(case, **options), **options)


class ReferenceLoss(torch.autograd.Function):
    """The reference's forward and backward joined without the custom op, which refuses float64."""

    @staticmethod
    def forward(ctx, velocity, case, options):
        found = naive.group_loss_forward(velocity, *case, *options)
        velocity_ref, velocity_old = options[2], options[6]
        ctx.saved = velocity, *case[:4], found[4], found[5], velocity_ref, velocity_old
        return found[0]

    @staticmethod
    def backward(ctx, grad_loss):
        return naive.group_loss_backward(grad_loss, *ctx.saved), None, None


@pytest.mark.parametrize("kl", [None, "x", "v"])
@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_gradcheck_of_the_reference(ratio, kl):
    """In float64: the backward formula against finite differences, and against autograd through the
    forward formula."""
    case, options = options_for(loss_case(2, (9,), 3, still_rows=[1], seed=3), kl, ratio, True)
    case = {n: t.double() for n, t in case.items()}
    options = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    velocity = case.pop("velocity").requires_grad_()
    a, b, tau = case["a"], case["b"], case["tau"]
    positional = (
        case["x"],
        case["x_next"],
        a,
        b,
        tau,
        case["log_prob_old"],
        case["advantage"],
        case["weight"],
    )
    optional = (
        1e-3,
        2e-3,
        options.get("velocity_ref"),
        options.get("kl_coef", 0.0),
        options.get("kl_form", "x"),
        ratio,
        options.get("velocity_old"),
    )

    def loss(v):
        return ReferenceLoss.apply(v, positional, optional)

    assert torch.autograd.gradcheck(loss, velocity, eps=1e-7, atol=1e-6)
    (formula,) = torch.autograd.grad(loss(velocity), velocity)
    (automatic,) = torch.autograd.grad(
        naive.group_loss_forward(velocity, *positional, *optional)[0], velocity
    )
    assert_close("backward formula", formula, automatic, rel=1e-12)


def change(name, value):
    return lambda case: {**case, name: value(case) if callable(value) else value}


ERRORS = {
    "advantage dtype": (
        TypeError,
        "advantage: expected float32",
        change("advantage", lambda c: c["x_next"].double()),
    ),
    "advantage shape": (
        ValueError,
        r"advantage: expected shape \[2, 3\]",
        change("advantage", lambda c: c["weight"]),
    ),
    "old shape": (
        ValueError,
        r"log_prob_old: expected shape \[2, 3\]",
        change("log_prob_old", lambda c: c["a"]),
    ),
    "x_next shape": (
        ValueError,
        r"x_next: expected shape \[2, 3, 8\]",
        change("x_next", lambda c: c["x_next"][..., 1:]),
    ),
    "weight dtype": (
        TypeError,
        "weight: expected float32, got int64",
        change("weight", lambda c: c["weight"].long()),
    ),
    "kl_form": (ValueError, "kl_form: expected 'x' or 'v', got 'z'", change("kl_form", "z")),
    "ratio": (
        ValueError,
        "ratio: expected 'plain' or 'guard', got 'none'",
        change("ratio", "none"),
    ),
    "clip": (
        ValueError,
        "clip_low, clip_high: expected at least 0, got -0.1",
        change("clip_low", -0.1),
    ),
    "clip nan": (ValueError, "clip_low, clip_high: expected", change("clip_high", float("nan"))),
    "kl without reference": (
        ValueError,
        "velocity_ref: expected a tensor, as kl_coef is 0.1",
        change("kl_coef", 0.1),
    ),
    "guard": (ValueError, "velocity_old: ratio='guard' needs", change("ratio", "guard")),
    "old velocity": (
        ValueError,
        "velocity_old: only ratio='guard'",
        change("velocity_old", lambda c: c["velocity"]),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    kind, message, alter = ERRORS[name]
    with pytest.raises(kind, match=message):
        group_loss(**alter({**CLIP, **loss_case(2, (8,), 3)}))
