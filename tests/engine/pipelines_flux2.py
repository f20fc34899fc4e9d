"""Tiny pipelines of FLUX.2: the real diffusers and transformers classes with random weights, and
plain diffusers' loading of them."""

import json
from pathlib import Path

import torch
from chat_tokenizers import dev_tokenizer, klein_tokenizer, save_dev_processor
from engine_cases import randomise

CHANNELS = 4  # of the VAE
KLEIN_LAYERS, DEV_LAYERS = 27, 30  # of the text encoders, as many as the pipelines read


def _transformer(seed: int, width: int, guidance_embeds: bool):
    from diffusers import Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * width,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return _sharpened(randomise(transformer, seed))


@torch.no_grad()
def _sharpened(transformer):
    """Weights that matter twice as much, so that text and images show in the latents; more would
    amplify rounding errors too."""
    for name, parameter in transformer.named_parameters():
        if any(
            part in name
            for part in ("norm_q", "norm_k", "norm_added", "modulation", "timestep_embedder")
        ):
            parameter.mul_(2)
    return transformer


def _vae():
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=64,
    )
    generator = torch.Generator().manual_seed(3)
    vae.bn.running_mean.normal_(generator=generator)
    vae.bn.running_var.uniform_(0.5, 3, generator=generator)
    return vae.eval()


def klein_pipeline(folder: Path, is_distilled: bool = False, **scheduling) -> Path:
    """A Flux2KleinPipeline: Qwen3 as text encoder; a base model, or a distilled one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer, width = klein_tokenizer(), 16
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=KLEIN_LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=512,
        )
    )
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduling),
        vae=_vae(),
        text_encoder=randomise(text_encoder, 2).eval(),
        tokenizer=tokenizer,
        transformer=_transformer(1, width, guidance_embeds=False),
        is_distilled=is_distilled,
    ).save_pretrained(folder)
    return folder


def dev_pipeline(folder: Path, **scheduling) -> Path:
    """A Flux2Pipeline as the published one lies there: a PixtralProcessor's files, which plain
    diffusers reads where torchvision is."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(0)
    tokenizer, width = dev_tokenizer(), 16
    text_encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={
                "model_type": "mistral",
                "vocab_size": len(tokenizer),
                "hidden_size": width,
                "intermediate_size": 16,
                "num_hidden_layers": DEV_LAYERS,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "max_position_embeddings": 1024,
                "sliding_window": None,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": width,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "intermediate_size": 16,
                "image_size": 28,
                "patch_size": 14,
            },
            image_token_index=7,
        )
    )
    pipe = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduling),
        vae=_vae(),
        text_encoder=randomise(text_encoder, 2).eval(),
        tokenizer=tokenizer,
        transformer=_transformer(1, width, guidance_embeds=True),
    )
    pipe.save_pretrained(folder)
    save_dev_processor(folder / "tokenizer")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def plain_pipeline(folder: Path):
    """diffusers' own pipeline of a folder. That of [dev] gets its tokenizer by hand: its processor
    cannot be loaded without torchvision."""
    import diffusers
    from transformers import AutoTokenizer

    kind = json.loads((Path(folder) / "model_index.json").read_text())["_class_name"]
    by_hand = {"tokenizer": None} if kind == "Flux2Pipeline" else {}
    pipe = getattr(diffusers, kind).from_pretrained(folder, **by_hand)
    if by_hand:
        pipe.register_modules(tokenizer=AutoTokenizer.from_pretrained(Path(folder) / "tokenizer"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def negative_embeddings(pipe, texts: list[str], call: dict) -> dict:
    """[klein]'s pipeline takes negative prompts as embeddings."""
    embeds, _ = pipe.encode_prompt(texts, max_sequence_length=call.get("max_sequence_length", 512))
    return {"negative_prompt_embeds": embeds}
