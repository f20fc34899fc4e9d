"""A tiny QwenImagePipeline: the real diffusers and transformers classes with random weights."""

from pathlib import Path

import torch
from engine_cases import randomise
from make_pipeline import qwen_tokenizer


def qwen_pipeline(folder: Path, **scheduling) -> Path:
    """A QwenImagePipeline: Qwen2.5-VL as text encoder, the video VAE."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    tokenizer, channels = qwen_tokenizer(), 4
    text_encoder = Qwen2_5_VLForConditionalGeneration(
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
            image_token_id=0,
            video_token_id=0,
            vision_start_token_id=0,
            vision_end_token_id=0,
        )
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7, 0.1, 0.5, -0.3],
        latents_std=[2.8, 1.4, 2.3, 1.6],
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduling),
        vae=vae.eval(),
        text_encoder=randomise(text_encoder, 2).eval(),
        tokenizer=tokenizer,
        transformer=randomise(transformer, 1),
    ).save_pretrained(folder)
    return folder
