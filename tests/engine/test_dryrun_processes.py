"""What the dry run counts on a GPU beside the training's own tensors: contexts, and reward models
in the pool's workers."""

import io
import sys

import pytest
import torch
from engine_cases import HERE, small_config
from rich.console import Console

from tempflow.estimate import estimate, show
from tempflow.estimate.processes import CONTEXT, PARAMETERS, WORKSPACES, process_items

sys.path.append(str(HERE.parent / "rewards"))


def scored(rewards, workers=1):
    return process_items(small_config(rewards=rewards, reward_pool={"workers": workers}))


def test_a_run_without_models_on_the_gpu_has_one_context():
    items, unknown = scored({"jpeg": 1.0, "pickscore": {"dtype": "float16"}}, workers=4)
    assert [item.bytes for item in items] == [CONTEXT + WORKSPACES] and unknown == []


@pytest.mark.parametrize("workers, contexts, copies", [(0, 0, 1), (1, 1, 1), (3, 3, 3)])
def test_each_worker_has_a_context_and_a_copy(workers, contexts, copies):
    """None of its own where the training process scores."""
    items, _ = scored(
        {
            "pickscore": {"device": "cuda", "dtype": "float16"},
            "clipscore": {"device": "cuda", "weight": 0},
        },
        workers,
    )
    own, workers_contexts, pickscore, clipscore = (item.bytes for item in items)
    assert workers_contexts == contexts * CONTEXT
    assert pickscore == copies * 2 * PARAMETERS["yuvalkirstain/PickScore_v1"]
    assert clipscore == copies * 4 * PARAMETERS["openai/clip-vit-large-patch14"]


def test_a_model_on_this_machine_is_measured(tmp_path):
    from reward_models import save_clip

    elements = sum(p.numel() for p in save_clip(tmp_path).parameters())
    items, unknown = scored(
        {"pickscore": {"device": "cuda", "path": str(tmp_path), "dtype": "bfloat16"}}
    )
    assert items[-1].bytes == 2 * elements and not unknown


def tune(images, prompts, metadata, device: str = "cpu"):
    return images.mean((1, 2, 3))


def test_what_is_unknown_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_rewards", sys.modules[__name__])
    rewards = {
        "my_rewards:tune": {"device": "cuda"},
        "hpsv3": {"device": "cuda", "path": "someone/else"},
    }
    result = estimate(small_config(rewards=rewards, reward_pool={"workers": 2}))
    assert result.memory.unknown == ["my_rewards:tune", "hpsv3"]
    out = io.StringIO()
    show(result, Console(file=out, width=140))
    assert "Not counted: the model of reward my_rewards:tune" in out.getvalue()
    assert "reward workers: 2 CUDA contexts" in out.getvalue()


def test_sizes_of_the_published_models():
    """Against transformers' classes, made as their repositories' configs describe them."""
    from transformers import (
        BlipConfig,
        BlipVisionModel,
        CLIPConfig,
        CLIPModel,
        Qwen2VLConfig,
        Qwen2VLModel,
    )
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    from tempflow.rewards.neural.imagereward import ARCHITECTURE

    def clip(width, text, vision, heads, layers):
        text = {
            "hidden_size": text,
            "intermediate_size": 4 * text,
            "num_hidden_layers": layers[0],
            "num_attention_heads": heads[0],
        }
        vision = {
            "hidden_size": vision,
            "intermediate_size": 4 * vision,
            "num_hidden_layers": layers[1],
            "num_attention_heads": heads[1],
        }
        return CLIPConfig(
            projection_dim=width,
            text_config=text,
            vision_config={**vision, "patch_size": 14, "image_size": 224},
        )

    qwen = Qwen2VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 151658,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": 3584,
            "num_heads": 16,
            "mlp_ratio": 4,
            "patch_size": 14,
        },
    )
    blip = BlipConfig.from_dict(ARCHITECTURE)
    with torch.device("meta"):
        huge, large = (
            CLIPModel(clip(*shape))
            for shape in (
                (1024, 1024, 1280, (16, 16), (24, 32)),
                (768, 768, 1024, (12, 16), (12, 24)),
            )
        )
        towers = [
            BlipVisionModel(blip.vision_config),
            BlipTextModel(blip.text_config, add_pooling_layer=False),
        ]
        counts = [
            sum(p.numel() for module in modules for p in module.parameters())
            for modules in ([Qwen2VLModel(qwen)], towers, [huge], [large], [huge])
        ]
    assert dict(zip(PARAMETERS, counts, strict=True)) == PARAMETERS
