"""Tiny pipelines of Qwen-Image-Edit: the real diffusers and transformers classes with random
weights."""

import json
from pathlib import Path

import torch
from engine_cases import randomise
from make_pipeline import VISION, qwen_processor

CHANNELS = 4  # of the latents


def edit_pipeline(folder: Path, *, plus=False, zero_cond_t=False, halvings=2, **scheduling) -> Path:
    """halvings: of the VAE. With 5 of them, two more than the real one has, a megapixel is 16 x 16
    tokens.

    zero_cond_t: as in the version of 2511, whose condition tokens are always at time 0.
    """
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageTransformer2DModel,
    )

    torch.manual_seed(0)
    processor = qwen_processor()
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(**scheduling),
        "vae": (
            AutoencoderKLQwenImage(
                base_dim=4,
                z_dim=CHANNELS,
                dim_mult=[1] * (halvings - 1) + [2, 2],
                num_res_blocks=1,
                temperal_downsample=[False] * (halvings - 1) + [True],
                latents_mean=[-0.7, 0.1, 0.5, -0.3],
                latents_std=[2.8, 1.4, 2.3, 1.6],
            ).eval()
        ),
        "text_encoder": randomise(text_encoder(processor.tokenizer), 2).eval(),
        "tokenizer": processor.tokenizer,
        "processor": processor,
        "transformer": randomise(
            QwenImageTransformer2DModel(
                in_channels=4 * CHANNELS,
                out_channels=CHANNELS,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=(4, 6, 6),
                zero_cond_t=zero_cond_t,
            ),
            1,
        ),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {
        name: [type(part).__module__.split(".")[0], type(part).__name__]
        for name, part in parts.items()
    }
    kind = "QwenImageEditPlusPipeline" if plus else "QwenImageEditPipeline"
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": kind, "_diffusers_version": "0.42.1", **index})
    )
    return folder


def text_encoder(tokenizer):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    start, end, image, video = tokenizer.convert_tokens_to_ids(VISION)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "bos_token_id": 0,
                "eos_token_id": 2,
                "pad_token_id": 0,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 3, 3],
                },
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [0],
            },
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
    )
