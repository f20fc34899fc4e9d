"""Tiny pipelines of Wan 2.1 and 2.2: the real diffusers and transformers classes with random
weights."""

from pathlib import Path

import torch
from engine_cases import randomise

CHANNELS = 4
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def transformer(seed: int, channels: int = CHANNELS):
    from diffusers import WanTransformer3DModel

    made = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=channels,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return randomise(made, seed)


def vae(**more):
    from diffusers import AutoencoderKLWan

    config = {"base_dim": 4, "z_dim": CHANNELS, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}
    scales = {"latents_mean": [-0.7, 0.1, 0.5, -0.3], "latents_std": [2.8, 1.4, 2.3, 1.6]}
    return AutoencoderKLWan(**config, **scales, **more).eval()


def text_encoder(tokens: int):
    from transformers import UMT5Config, UMT5EncoderModel

    config = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    made = randomise(
        UMT5EncoderModel(UMT5Config(vocab_size=tokens, **config, pad_token_id=0)), 2
    ).eval()
    made.encoder.final_layer_norm.weight.data *= (
        20  # or some words would be nothing beside the padding, which is attended to
    )
    return made


# the UniPC that is Euler on its grid
FIRST_ORDER = {"solver_order": 1, "disable_corrector": list(range(1000))}


def unipc(**options):
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(**{**UNIPC, **options})


def wan_pipeline(
    folder: Path,
    by_unipc: dict | None = None,
    *,
    experts: bool = False,
    small_vae: bool = False,
    **scheduling,
) -> Path:
    """A WanPipeline with Euler's scheduler, or UniPC.

    by_unipc: options of UniPC.
    experts: two transformers with a boundary, as in Wan 2.2 A14B.
    small_vae: the VAE and the timesteps of Wan 2.2 5B, which compress 16 times a side.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    import tiny_flux

    torch.manual_seed(0)
    _, tokenizer = tiny_flux.new_tokenizers()
    more = {}
    if small_vae:
        more = {
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        }
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(len(tokenizer)),
        vae=vae(**more),
        scheduler=(
            FlowMatchEulerDiscreteScheduler(**scheduling) if by_unipc is None else unipc(**by_unipc)
        ),
        transformer=transformer(1),
        transformer_2=transformer(4) if experts else None,
        boundary_ratio=0.875 if experts else None,
        expand_timesteps=small_vae,
    ).save_pretrained(folder)
    return folder
