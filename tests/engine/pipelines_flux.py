"""A tiny FluxPipeline: the shipped model's tokenizers and VAE, and a smaller transformer with
random weights."""

from pathlib import Path

import torch
from engine_cases import randomise


def flux_pipeline(
    folder: Path, *, guidance_embeds=False, kind="FluxPipeline", control=False, **scheduling
) -> Path:
    """A pipeline of the class `kind` with the recipe's tokenizers and VAE and a small random
    transformer.

    control: whether the transformer takes as many channels again beside those of the latents.
    """
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    import tiny_flux

    torch.manual_seed(0)
    tokenizer, tokenizer_2 = tiny_flux.new_tokenizers()
    text_encoder, text_encoder_2 = tiny_flux.new_text_encoders(len(tokenizer), len(tokenizer_2))
    vae = tiny_flux.new_vae()
    vae.register_to_config(scaling_factor=0.7, shift_factor=0.2)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * tiny_flux.LATENT_CHANNELS * (2 if control else 1),
        out_channels=4 * tiny_flux.LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    getattr(diffusers, kind)(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduling),
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2.eval(),
        transformer=randomise(transformer, 1),
    ).save_pretrained(folder)
    return folder
