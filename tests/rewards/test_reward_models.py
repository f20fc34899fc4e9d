"""The neural rewards, on tiny random models saved as their repositories are, against the published
formulas.

Each formula is computed here from the models' own forward, or from the tensors, by the published
procedure.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reward_models import (
    END,
    HEAD_MLP,
    SIZE,
    WIDTH,
    loaded,
    options_of,
    save_hpsv3,
)
from transformers import AutoTokenizer

from tempflow.errors import UserError
from tempflow.rewards import RewardPool, RewardSpec

MEAN, STD = (
    torch.tensor([0.48145466, 0.4578275, 0.40821073]),
    torch.tensor([0.26862954, 0.26130258, 0.27577711]),
)
PROMPTS = ["a cat", "two dogs on a hill", "a cat", "a b " * 60, "a man, 30 years old"]


def pictures(height, width, n=5):
    noise = np.random.default_rng(0).integers(0, 256, (n, 6, 5, 3), np.uint8)
    return np.stack(
        [
            np.array(Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC))
            for x in noise
        ]
    )


def scores(reward, images, prompts=PROMPTS):
    prompts = prompts[: len(images)]
    return torch.from_numpy(reward.score(images, prompts, [{} for _ in prompts]).values)


def cropped(image, half):
    """CLIP's transform: shorter side to SIZE by Pillow's bicubic, centre crop, normalized -> [3,
    SIZE, SIZE]."""
    height, width = image.shape[:2]
    scale = SIZE / min(height, width)
    picture = Image.fromarray(image).resize(
        (int(width * scale + 1e-9), int(height * scale + 1e-9)), Image.Resampling.BICUBIC
    )
    left, top = half(picture.width - SIZE), half(picture.height - SIZE)
    pixels = torch.from_numpy(np.array(picture)[top : top + SIZE, left : left + SIZE]) / 255
    return ((pixels - MEAN) / STD).permute(2, 0, 1)


def clip_outputs(models, images, texts):
    """CLIPModel's own forward, a picture at a time: its embeddings and its similarity times
    exp(logit_scale)."""
    tokenizer = AutoTokenizer.from_pretrained(models["folders"]["clip"])
    rows = []
    with torch.no_grad():
        for image, text in zip(images, texts):
            tokens = tokenizer(
                [text], padding="max_length", truncation=True, max_length=77, return_tensors="pt"
            )
            rows.append(
                models["clip"](
                    pixel_values=cropped(image, lambda margin: margin // 2)[None], **tokens
                )
            )
    return torch.cat([row.image_embeds for row in rows]), torch.cat(
        [row.logits_per_image[0] for row in rows]
    )


@pytest.mark.parametrize("size", [(SIZE, SIZE), (64, 64), (40, 75), (31, 20)])
def test_pickscore(models, size):
    images = pictures(*size)
    expected = clip_outputs(models, images, PROMPTS)[1]
    torch.testing.assert_close(
        scores(loaded(models, "pickscore"), images), expected, rtol=1e-4, atol=1e-3
    )
    assert expected.std() > 1, "the pictures and prompts must differ in score"


@pytest.mark.parametrize("prefix", ["A photo depicts", ""])
def test_clipscore(models, prefix):
    images = pictures(64, 48)
    texts = [f"{prefix} {prompt}".strip() for prompt in PROMPTS]
    cosine = clip_outputs(models, images, texts)[1] / models["clip"].logit_scale.exp()
    assert cosine.min() < 0 < cosine.max()
    result = scores(loaded(models, "clipscore", prefix=prefix), images)
    torch.testing.assert_close(result, 2.5 * cosine.clamp(min=0).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_aesthetic(models, head):
    images, tensors = pictures(64, 48), models[head]
    x = clip_outputs(models, images, PROMPTS)[0]
    for name in HEAD_MLP if head == "mlp" else [""]:
        x = x @ tensors[name + "weight"].T + tensors[name + "bias"]
    path = (
        models["folders"]["linear"]
        if head == "linear"
        else models["folders"]["clip"] / "head.safetensors"
    )
    torch.testing.assert_close(
        scores(loaded(models, "aesthetic", head=str(path)), images), x[:, 0], rtol=1e-4, atol=1e-4
    )


def open_clip_tower(tensors, x, tower, causal):
    """Pre-norm transformer blocks of open_clip, from the tensors alone. x: [length, width]."""
    mask = torch.full((len(x), len(x)), -torch.inf).triu(1) if causal else None
    for i in range(2):
        t = {
            name: tensors[f"{tower}transformer.resblocks.{i}.{name}"]
            for name in (
                "ln_1.weight",
                "ln_1.bias",
                "ln_2.weight",
                "ln_2.bias",
                "attn.in_proj_weight",
                "attn.in_proj_bias",
                "attn.out_proj.weight",
                "attn.out_proj.bias",
                "mlp.c_fc.weight",
                "mlp.c_fc.bias",
                "mlp.c_proj.weight",
                "mlp.c_proj.bias",
            )
        }
        y = F.layer_norm(x, (WIDTH,), t["ln_1.weight"], t["ln_1.bias"])
        y, _ = F.multi_head_attention_forward(
            y[:, None],
            y[:, None],
            y[:, None],
            WIDTH,
            4,
            t["attn.in_proj_weight"],
            t["attn.in_proj_bias"],
            None,
            None,
            False,
            0.0,
            t["attn.out_proj.weight"],
            t["attn.out_proj.bias"],
            training=False,
            attn_mask=mask,
        )
        x = x + y[:, 0]
        y = F.layer_norm(x, (WIDTH,), t["ln_2.weight"], t["ln_2.bias"])
        y = y @ t["mlp.c_fc.weight"].T + t["mlp.c_fc.bias"]
        # the tiny config's activation; the published base's is gelu
        y = y * torch.sigmoid(1.702 * y)
        x = x + y @ t["mlp.c_proj.weight"].T + t["mlp.c_proj.bias"]
    return x


def hps_direct(t, pixels, ids):
    """Cosine of one picture [3, S, S] and one token row, as open_clip computes it."""
    x = F.conv2d(pixels[None], t["visual.conv1.weight"], stride=14).flatten(2)[0].T
    x = torch.cat([t["visual.class_embedding"][None], x]) + t["visual.positional_embedding"]
    x = F.layer_norm(x, (WIDTH,), t["visual.ln_pre.weight"], t["visual.ln_pre.bias"])
    x = open_clip_tower(t, x, "visual.", causal=False)[0]
    image = (
        F.layer_norm(x, (WIDTH,), t["visual.ln_post.weight"], t["visual.ln_post.bias"])
        @ t["visual.proj"]
    )
    x = open_clip_tower(
        t, t["token_embedding.weight"][ids] + t["positional_embedding"][: len(ids)], "", causal=True
    )
    x = F.layer_norm(x, (WIDTH,), t["ln_final.weight"], t["ln_final.bias"])
    return F.cosine_similarity(image, x[-1] @ t["text_projection"], dim=0)


@pytest.mark.parametrize("size", [(SIZE, SIZE), (64, 64), (40, 75), (75, 40)])
def test_hpsv2(models, size):
    """Published weights by open_clip's names, against open_clip's computation; the longer side
    fits, the rest is black."""
    images = pictures(*size)
    tokenizer = AutoTokenizer.from_pretrained(models["folders"]["hps_base"])
    expected = []
    for image, prompt in zip(images, PROMPTS):
        scale = SIZE / max(size)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        new = (round(size[0] * scale), round(size[1] * scale))
        if scale != 1:
            pixels = F.interpolate(pixels, new, mode="bicubic", antialias=True)
        canvas = torch.zeros(3, SIZE, SIZE)
        top, left = (SIZE - new[0]) // 2, (SIZE - new[1]) // 2
        canvas[:, top : top + new[0], left : left + new[1]] = pixels[0]
        ids = tokenizer(prompt, truncation=True, max_length=77)["input_ids"]
        ids = ids[: ids.index(END) + 1]  # to the end-of-text
        expected.append(
            hps_direct(
                models["hps"],
                (canvas - MEAN[:, None, None]) / STD[:, None, None],
                torch.tensor(ids),
            )
        )
    torch.testing.assert_close(
        scores(loaded(models, "hpsv2"), images), torch.stack(expected), rtol=1e-4, atol=1e-5
    )


def test_hpsv2_in_transformers_layout(models):
    """A converted copy scores as a CLIPModel does."""
    folder = str(models["folders"]["clip"])
    images = pictures(SIZE, SIZE)
    result = scores(
        loaded(models, "hpsv2", path=f"{folder}/model.safetensors", base=folder), images
    )
    expected = clip_outputs(models, images, PROMPTS)[1] / models["clip"].logit_scale.exp()
    torch.testing.assert_close(result, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(SIZE, SIZE), (64, 96), (35, SIZE)])
def test_imagereward(models, size):
    """Prompt padded to 35 as published; the score does not depend on the padding."""
    images, (vision, text, head) = pictures(*size), models["imagereward"]
    tokenizer = AutoTokenizer.from_pretrained(models["folders"]["imagereward"])
    expected = []
    with torch.no_grad():
        for image, prompt in zip(images, PROMPTS):
            tokens = tokenizer(
                prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
            )
            seen = vision(
                pixel_values=cropped(image, lambda margin: round(margin / 2))[None]
            ).last_hidden_state
            read = text(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2]),
            ).last_hidden_state[:, 0]
            for i in (0, 2):
                read = read @ head[f"mlp.layers.{i}.weight"].T + head[f"mlp.layers.{i}.bias"]
            expected.append((read[0, 0] - 0.16717362830052426) / 1.0333394966054072)
    assert len({round(float(x), 4) for x in expected}) == len(expected)
    torch.testing.assert_close(
        scores(loaded(models, "imagereward"), images), torch.stack(expected), rtol=1e-4, atol=1e-4
    )


def hpsv3_direct(model, head, tokenizer, image, prompt, new):
    """The published forward: embeddings with the picture's put in, no position ids, head at the
    reward token."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from tempflow.rewards.neural.hpsv3 import INSTRUCTION

    picture = Image.fromarray(image).resize(new, Image.Resampling.BICUBIC)
    # its own resizing finds nothing to do
    seen = Qwen2VLImageProcessorPil()([picture], return_tensors="pt")
    count = new[0] * new[1] // 28**2
    text = (
        "<|im_start|>system\nYou are a helpful"
        " assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * count
        + "<|vision_end|>"
        + INSTRUCTION.format(prompt=prompt)
        + "\nPlease provide the overall ratings of this image:"
        " <|Reward|>\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer([text], return_tensors="pt").input_ids
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        visual = model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output
        is_image = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>"))[..., None].expand_as(
            embeddings
        )
        hidden = model(
            inputs_embeds=embeddings.masked_scatter(is_image, visual),
            attention_mask=torch.ones_like(ids),
        ).last_hidden_state
        x = hidden[0, ids[0].tolist().index(tokenizer.convert_tokens_to_ids("<|Reward|>"))]
        return head[2](F.relu(head[1](F.relu(head[0](x)))))[0]


@pytest.mark.parametrize("size, new", [((64, 64), (448, 448)), ((300, 640), (672, 308))])
def test_hpsv3(models, size, new):
    """new: width and height of about 256 x 28 x 28 pixels in steps of 28, worked out by hand."""
    model, head, tokenizer = models["hpsv3"]
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    images = pictures(*size, n=2)
    expected = [
        hpsv3_direct(model, head, tokenizer, image, prompt, new)
        for image, prompt in zip(images, PROMPTS)
    ]
    torch.testing.assert_close(
        scores(loaded(models, "hpsv3"), images), torch.stack(expected), rtol=1e-4, atol=1e-4
    )


def test_hpsv3_older_tensor_names(tmp_path, models):
    (tmp_path / "base").mkdir()
    save_hpsv3(tmp_path / "base", tmp_path, legacy=True)
    images = pictures(64, 64, n=1)
    older = loaded(models, "hpsv3", path=str(tmp_path), base=str(tmp_path / "base"))
    assert torch.equal(scores(older, images), scores(loaded(models, "hpsv3"), images))


@pytest.mark.parametrize(
    "name, n",
    [
        ("pickscore", 5),
        ("clipscore", 5),
        ("hpsv2", 5),
        ("aesthetic", 5),
        ("imagereward", 5),
        ("hpsv3", 2),
    ],
)
def test_batches_do_not_matter(models, name, n):
    """A picture's score depends on itself and its prompt alone, however it is batched."""
    images, reward = pictures(64, 48, n), loaded(models, name)
    whole = scores(reward, images)
    alone = torch.cat([scores(reward, images[i : i + 1], PROMPTS[i : i + 1]) for i in range(n)])
    split = scores(loaded(models, name, batch_size=2), images)
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole, split, rtol=1e-4, atol=1e-4)
    assert scores(reward, images[:0], []).shape == (0,)


@pytest.mark.parametrize("name", ["pickscore", "imagereward"])
def test_low_precision_keeps_the_order(models, name):
    images = pictures(64, 64)
    exact, low = (
        scores(loaded(models, name), images),
        scores(loaded(models, name, dtype="bfloat16"), images),
    )
    torch.testing.assert_close(low, exact, rtol=0, atol=0.15 * float(exact.std()))
    assert not torch.equal(low, exact)


def test_in_a_worker_process(models):
    """Two rewards in one worker give what they give here."""
    names, images = ["pickscore", "imagereward"], pictures(64, 64)
    specs = [RewardSpec(name, 1.0, options_of(models, name)) for name in names]
    with RewardPool(specs, workers=1, timeout_s=120) as pool:
        (result,) = pool.gather([pool.submit(images, PROMPTS, [{}] * len(images))])
    for name in names:
        torch.testing.assert_close(
            torch.from_numpy(result[name].values),
            scores(loaded(models, name), images),
            rtol=1e-5,
            atol=1e-5,
        )
    assert pool.failures == 0


def test_cuda_without_a_gpu(models, monkeypatch):
    """The worker is shown the GPU of its rank, and says so where there is none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1,-1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    spec = RewardSpec("pickscore", 1.0, {**options_of(models, "pickscore"), "device": "cuda"})
    with (
        RewardPool([spec], workers=1) as pool,
        pytest.raises(UserError, match="rewards.pickscore.device.*no GPU.*'-1'.*\"cpu\""),
    ):
        pool.wait_ready()


@pytest.mark.gpu
def test_on_the_gpu(models):
    images = pictures(64, 64)
    spec = RewardSpec("pickscore", 1.0, {**options_of(models, "pickscore"), "device": "cuda"})
    with RewardPool([spec], workers=1) as pool:
        (result,) = pool.gather([pool.submit(images, PROMPTS, [{}] * len(images))])
    there = torch.from_numpy(result["pickscore"].values)
    torch.testing.assert_close(
        there, scores(loaded(models, "pickscore"), images), rtol=1e-3, atol=1e-2
    )
