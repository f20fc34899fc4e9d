"""Tiny pipelines of the families with classifier-free guidance: the real diffusers classes with random weights."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
from engine_cases import randomise
from make_pipeline import qwen_tokenizer

from tempflow.types import Size


def sd3_pipeline(folder: Path, **scheduling) -> Path:
    """A StableDiffusion3Pipeline like SD3.5-M's: two CLIPs and T5, and a block with the second attention; pictures to 128 x 128."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
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


def qwen_pipeline(folder: Path, **scheduling) -> Path:
    """A QwenImagePipeline: Qwen2.5-VL as text encoder, the video VAE."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
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
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
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


FP32 = 1e-5


PROMPTS = ['the word "ABC"', "something else, and longer"]


NEGATIVES = ["blurred, too many words", ""]


DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True}


@dataclass(frozen=True)
class Family:
    """How to build a tiny pipeline of one, what diffusers calls what the engine calls guidance_scale, and how two predictions
    become one."""

    build: Callable[..., Path]
    pipeline: str
    scale: str
    text_length: int
    default_negative: str
    schedulers: dict = field(default_factory=dict)
    combine: Callable = lambda positive, negative, scale: (1 - scale) * negative + scale * positive

    def call(self, guidance_scale, negatives):
        """The pipeline's arguments; without negative prompts its own default."""
        return {self.scale: guidance_scale} | ({} if negatives is None else {"negative_prompt": list(negatives)})


def rescaled(positive, negative, scale):
    """Guided, and as long as the positive prediction, token by token."""
    guided = (1 - scale) * negative + scale * positive
    return guided * (positive.square().sum(-1, keepdim=True) / guided.square().sum(-1, keepdim=True)).sqrt()


FAMILIES = {
    "sd3": Family(sd3_pipeline, "StableDiffusion3Pipeline", "guidance_scale", 256, "", {"shifted": {"shift": 3.0}, "dynamic": DYNAMIC}),
    "qwen_image": Family(
        qwen_pipeline,
        "QwenImagePipeline",
        "true_cfg_scale",
        512,
        " ",
        {"dynamic": {**DYNAMIC, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}, "plain": {}},
        rescaled,
    ),
}


def pipeline_folders(root: Path) -> Callable[..., Path]:
    """Folder of a tiny pipeline by (family, kind of scheduler), built in `root` when first asked for."""
    made = {}

    def get(name, kind=None):
        family = FAMILIES[name]
        kind = kind or next(iter(family.schedulers))
        if (name, kind) not in made:
            made[name, kind] = family.build(root / f"{name}-{kind}", **family.schedulers[kind])
        return made[name, kind]

    return get


def latents_for(policy, height, width, count=2):
    shape = policy.latent_shape(Size(height, width))
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
