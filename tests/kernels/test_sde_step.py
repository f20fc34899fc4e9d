"""sde_step against float64, on both implementations."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    assert_close,
    assert_rounded,
    exact_log_prob,
    exact_step,
    per_row,
    step_case,
)

from tempflow_kernels import normal, sde_step

# Terms of the log density that cancel: the scale of its rounding errors, per child.
LOG_PROB_SCALE = 2.0


def run(case, **options):
    return sde_step(**case, children=case["key"].shape[1], **options)


def term_size(case):
    """Largest terms that an element of x_next sums: |a x| + |b v| + 6 tau."""
    a, b, tau = (per_row(case[name].abs(), case["x"])[:, None] for name in ("a", "b", "tau"))
    return a * case["x"].cpu().abs()[:, None] + b * case["velocity"].cpu().abs()[:, None] + 6 * tau


def check(case, x_next, log_prob, out_dtype):
    """x_next is the float64 step to 1e-6 (fp32), or rounded, within 1 ulp; log_prob is that of
    x_next as stored."""
    want, mean = exact_step(**case)
    assert x_next.shape == want.shape and x_next.dtype == out_dtype
    if out_dtype == torch.float32:
        assert_close("x_next", x_next, want, rel=1e-6)
    else:
        assert_rounded("x_next", x_next, want, rel=1e-6, scale=term_size(case))
    density = exact_log_prob(x_next, mean, case["tau"])
    assert log_prob.dtype == torch.float32
    assert_close(
        "log_prob", log_prob, density, rel=1e-6, scale=LOG_PROB_SCALE * log_prob.numel() ** 0.5
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, shape, children",
    [
        (1, (), 1),
        (1, (1,), 6),
        (3, (63,), 6),
        (1, (1000,), 64),
        (5, (3, 7, 11), 1),
        (2, (2048,), 2),
        (2, (5, 1229), 3),
    ],
    ids=str,
)
def test_matches_float64(device, dtype, rows, shape, children):
    case = step_case(rows, shape, children, DTYPES[dtype], device=device)
    check(case, *run(case), DTYPES[dtype])


@pytest.mark.parametrize(
    "rows, shape, children", [(2, (16, 64, 64), 1), (1, (4096, 64), 2)], ids=["SD3", "FLUX"]
)
def test_real_sizes(device, rows, shape, children):
    case = step_case(rows, shape, children, device=device)
    check(case, *run(case), torch.float32)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize(
    "x_dtype, velocity_dtype", [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")]
)
def test_mixed_dtypes(device, x_dtype, velocity_dtype, out_dtype):
    case = step_case(3, (333,), 4, DTYPES[x_dtype], still_rows=[1], device=device)
    case["velocity"] = case["velocity"].to(DTYPES[velocity_dtype])
    check(case, *run(case, out_dtype=DTYPES[out_dtype]), DTYPES[out_dtype])


def test_rows_without_noise_are_ode_steps(device):
    """In a mixed batch tau = 0 gives the mean, the same for all children, and log_prob 0; other
    rows notice nothing."""
    case = step_case(4, (777,), 3, still_rows=[0, 2], device=device)
    x_next, log_prob = run(case)
    check(case, x_next, log_prob, torch.float32)
    for n in (0, 2):
        assert (log_prob[n] == 0).all() and torch.equal(x_next[n, 0], x_next[n, 1])
    alone = {name: tensor[1:2] for name, tensor in case.items()}
    assert torch.equal(run(alone)[0], x_next[1:2]) and torch.equal(run(alone)[1], log_prob[1:2])


@pytest.mark.parametrize("numel", [1, 100, 2049, 9000])
def test_a_row_does_not_depend_on_its_batch(device, numel):
    """f(x[:1]) == f(x)[:1] bit for bit, and a child does not depend on its siblings."""
    case = step_case(3, (numel,), 4, device=device)
    x_next, log_prob = run(case)
    first = {name: tensor[:1] for name, tensor in case.items()}
    assert torch.equal(run(first)[0], x_next[:1]) and torch.equal(run(first)[1], log_prob[:1])
    case["key"] = case["key"][:, 1:3]
    assert torch.equal(run(case)[0], x_next[:, 1:3])


def test_noise_is_that_of_normal(device):
    case = step_case(2, (500,), 3, device=device)
    case["a"].zero_(), case["b"].zero_(), case["tau"].fill_(1.0)
    assert torch.equal(run(case)[0], normal(case["key"], 500))


def test_non_contiguous_inputs(device):
    case = step_case(4, (6, 50), 2, device=device)
    want = run(case)
    strided = {name: torch.stack([tensor, tensor], dim=-1)[..., 0] for name, tensor in case.items()}
    strided["velocity"] = case["velocity"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    assert all(torch.equal(got, expected) for got, expected in zip(run(strided), want))
    every_other = {name: tensor[::2] for name, tensor in case.items()}
    assert torch.equal(run(every_other)[0], want[0][::2])


@pytest.mark.parametrize(
    "name, value", [("x", float("nan")), ("x", float("inf")), ("velocity", float("-inf"))]
)
def test_nan_and_inf_propagate(device, name, value):
    """They stay where they are in x_next, and reach the log-probability of their row, which is
    stochastic, alone."""
    case = step_case(3, (2100,), 2, still_rows=[2], device=device)
    case[name][0, 5] = value
    case[name][2, 2099] = value
    x_next, log_prob = run(case)
    assert_close("x_next", x_next, exact_step(**case)[0], rel=1e-6)
    assert (
        not torch.isfinite(x_next[0, :, 5]).any() and not torch.isfinite(x_next[2, :, 2099]).any()
    )
    assert (
        torch.isnan(log_prob[0]).all()
        and torch.isfinite(log_prob[1]).all()
        and (log_prob[2] == 0).all()
    )


def test_nan_scalar_propagates(device):
    case = step_case(2, (10,), 2, device=device)
    case["tau"][0] = float("nan")
    x_next, log_prob = run(case)
    assert (
        torch.isnan(x_next[0]).all()
        and torch.isnan(log_prob[0]).all()
        and torch.isfinite(x_next[1]).all()
    )


def test_overflow_of_the_storage_dtype(device):
    """fp16 overflows to inf, as the formula says, and its log-probability is -inf."""
    case = step_case(1, (64,), 1, device=device)
    case["x"][0, 3] = 1e6
    x_next, log_prob = run(case, out_dtype=torch.float16)
    assert x_next[0, 0, 3] == float("inf") and log_prob[0, 0] == float("-inf")


def test_calls_repeat_bit_for_bit(device):
    case = step_case(3, (9000,), 5, still_rows=[1], device=device)
    first, second = run(case), run(case)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 4),
    numel=st.integers(1, 4500),
    children=st.integers(1, 9),
    seed=st.integers(0, 2**20),
    magnitude=st.sampled_from([1e-6, 1.0, 1e4]),
    dtype=st.sampled_from(list(DTYPES)),
    data=st.data(),
)
def test_any_shape_and_value(device, rows, numel, children, seed, magnitude, dtype, data):
    still = data.draw(st.lists(st.integers(0, rows - 1), unique=True))
    case = step_case(rows, (numel,), children, torch.float32, still, seed, device)
    case["x"] *= magnitude
    x_next, log_prob = run(case, out_dtype=DTYPES[dtype])
    want, mean = exact_step(**case)
    if dtype == "fp32":
        assert_close("x_next", x_next, want, rel=1e-6)
    elif want.abs().max() < torch.finfo(DTYPES[dtype]).max:
        assert_rounded("x_next", x_next, want, rel=1e-6, scale=term_size(case))
    if magnitude <= 1 and dtype == "fp32":
        scale = LOG_PROB_SCALE * log_prob.numel() ** 0.5
        assert_close(
            "log_prob", log_prob, exact_log_prob(x_next, mean, case["tau"]), rel=1e-6, scale=scale
        )


def wrong(case, name, value):
    return {**case, name: value}


ERRORS = {
    "x dtype": (
        TypeError,
        "x: expected bfloat16 or float16 or float32, got float64",
        lambda c: wrong(c, "x", c["x"].double()),
    ),
    "x empty": (
        ValueError,
        "x: expected shape .*at least one element",
        lambda c: wrong(c, "x", c["x"][:, :0]),
    ),
    "x list": (TypeError, "x: expected a tensor, got list", lambda c: wrong(c, "x", [1.0])),
    "velocity shape": (
        ValueError,
        r"velocity: expected shape \[2, 8\], got \[2, 7\]",
        lambda c: wrong(c, "velocity", c["velocity"][:, :7]),
    ),
    "a dtype": (
        TypeError,
        "a: expected float32, got float64",
        lambda c: wrong(c, "a", c["a"].double()),
    ),
    "tau shape": (
        ValueError,
        r"tau: expected shape \[2\], got \[\]",
        lambda c: wrong(c, "tau", c["tau"][0]),
    ),
    "key dtype": (
        TypeError,
        "key: expected int64, got int32",
        lambda c: wrong(c, "key", c["key"].int()),
    ),
    "key shape": (
        ValueError,
        r"key: expected shape \[2, 3\], got \[2, 2\]",
        lambda c: wrong(c, "key", c["key"][:, :2]),
    ),
    "children": (
        ValueError,
        "children: expected 1 to 64 per row, got 65",
        lambda c: wrong(c, "children", 65),
    ),
    "out_dtype": (
        ValueError,
        "out_dtype: expected .*got torch.int32",
        lambda c: wrong(c, "out_dtype", torch.int32),
    ),
    "device": (
        ValueError,
        "b: expected a tensor on cpu as x, got one on meta",
        lambda c: wrong(c, "b", c["b"].to("meta")),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    kind, message, change = ERRORS[name]
    with pytest.raises(kind, match=message):
        sde_step(**change({"children": 3, **step_case(2, (8,), 3)}))


def test_errors_of_normal():
    with pytest.raises(TypeError, match="key: expected int64, got float32"):
        normal(torch.zeros(2), 4)
    with pytest.raises(ValueError, match="numel: expected at least 1, got 0"):
        normal(torch.zeros(2, dtype=torch.int64), 0)
