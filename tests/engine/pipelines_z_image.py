"""A tiny ZImagePipeline: the real diffusers and transformers classes with random weights."""

from pathlib import Path

import torch
from chat_tokenizers import klein_tokenizer
from engine_cases import randomise

CHANNELS = 4  # of the VAE


def z_image_pipeline(folder: Path, **scheduling) -> Path:
    """A ZImagePipeline: Qwen3 as text encoder, whose chat template fills captions of PROMPTS up to
    32 and 64 tokens."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        ZImagePipeline,
        ZImageTransformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    tokenizer, width = klein_tokenizer(), 16
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=512,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=width,
        axes_dims=[4, 6, 6],
        axes_lens=[600, 32, 32],
    )
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduling),
        vae=vae.eval(),
        text_encoder=randomise(text_encoder, 2).eval(),
        tokenizer=tokenizer,
        transformer=randomise(transformer, 1),
    ).save_pretrained(folder)
    return folder
