"""The float8 copy for suffix rows: its arithmetic against float64, what it converts and shares, and
its rows in the scheduler."""

import math
import types
from functools import cache

import pytest
import torch
from engine_cases import MODEL, PROMPTS, Iteration, plan_table, quiet_pool, small_config
from family_cases import FAMILIES
from rollout_cases import Rollout, toy_velocity
from test_graphs import Recorded, cache_of

from tempflow.errors import UserError
from tempflow.models import load_policy
from tempflow.models.layers import block_lists
from tempflow.sampling import float8
from tempflow.sampling.float8 import (
    FLOAT8,
    Float8Copy,
    Float8Linear,
    Rounding,
    float8_bytes,
    float8_layers,
    obstacle,
    quantize_rows,
)
from tempflow.sampling.graphs import CudaCapture
from tempflow.sampling.layout import iteration_units
from tempflow.sampling.suffix import count_forwards, last_decisions, suffix_path
from tempflow.types import Size

pytestmark = pytest.mark.usefixtures("small_condition_images")
STEP = 2.0**-4  # half of the spacing of float8's mantissas of three bits, at their lower end
SIZE = Size(32, 96)


# --------------------------------------------------------------------------------------- arithmetic
@pytest.mark.parametrize("dtype, own", [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)])
def test_every_row_is_rounded_to_its_own_scale(dtype, own):
    """own: the rounding of the dtype that scales are found in."""
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -20, 20, 6
    ).reshape(-1, 1)
    x = x.to(dtype)
    rows, scale = quantize_rows(x)
    assert rows.dtype == FLOAT8 and scale.dtype == torch.float32 and scale.shape == (6, 1)
    back = rows.double() * scale.double()
    smallest = scale.double() * 2.0**-9  # below float8's normal numbers, the spacing is this
    assert (
        (back - x).abs() <= torch.maximum((STEP + own) * x.abs().double(), smallest / 2 * 1.01)
    ).all()
    assert torch.allclose(back.abs().amax(1), x.abs().amax(1).double(), rtol=own), (
        "the largest of a row is kept"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros(dtype):
    rows, scale = quantize_rows(torch.zeros(2, 16, dtype=dtype))
    assert (rows.float() * scale == 0).all()


def test_rows_of_nonsense():
    x = torch.zeros(3, 16)
    x[1, 2] = math.nan
    x[2] = 1e38
    rows, scale = quantize_rows(x)
    back = rows.float() * scale
    assert (
        (back[0] == 0).all() and back[1].isnan().any() and torch.allclose(back[2], x[2], rtol=1e-6)
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_product_of_the_rounded_factors(dtype, tolerance, bias):
    torch.manual_seed(0)
    plain = torch.nn.Linear(48, 80, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(2, 5, 48, dtype=dtype)
    got = Float8Linear(plain)(x)
    (rows, scale), (weight, weight_scale) = (
        quantize_rows(t.reshape(-1, 48)) for t in (x, plain.weight)
    )
    want = (rows.double() * scale.double()) @ (weight.double() * weight_scale.double()).T
    want = (want + (plain.bias.double() if bias else 0)).reshape(2, 5, 80)
    assert got.dtype == dtype and (got - want).norm() <= tolerance * want.norm()
    exact = plain(x).double()
    assert 1e-3 < (got - exact).norm() / exact.norm() < STEP


# ----------------------------------------------------------------------------------------- the copy
@pytest.fixture(scope="module")
def policies(family_folders):
    return cache(lambda name: load_policy(str(family_folders(name)), max_sequence_length=20))


def velocity(name, policy, transformer, seed=0):
    size = FAMILIES[name].size(32, 96)
    conditioning = FAMILIES[name].encoded(policy, [0, 0, 0], size)
    x = torch.randn(3, *policy.latent_shape(size), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return policy.velocity(
            transformer, x, torch.tensor([0.9, 0.5, 0.1]), conditioning, size, 0.0
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_it_converts_the_layers_of_the_blocks_that_see_tokens(policies, name):
    transformer, shapes = policies(name).denoiser(), {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, layer=layer: shapes.update({layer: args[0].shape})
        )
        for layer, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    velocity(name, policies(name), transformer)
    for hook in hooks:
        hook.remove()
    fits = {
        name
        for name, layer in transformer.named_modules()
        if isinstance(layer, torch.nn.Linear) and not any(n % 16 for n in layer.weight.shape)
    }
    blocks = tuple(block_lists(transformer))
    tokens = {
        layer
        for layer, shape in shapes.items()
        if len(shape) == 3 and layer.startswith(blocks) and layer in fits
    }
    unused = set(float8_layers(transformer)) - set(shapes)  # the last block's text stream
    assert set(float8_layers(transformer)) - unused == tokens and len(tokens) > 10
    assert all("_context" in layer or "txt" in layer or "add" in layer for layer in unused)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rest_is_shared_and_weights_follow_in_place(policies, name):
    policy = policies(name)
    source = policy.denoiser()
    made = Float8Copy(source)
    storages = {t.data_ptr() for t in (*source.parameters(), *source.buffers())}
    own = list(made.tensors())
    assert {
        t.data_ptr() for t in (*made.transformer.parameters(), *made.transformer.buffers())
    } - storages == {t.data_ptr() for t in own}
    assert sum(t.numel() * t.element_size() for t in own) == float8_bytes(source)
    assert not [name for name, module in source.named_modules() if isinstance(module, Float8Linear)]

    def distance():
        exact = velocity(name, policy, source)
        return ((velocity(name, policy, made.transformer) - exact).norm() / exact.norm()).item()

    close = distance()
    assert 1e-4 < close < 0.15
    converted = next(iter(float8_layers(source)))
    kept = {n: p.clone() for n, p in source.named_parameters()}
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    stale = distance()
    addresses = [t.data_ptr() for t in own]
    made.refresh()
    assert distance() < min(0.15, stale / 2), "refreshed"
    assert addresses == [t.data_ptr() for t in made.tensors()] and converted in dict(
        made.transformer.named_modules()
    )
    with torch.no_grad():
        for n, parameter in source.named_parameters():
            parameter.copy_(kept[n])


# float8 layers of a forward of the tiny models, and how often an input is rounded for them: q, k, v
# of a stream share one, in FLUX's single blocks with the MLP's first layer
ROUNDED = {"flux": (12 + 5, 8 + 2), "sd3": (25, 15), "qwen_image": (24, 16), "wan": (20, 14)}


@pytest.mark.parametrize("name", ROUNDED)
def test_an_input_is_rounded_once_for_all_layers_that_take_it(policies, monkeypatch, name):
    """And the velocities are those of rounding it for each, to the bit; nothing is kept after."""
    policy = policies(name)
    made = Float8Copy(policy.denoiser())
    layers = [part for part in made.transformer.modules() if isinstance(part, Float8Linear)]
    seen = []
    monkeypatch.setattr(float8, "quantize_rows", lambda x: seen.append(1) or quantize_rows(x))
    once, few = velocity(name, policy, made.transformer), len(seen)
    assert layers[0]._rounding._last is None, "inputs are gone, and their rounded rows with them"
    for layer in layers:
        layer._rounding = Rounding()
    every, many = velocity(name, policy, made.transformer), len(seen) - few
    assert torch.equal(once, every) and (many, few) == ROUNDED[name]


def test_a_changed_or_another_input_is_rounded_anew():
    rounding, x = Rounding(), torch.randn(2, 16)
    first = rounding(x)
    assert rounding(x)[0] is first[0]
    x.mul_(-1)
    assert torch.equal(rounding(x)[0].float(), -first[0].float())
    assert torch.equal(rounding(x.clone())[0].float(), -first[0].float())


def test_what_cannot_be_copied_says_why(monkeypatch):
    module = torch.nn.Module()
    module.blocks = torch.nn.ModuleList([torch.nn.Linear(24, 10)])
    with pytest.raises(
        UserError,
        match='rollout.suffix.weights: "float8": Module has no linear layer .* multiples of 16',
    ):
        Float8Copy(module)
    monkeypatch.delattr("torch.nn.functional.scaled_mm")
    assert "torch 2.10 or later" in obstacle(module)


@pytest.mark.parametrize(
    "capability, dtype, hip, words",
    [
        ((8, 0), torch.bfloat16, None, "compute capability 8.9 or later, CARD has 8.0"),
        ((9, 0), torch.float32, None, "model.dtype bfloat16, not float32"),
        ((9, 4), torch.bfloat16, "6.2", "an NVIDIA GPU, this is CARD"),
        ((9, 0), torch.bfloat16, None, None),
    ],
)
def test_gpus_that_cannot(monkeypatch, capability, dtype, hip, words):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "CARD")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.version.hip", hip)

    layer = types.SimpleNamespace(
        weight=types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    )
    monkeypatch.setattr(
        "tempflow.sampling.float8.float8_layers", lambda module: {"blocks.0": layer}
    )
    module = torch.nn.Linear(32, 16)
    reason = obstacle(module)
    assert reason is None if words is None else words in reason


# --------------------------------------------------------------------------------------------- rows
class Witness:
    """A velocity that notes which rows it was asked for, as (grid point, unit)."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, sigma, units):
        self.rows += [(round(10 * (1 - s)), unit.index) for s, unit in zip(sigma.tolist(), units)]
        return toy_velocity(x, sigma, units)


@pytest.mark.parametrize("exact_steps", [0, 2])
@pytest.mark.parametrize("plan", ["tempflow", "mix_grpo"])
def test_only_coarse_steps_use_it_and_decisions_keep_their_bits(plan, exact_steps):
    table = {"plan": plan_table(plan, seeds=2, children=3, branch_steps=[0, 3, 5], window=3)}
    group = {"advantage": {"over": "seed" if plan == "tempflow" else "prompt"}}
    units = iteration_units([5, 9], 2)
    suffix = {"stride": 2, "exact_steps": exact_steps, "weights": "float8"}
    config = small_config(rollout={**table, "suffix": suffix}, training=group)
    exact = Rollout(small_config(rollout=table, training=group), units)
    witness = Witness()
    run = Rollout(config, units, coarse=witness)
    assert (
        run.stats.forwards == count_forwards(run.forest.rows, 10, config.rollout.suffix)
        and run.states.keys() == exact.states.keys()
    )
    for place, state in exact.states.items():
        assert all(
            torch.equal(getattr(state, name), getattr(run.states[place], name))
            for name in ("x", "children", "log_prob")
        )
    ends = [k + 1 for k in last_decisions(run.forest.rows)]
    coarse = [
        (step, row.unit.index)
        for row, end in zip(run.forest.rows, ends, strict=True)
        for step in suffix_path(end, 10, config.rollout.suffix)[:-1]
        if step >= end + exact_steps
    ]
    assert sorted(witness.rows) == sorted(coarse) and 0 < len(coarse) < run.stats.forwards


def test_both_kinds_of_forwards_have_a_graph_and_a_size_of_their_own():
    """Two units' trunks make batches of two; their children fill the micro-batch."""
    config = small_config(
        rollout={"plan": {"branch_steps": "all", "children": 3}, "suffix": {"weights": "float8"}}
    )
    units = iteration_units([5, 9], 1)

    def halved(x, sigma, units):
        return 0.5 * x.clamp(-1, 1)

    def plain(x, sigma, units):
        return sigma.reshape(-1, 1, 1) * x.clamp(-1, 1)

    capture = Recorded()
    graphs, notes = cache_of(capture)
    graphed = Rollout(
        config, units, velocity=plain, micro_batch=16, execute=graphs, pad=True, coarse=halved
    )
    eager = Rollout(config, units, velocity=plain, micro_batch=16, coarse=halved)
    assert sorted(capture.shapes) == [2, 16] and not notes
    assert all(
        torch.equal(graphed.finished[place], latent) for place, latent in eager.finished.items()
    )
    other = Rollout(config, units, velocity=plain, micro_batch=16)
    assert any(
        not torch.equal(other.finished[place], latent) for place, latent in eager.finished.items()
    )


def test_graphs_of_two_functions_of_the_same_shapes_are_two():
    graphs, _ = cache_of(Recorded())

    def one(x):
        return (x + 1,)

    def two(x):
        return (x + 2,)

    x = torch.zeros(3, 2)
    for _ in range(2):
        assert graphs(one, {"x": x})[0][0, 0] == 1 and graphs(two, {"x": x})[0][0, 0] == 2
    assert graphs.captures == 2


# ----------------------------------------------------------------------------------------- in a run
def test_an_iteration_with_it_and_its_audit(policy):
    """Rewards differ from the exact ones, decisions do not."""
    table = {"num_steps": 6, "plan": {"branch_steps": [0, 2], "children": 3}}
    exact = Iteration(policy, small_config(rollout=table))
    coarse = Iteration(
        policy,
        small_config(
            rollout={**table, "suffix": {"stride": 1, "weights": "float8", "audit_every": 1}}
        ),
    )
    assert 0 < abs(coarse.rewards - exact.rewards).max()
    assert abs(coarse.roll_out(None).rewards.total - exact.rewards).max() < 1e-4
    for one, other in zip(coarse.states, exact.states, strict=True):
        assert one.step == other.step and torch.allclose(one.x, other.x, atol=1e-5)


def test_every_rollout_converts_the_weights_of_then():
    from tempflow.data.prompts import load_prompts
    from tempflow.models.embeddings import EmbeddingCache
    from tempflow.training.rollout import plan_iteration, roll_out
    from tempflow.training.session import assemble

    policy = load_policy(MODEL, max_sequence_length=20)
    suffix = {"stride": 3, "weights": "float8"}
    config = small_config(
        rollout={"num_steps": 4, "plan": {"branch_steps": [0], "seeds": 1}, "suffix": suffix}
    )
    with quiet_pool(config) as (pool, specs):
        session = assemble(
            config, policy, EmbeddingCache(policy), pool, specs, load_prompts(PROMPTS)
        )
        roll_out(session, plan_iteration(session, [0, 1], 0), 0, config.rollout.suffix)
        converted = session.float8.transformer.transformer_blocks[0].attn.to_q
        before = converted.scale.clone()
        with torch.no_grad():
            policy.transformer.transformer_blocks[0].attn.to_q.weight.mul_(2)
        roll_out(session, plan_iteration(session, [0, 1], 1), 1, config.rollout.suffix)
    assert torch.allclose(converted.scale, 2 * before)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_on_the_hardware_eagerly_and_as_a_graph(family_folders, name):
    family, size = FAMILIES[name], FAMILIES[name].size(32, 96)
    policy = load_policy(
        str(family_folders(name)), dtype="bfloat16", device="cuda", max_sequence_length=20
    )
    reason = obstacle(policy.denoiser())
    if reason:
        pytest.skip(reason)
    made = Float8Copy(policy.denoiser())
    conditioning = family.encoded(policy, [0, 0, 0, 0], size)
    x = torch.randn(
        4,
        *policy.latent_shape(size),
        device="cuda",
        generator=torch.Generator("cuda").manual_seed(0),
    )
    given = {"x": x, "sigma": torch.tensor([0.9, 0.6, 0.4, 0.1], device="cuda"), **conditioning}

    def forward(transformer, x, sigma, **conditioning):
        return (policy.velocity(transformer, x, sigma, conditioning, size, 0.0),)

    def coarse(**inputs):
        return forward(made.transformer, **inputs)

    with torch.no_grad():
        exact, eager = (
            forward(module, **given)[0].float() for module in (policy.denoiser(), made.transformer)
        )
    assert 1e-4 < (eager - exact).norm() / exact.norm() < 0.15
    graphs, notes = cache_of(CudaCapture(), limit_bytes=1 << 30)
    for _ in range(2):
        assert (graphs(coarse, given)[0].float() - eager).norm() <= 2e-2 * eager.norm()
    assert graphs.captures == 1 and not notes
