"""A tiny StableDiffusion3Pipeline: the real diffusers and transformers classes with random
weights."""

from pathlib import Path

import torch
from engine_cases import randomise


def sd3_pipeline(folder: Path, **scheduling) -> Path:
    """A StableDiffusion3Pipeline like SD3.5-M's: two CLIPs and T5, and a block with the second
    attention; pictures to 128 x 128."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    import tiny_flux

    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = tiny_flux.new_tokenizers()
    size = len(clip_tokenizer)
    _, t5 = tiny_flux.new_text_encoders(size, len(t5_tokenizer))
    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=size,
                hidden_size=width,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
                projection_dim=width,
                bos_token_id=size - 2,
                eos_token_id=size - 1,
                pad_token_id=size - 1,
            )
        ).eval()
        for width in (24, 32)
    ]
    vae = tiny_flux.new_vae()
    vae.register_to_config(scaling_factor=0.7, shift_factor=0.2)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=tiny_flux.LATENT_CHANNELS,
        out_channels=tiny_flux.LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=24 + 32,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    StableDiffusion3Pipeline(
        transformer=randomise(transformer, 1),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduling),
        vae=vae,
        text_encoder=clips[0],
        tokenizer=clip_tokenizer,
        text_encoder_2=clips[1],
        tokenizer_2=clip_tokenizer,
        text_encoder_3=t5.eval(),
        tokenizer_3=t5_tokenizer,
    ).save_pretrained(folder)
    return folder
