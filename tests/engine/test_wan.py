"""Wan 2.1 and 2.2 against plain diffusers: grids, guidance, frames, and the two experts of Wan
2.2."""

import copy
import json

import numpy as np
import pytest
import torch
from engine_cases import Iteration, examples, small_config
from family_cases import FAMILIES, FP32, NEGATIVES, PROMPTS
from kernel_cases import assert_close
from pipelines_wan import FIRST_ORDER, unipc, wan_pipeline
from test_gpu_families import check_graphs
from test_graphs import Recorded

from tempflow.data.prompts import load_prompts
from tempflow.errors import UserError
from tempflow.models import (
    check_checkpoint,
    check_guidance,
    check_size,
    family_of,
    index_rows,
    load_denoiser,
    load_policy,
    wan_experts,
)
from tempflow.types import Example, Scales, Size

KINDS = {
    "euler": {"shift": 3.0},
    "unipc": {"by_unipc": FIRST_ORDER},
    "experts": {"by_unipc": FIRST_ORDER, "experts": True},
    "small_vae": {"small_vae": True, "shift": 5.0},
}
SIZES = [Size(32, 96, 5), Size(64, 64, 1)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A policy, and diffusers' own pipeline loaded apart."""
    from diffusers import WanPipeline

    made, root = {}, tmp_path_factory.mktemp("wan")

    def get(kind):
        if kind not in made:
            folder = wan_pipeline(root / kind, **KINDS[kind])
            pipe = WanPipeline.from_pretrained(folder)
            pipe.set_progress_bar_config(disable=True)
            made[kind] = load_policy(folder), pipe
        return made[kind]

    return get


def latents_for(policy, size, count=2):
    return torch.randn(
        count, *policy.latent_shape(size), generator=torch.Generator().manual_seed(0)
    )


def called(size, **more):
    """Arguments of a pipeline's call, and of `Policy.sample`."""
    given = {"height": size.height, "width": size.width}
    return {**given, "num_frames": size.frames, **more}, {**given, "frames": size.frames, **more}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 4.5])
# the others are in the table of families
@pytest.mark.parametrize("kind", ["experts", "small_vae"])
def test_sample_equals_the_pipeline(pairs, kind, size, scale):
    policy, pipe = pairs(kind)
    x = latents_for(policy, size)
    theirs, mine = called(size, guidance_scale=scale)
    negatives = {} if scale == 1.0 else {"negative_prompt": NEGATIVES}
    expected = pipe(
        PROMPTS,
        latents=x.clone(),
        output_type="latent",
        num_inference_steps=4,
        **negatives,
        **theirs,
    ).frames
    got = policy.sample(
        PROMPTS,
        latents=x,
        decode=False,
        num_steps=4,
        negative_prompts=negatives.get("negative_prompt"),
        **mine,
    )
    assert got.dtype == torch.float32
    assert_close("latents", got, expected, FP32)
    assert (got - x).norm() > 0.1 * x.norm(), "the model does something"


def test_frames_of_the_small_vae_equal_the_pipelines(pairs):
    policy, pipe = pairs("small_vae")
    size = Size(32, 96, 5)
    x = latents_for(policy, size, 1)
    theirs, mine = called(size, guidance_scale=1.0)
    expected = pipe(
        PROMPTS[:1], latents=x.clone(), num_inference_steps=2, output_type="pil", **theirs
    ).frames[0]
    (got,) = policy.sample(PROMPTS[:1], latents=x, num_steps=2, **mine)
    assert len(got) == 5 and got[0].size == (96, 32)
    difference = np.stack(got).astype(int) - np.stack(expected)
    assert np.abs(difference).max() <= 1 and np.stack(expected).std() > 1


def test_guidance_and_negative_prompts_matter(pairs):
    policy, _ = pairs("experts")
    _, mine = called(Size(32, 96, 5), num_steps=3, decode=False)
    runs = [
        policy.sample(
            PROMPTS,
            latents=latents_for(policy, Size(32, 96, 5)),
            guidance_scale=scale,
            negative_prompts=negatives,
            **mine,
        )
        for scale, negatives in (
            (1.0, NEGATIVES),
            (4.5, None),
            (4.5, NEGATIVES),
            (4.5, NEGATIVES[::-1]),
        )
    ]
    for i, one in enumerate(runs):
        assert (one[0] - one[1]).norm() > 0.1
        for another in runs[:i]:
            assert (one - another).norm() > 1e-3 * one.norm()


# -------------------------------------------------------------------------------------------- grids
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
# 9 and 27 divide 999: UniPC's timesteps are whole numbers or a rounding below
@pytest.mark.parametrize("steps", [2, 9, 27, 50])
def test_unipc_gives_its_grid_and_whole_timesteps(pairs, steps, shift):
    policy, _ = pairs("unipc")
    policy = copy.copy(policy)
    policy.pipe = copy.copy(policy.pipe)
    policy.pipe.scheduler = unipc(flow_shift=shift)
    sigmas = policy.sigmas(steps, Size(32, 96, 5))
    scheduler = unipc(flow_shift=shift)
    scheduler.set_timesteps(steps)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    assert (sigmas - scheduler.sigmas).abs().max() < 2e-6
    assert torch.equal(policy._timesteps(sigmas[:-1]).long(), scheduler.timesteps)


def test_unipc_of_second_order_is_another_solver(pairs, tmp_path):
    """What its user is told: the grid is the folder's, the solver is not."""
    from diffusers import UniPCMultistepScheduler

    policy, pipe = pairs("unipc")
    x = latents_for(policy, Size(32, 96, 5))
    theirs, mine = called(Size(32, 96, 5), guidance_scale=1.0)
    got = policy.sample(PROMPTS, latents=x, decode=False, num_steps=4, **mine)
    first = pipe.scheduler
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        first.config, solver_order=2, disable_corrector=[]
    )
    other = pipe(
        PROMPTS, latents=x.clone(), output_type="latent", num_inference_steps=4, **theirs
    ).frames
    pipe.scheduler = first
    assert (got - other).norm() > 1e-2 * got.norm()


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"prediction_type": "epsilon"},
            "prediction_type to 'epsilon'; only 'flow_prediction' is allowed",
        ),
        ({"use_flow_sigmas": False}, "does not describe a UniPCMultistepScheduler"),
        ({"thresholding": True}, "sets thresholding"),
        ({"final_sigmas_type": "sigma_min"}, "falls from 1 to 0"),
    ],
)
def test_a_unipc_that_is_no_euler_is_refused(tmp_path, options, words):
    with pytest.raises(UserError, match=f"model.path: scheduler: .*{words}"):
        check_checkpoint(wan_pipeline(tmp_path / "wan", options))


def test_dynamic_shifting_is_refused(tmp_path):
    policy = load_policy(wan_pipeline(tmp_path / "wan", use_dynamic_shifting=True))
    with pytest.raises(UserError, match="use_dynamic_shifting"):
        policy.sigmas(4, Size(32, 96, 5))


# ------------------------------------------------------------------------------------- sizes, texts
@pytest.mark.parametrize("kind, multiple", [("euler", 16), ("small_vae", 32)])
def test_sizes(pairs, kind, multiple):
    policy, pipe = pairs(kind)
    assert policy.latent_shape(Size(64, 96, 13)) == (4, 4, 128 // multiple, 192 // multiple)
    for size, words in (
        (Size(64 + multiple // 2, 96, 5), f"both must be multiples of {multiple}"),
        (Size(64, 96, 4), "one frame more than a multiple of 4, such as 1 or 5"),
    ):
        for call in (policy.latent_shape, lambda size: check_size(pipe.config._name_or_path, size)):
            with pytest.raises(UserError, match=words):
                call(size)


def test_text_is_padded_to_the_pipelines_length_and_cleaned(pairs):
    policy, pipe = pairs("euler")
    embedded = policy.embed([Example(" a  &amp;  cat\n"), Example("a & cat")])[
        "encoder_hidden_states"
    ]
    assert embedded.shape == (2, 512, 32) and torch.equal(embedded[0], embedded[1])
    assert (
        policy.identity(Example(" a  &amp;  cat\n"))
        == policy.identity(Example("a & cat"))
        == ("a & cat",)
    )
    assert_close(
        "text",
        embedded[:1],
        pipe.encode_prompt(["a & cat"], max_sequence_length=512)[0].detach(),
        FP32,
    )


# ------------------------------------------------------------------------------------------ experts
def test_the_boundary_parts_the_rows(pairs):
    """Every row is what its own expert alone makes of it, in any order and with guidance, also
    where the host says whose it is."""
    policy, pipe = pairs("experts")
    sigma = torch.tensor([0.5, 0.9, 0.875, 0.8749, 1.0])
    size, x = Size(32, 96, 5), latents_for(policy, Size(32, 96, 5), 5)
    conditioning = index_rows(policy.encode(examples(PROMPTS)), [0, 1, 1, 0, 1])
    with torch.no_grad():
        together = policy.velocity(policy.denoiser(), x, sigma, conditioning, size, 4.5)
        plain = policy.velocity(policy.denoiser(), x, sigma, conditioning, size, 1.0)
        told = policy.only(policy.denoiser(), [policy.expert(level) for level in sigma.tolist()])
        for scale, v in ((4.5, together), (1.0, plain)):
            assert torch.equal(policy.velocity(told, x, sigma, conditioning, size, scale), v)
        for n, expert in enumerate(
            (
                pipe.transformer_2,
                pipe.transformer,
                pipe.transformer,
                pipe.transformer_2,
                pipe.transformer,
            )
        ):
            timestep = torch.tensor([min(int(1000 * sigma[n].item() + 1e-3), 999)])
            positive, negative = (
                expert(x[n : n + 1], timestep, conditioning[name][n : n + 1], return_dict=False)[0]
                for name in ("encoder_hidden_states", "negative_encoder_hidden_states")
            )
            assert_close(f"row {n}", plain[n : n + 1], positive, FP32)
            assert_close(
                f"row {n}, guided",
                together[n : n + 1],
                negative + 4.5 * (positive - negative),
                FP32,
            )


@pytest.mark.parametrize("first, second", [(4.5, 2.0), (3.0, 1.0), (1.0, 4.5)])
def test_each_expert_has_its_guidance(pairs, first, second):
    policy, pipe = pairs("experts")
    x = latents_for(policy, SIZES[0])
    theirs, mine = called(SIZES[0])
    theirs |= {"guidance_scale": first, "guidance_scale_2": second}
    expected = pipe(
        PROMPTS, latents=x.clone(), output_type="latent", num_inference_steps=5, **theirs
    ).frames
    got = policy.sample(
        PROMPTS, latents=x, num_steps=5, decode=False, guidance_scale=Scales(first, second), **mine
    )
    assert_close("latents", got, expected, FP32)
    same = policy.sample(
        PROMPTS, latents=x, num_steps=5, decode=False, guidance_scale=first, **mine
    )
    assert ((got - same).norm() > 1e-3 * got.norm()) == (first > 1)


def test_a_second_guidance_scale_needs_a_second_expert(pairs):
    config = small_config(rollout={"guidance_scale": 4.0, "guidance_scale_2": 3.0})
    assert (config.rollout.scale, config.rollout.scale.second, config.eval_guidance().second) == (
        4.0,
        3.0,
        3.0,
    )
    check_guidance(pairs("experts")[1].config._name_or_path, 3.0)
    with pytest.raises(UserError, match="rollout.guidance_scale_2: 3, but .* has one transformer"):
        check_guidance(pairs("unipc")[1].config._name_or_path, 3.0)


def test_experts_are_one_module(pairs):
    policy, pipe = pairs("experts")
    again = load_denoiser(pipe.config._name_or_path, torch.float32)
    assert {name.split(".")[0] for name, _ in again.named_parameters()} == {
        "transformer",
        "transformer_2",
    }
    for name, weight in policy.denoiser().named_parameters():
        assert torch.equal(weight, dict(again.named_parameters())[name])
    policy.set_denoiser(again)
    assert policy.denoiser() is again and policy.pipe.transformer_2 is again.transformer_2
    assert isinstance(
        load_denoiser(pairs("euler")[1].config._name_or_path, torch.float32), type(pipe.transformer)
    )


@pytest.mark.parametrize("sigma", [[0.9, 0.95], [0.2, 0.5], [0.9, 0.5]])
def test_every_weight_has_a_gradient_in_training(pairs, sigma):
    """Zero, and not none, where no row is the expert's; the loss is that of the rows alone."""
    policy, _ = pairs("experts")
    module, size = copy.deepcopy(policy.denoiser()).train().requires_grad_(True), Size(32, 96, 5)
    conditioning = policy.encode(examples(PROMPTS))
    v = policy.velocity(
        module, latents_for(policy, size), torch.tensor(sigma), conditioning, size, 1.0
    )
    assert v.shape == (2, *policy.latent_shape(size))
    v.square().sum().backward()
    used = {"transformer" if level >= 0.875 else "transformer_2" for level in sigma}
    for name, weight in module.named_parameters():
        assert (weight.grad.norm() > 0) == (name.split(".")[0] in used), name


def test_a_boundary_without_a_second_expert_is_refused(tmp_path):
    folder = wan_pipeline(tmp_path / "wan")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.875}))
    with pytest.raises(
        UserError, match="model_index.json names no transformer_2, which WanPipeline needs"
    ):
        load_policy(folder)
    assert family_of(folder).denoiser_parts(index) == ("transformer",)


# ----------------------------------------------------------------------------------------- rollouts
def test_a_captured_rollout_knows_its_experts(pairs, tmp_path, monkeypatch):
    """Nothing asks the rows' noise levels, which would make the host wait; the states are those of
    eager batches."""
    policy, pipe = pairs("experts")
    assert [policy.expert(sigma) for sigma in (1.0, 0.875, 0.8749, 0.1)] == [0, 0, 1, 1]
    assert pairs("unipc")[0].expert(0.1) == 0
    read = wan_experts._read
    monkeypatch.setattr(
        wan_experts,
        "_read",
        lambda low, rows: read(low, rows) if isinstance(low, bool) else pytest.fail("it waits"),
    )
    check_graphs(
        pipe.config._name_or_path, tmp_path, FAMILIES["wan"], "float32", "cpu", Recorded(nbytes=1)
    )


def test_a_rollout_with_two_experts_is_its_replay(pairs):
    """Every state's velocity in the rollout, in batches of one expert, is that of a mixed batch as
    training has it."""
    policy, pipe = pairs("experts")
    config = small_config(
        model={"path": str(pipe.config._name_or_path)},
        rollout={
            "height": 32,
            "width": 32,
            "frames": 5,
            "num_steps": 4,
            "plan": {"branch_steps": [0, 2]},
            "micro_batch": 4,
            "guidance_scale": 2.0,
        },
        rewards=FAMILIES["wan"].rewards,
    )
    states = Iteration(policy, config).rolled.kept.states
    assert {policy.expert(state.sigma) for state in states} == {0, 1}
    prompts = [state.unit.prompt_id for state in states]
    words = load_prompts(config.data.train)
    conditioning = policy.encode([words[n] for n in prompts])
    x, sigma = (
        torch.stack([state.x for state in states]),
        torch.tensor([state.sigma for state in states]),
    )
    with torch.no_grad():
        v = policy.velocity(policy.denoiser(), x, sigma, conditioning, config.rollout.size, 2.0)
    for n, state in enumerate(states):
        mean = state.a * state.x + state.b * v[n]
        score = -((state.children - mean) ** 2).flatten(1).mean(1) / (2 * state.tau**2)
        assert_close(
            f"state {n}", score - score.mean(), state.log_prob - state.log_prob.mean(), 1e-4
        )
