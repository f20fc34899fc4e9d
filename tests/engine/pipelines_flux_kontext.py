"""A tiny FluxKontextPipeline: the real diffusers and transformers classes with random weights."""

from pathlib import Path

import torch
from engine_cases import randomise

CHANNELS = 4  # of the latents


def kontext_pipeline(folder: Path, *, guidance_embeds=True, halvings=2, **scheduling) -> Path:
    """halvings: of the VAE. With 5 of them, two more than the real one has, a megapixel is 16 x 16
    tokens."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxKontextPipeline,
        FluxTransformer2DModel,
    )

    import tiny_flux

    torch.manual_seed(0)
    tokenizer, tokenizer_2 = tiny_flux.new_tokenizers()
    text_encoder, text_encoder_2 = tiny_flux.new_text_encoders(len(tokenizer), len(tokenizer_2))
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * (halvings + 1),
        up_block_types=["UpDecoderBlock2D"] * (halvings + 1),
        block_out_channels=[4] * (halvings - 1) + [8, 8],
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=CHANNELS,
        scaling_factor=0.7,
        shift_factor=0.2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduling),
        vae=randomise(vae, 2).eval(),  # images matter more than to a new one
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=tokenizer_2,
        transformer=randomise(transformer, 1),
    ).save_pretrained(folder)
    return folder
