"""A tiny QwenImage21Pipeline: the real diffusers and transformers classes with random weights."""

import json
from pathlib import Path

import torch
from engine_cases import randomise
from make_pipeline import VISION, qwen3_processor

CHANNELS, WIDTH = 8, 32  # of the latents and of the text


def qwen_21_pipeline(folder: Path, sample_sigmas=None, **scheduling) -> Path:
    """sample_sigmas: of a distilled checkpoint, which brings its own grid."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Transformer2DModel,
    )

    torch.manual_seed(0)
    processor = qwen3_processor()
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(**scheduling),
        "vae": (
            AutoencoderKLQwenImage21(
                base_dim=4,
                decoder_base_dim=4,
                z_dim=CHANNELS,
                dim_mult=[1, 1, 1, 2, 2],
                num_res_blocks=1,
                latents_mean=[0.1 * n for n in range(CHANNELS)],
                latents_std=[1 + 0.1 * n for n in range(CHANNELS)],
            ).eval()
        ),
        "text_encoder": randomise(text_encoder(processor.tokenizer), 2).eval(),
        "processor": processor,
        "transformer": randomise(
            QwenImage21Transformer2DModel(
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                context_in_dim=WIDTH,
                mlp_ratio=2,
                axes_dims_rope=(4, 6, 6),
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
    about = {
        "_class_name": "QwenImage21Pipeline",
        "_diffusers_version": "0.42.1",
        "sample_sigmas": sample_sigmas,
    }
    (folder / "model_index.json").write_text(json.dumps({**about, **index}))
    return folder


def text_encoder(tokenizer):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    start, end, image, video = tokenizer.convert_tokens_to_ids(VISION)
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": WIDTH,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [4, 2, 2],
                    "mrope_interleaved": True,
                },
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": WIDTH,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
    )
