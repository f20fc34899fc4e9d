"""What only Z-Image has: captions of any length, filled up to a multiple of 32 tokens by the model,
and guidance from a scale of 0 on."""

import json

import pytest
import torch
from engine_cases import examples
from family_cases import FP32
from kernel_cases import assert_close
from ragged_policy import Sharded
from run_cases import SGD, train

from tempflow.errors import UserError
from tempflow.models import by_shape, load_denoiser, load_policy
from tempflow.training.micro_batches import _conditioning
from tempflow.types import Size

PROMPTS = [
    "a",
    "a word, and then another " * 2,
    "b",
    "q" * 24,
    "q" * 25,
    "longer than a hundred tokens " * 5,
]
NEGATIVES = ["", "", "blurred, with a longer negative prompt", "", "", "bad"]


@pytest.fixture(scope="module")
def pair(family_pairs):
    return family_pairs("z_image")


def latents_for(policy, count, size):
    return torch.randn(
        count, *policy.latent_shape(size), generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize(
    "guidance, negatives", [(0.0, None), (1.0, None), (4.0, NEGATIVES)], ids=str
)
def test_captions_of_any_length_equal_the_pipeline(pair, guidance, negatives):
    """The pipeline forwards all of them in one batch, with a mask; here those of each length go
    together. 40 x 56: image tokens are filled up, too."""
    policy, pipe = pair
    size, more = Size(40, 56), {"negative_prompt": list(negatives)} if negatives else {}
    x, given = latents_for(policy, len(PROMPTS), size), list(PROMPTS)
    got = policy.sample(
        given,
        latents=x,
        height=40,
        width=56,
        num_steps=3,
        guidance_scale=guidance,
        negative_prompts=negatives,
        decode=False,
    )
    assert given == PROMPTS, "the pipeline's own function overwrites the list that it is given"
    call = {
        "height": 40,
        "width": 56,
        "num_inference_steps": 3,
        "guidance_scale": guidance,
        "output_type": "latent",
    }
    assert_close("latents", got, pipe(given, latents=x.clone(), **call, **more).images, FP32)


def test_guidance_in_one_forward(pair):
    """As through an engine of ZeRO-3: captions of two lengths, which the transformer masks."""
    policy, _ = pair
    size, conditioning = Size(32, 48), policy.encode(examples([PROMPTS[-1]], ["short"]))
    x, sigma = latents_for(policy, 1, size), torch.tensor([0.6])
    apart = policy.velocity(policy.denoiser(), x, sigma, conditioning, size, 3.0)
    assert_close(
        "velocity",
        policy.velocity(Sharded(policy.denoiser()), x, sigma, conditioning, size, 3.0),
        apart,
        FP32,
    )


def test_prompts_share_a_forward_up_to_a_multiple_of_32(pair):
    policy, pipe = pair
    conditions = policy.encode_each(examples(PROMPTS, NEGATIVES))
    tokens = [
        len(pipe.encode_prompt([text], do_classifier_free_guidance=False)[0][0]) for text in PROMPTS
    ]
    assert tokens[3:5] == [32, 33] and tokens[-1] > 96
    assert [conditions.rows([n])["caption"].shape[1] for n in range(6)] == [
        -(-length // 32) * 32 for length in tokens
    ]
    assert by_shape(conditions.shapes)[0] == [0, 3], "and where their negative prompts do"
    filled = conditions.rows([4])["filled"][0]
    assert filled.dtype == torch.bool and (~filled).sum() == 33 and not filled[:33].any()


def test_what_fills_a_caption_up_is_the_models_own(pair):
    """The learned token is attended to: the embeddings there do not matter, that they are there
    does."""
    policy, _ = pair
    size, conditioning = Size(32, 32), policy.encode(examples(["a"]))
    x, sigma = latents_for(policy, 1, size), torch.tensor([0.7])

    def velocity(**changes):
        return policy.velocity(policy.denoiser(), x, sigma, conditioning | changes, size, 0.0)

    filled = conditioning["filled"][..., None]
    other = torch.where(filled, torch.randn(conditioning["caption"].shape), conditioning["caption"])
    assert torch.equal(velocity(), velocity(caption=other))
    shorter = {
        "caption": conditioning["caption"],
        "filled": torch.zeros_like(conditioning["filled"]),
    }
    assert (velocity() - velocity(**shorter)).norm() > 1e-3 * velocity().norm()


def test_the_longest_prompt_stands_for_all(pair, family_folders):
    """In the dry run, and where sizes are measured at the start."""
    policy = load_policy(str(family_folders("z_image")), max_sequence_length=40)
    longest = policy.empty_conditioning(3)
    assert longest["caption"].shape == longest["negative_caption"].shape == (3, 64, 16) and longest[
        "filled"
    ].shape == (3, 64)
    session = type("Session", (), {"policy": policy})
    assert (
        policy.velocity(
            policy.denoiser(),
            latents_for(policy, 3, Size(32, 32)),
            torch.ones(3),
            _conditioning(session, [0] * 3),
            Size(32, 32),
            3.0,
        )
        .isfinite()
        .all()
    )


def test_a_size_beyond_the_position_embedding(pair):
    policy, _ = pair
    assert policy.latent_shape(Size(256, 64)) == (4, 64, 16)
    with pytest.raises(
        UserError,
        match="rollout.height, rollout.width: 264 x 64; this model makes at most 256 x 256",
    ):
        policy.latent_shape(Size(264, 64))


@pytest.mark.slow
def test_two_sharded_ranks_learn_what_one_does(family_folders, tmp_path):
    """An iteration of four prompts of three shapes, of which each rank has others: under ZeRO-3 a
    forward more on one of them would leave the other waiting. Guided, with the penalty, evaluated
    before and after."""
    lines = [{"prompt": text} for text in ("a", "b" * 40, "c" * 90, "d")]
    lines[3]["negative_prompt"] = "e" * 50
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    one, two = (
        train(
            tmp_path,
            f"ranks-{processes}",
            processes=processes,
            model={"path": str(family_folders("z_image")), "max_sequence_length": 128},
            data={name: str(tmp_path / "prompts.jsonl") for name in ("train", "heldout")}
            | {"prompts_per_iteration": 4},
            rollout={
                **{
                    "height": 32,
                    "width": 32,
                    "num_steps": 3,
                    "guidance_scale": 2.0,
                    "micro_batch": 4,
                },
                "plan": {"seeds": 1, "branch_steps": [0, 1]},
            },
            training={
                "iterations": 1,
                "micro_batch": 4,
                "penalty": {"coef": 0.1},
                "updates": {"passes": 2},
            },
            eval={"every": 1, "prompts": 4},
            deepspeed=SGD
            | (
                {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
                if processes
                else {}
            ),
        )
        for processes in (None, 2)
    )
    base = load_denoiser(str(family_folders("z_image")), torch.float32).state_dict()
    moved, other = (
        {name: weight - base[name] for name, weight in run.weights().items()} for run in (one, two)
    )
    assert moved.keys() == other.keys()
    joined = torch.cat([tensor.flatten() for tensor in moved.values()])
    assert_close("updates", torch.cat([other[name].flatten() for name in moved]), joined, 1e-4)
    assert joined.norm() > 0
    assert two.rows[-1]["eval/reward"] == pytest.approx(one.rows[-1]["eval/reward"], abs=1e-3)
