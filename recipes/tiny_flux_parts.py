"""The modules of the small model: VAE, tokenizers, text encoders and transformer, and the weights
in them that are held constant."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import words as tiny_words

LATENT_CHANNELS, LATENT_HEIGHT, LATENT_WIDTH = 8, tiny_words.HEIGHT // 4, tiny_words.WIDTH // 4


TEXT_REACH = 8  # T5 tokens attend this far; two layers reach 16


# 44: the longest prompt (18), its reach (16) and their reach (8)
SHORT_TEXT, LONG_TEXT, FULL_TEXT = (20, 44, 512)


T5_CONSTANT, PADDING = 256.0, 32.0  # values of the channels that mark padding


FAR = -1e4  # attention bias that means "never"


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=tiny_words.WIDTH,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def new_tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """A byte-level CLIP tokenizer without merges and a character-level T5 tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(
        vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=32
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return clip, T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=FULL_TEXT)


def new_text_encoders(clip_size: int, t5_size: int) -> tuple[CLIPTextModel, T5EncoderModel]:
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            projection_dim=64,
            bos_token_id=clip_size - 2,
            eos_token_id=clip_size - 1,
            pad_token_id=clip_size - 1,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=t5_size,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=6,
            dropout_rate=0.0,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=TEXT_REACH + 1,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    torch.nn.init.normal_(t5.shared.weight, std=1.0)
    # A letter's position in its word is its distance from the quotation mark, so the heads begin by
    # attending to fixed distances.
    with torch.no_grad():
        bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        for head, bucket in enumerate((1, 2, 3, 4, 5, 17)):  # 1 to 5 tokens back, 1 ahead
            bias[bucket, head] += 4.0
    pin_text_reach(t5)
    return clip, t5


@torch.no_grad()
def pin_text_reach(t5: T5EncoderModel) -> None:
    """Keep the two buckets of distances beyond TEXT_REACH closed."""
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bias[15] = FAR
    bias[31] = FAR


def new_transformer() -> FluxTransformer2DModel:
    """2 double and 4 single blocks of width 128. The layers at the ends of the residual branches
    start at zero."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(4, 12, 16),
    )
    gates = [block.norm.linear for block in model.single_transformer_blocks]
    gates += [
        norm.linear
        for block in model.transformer_blocks
        for norm in (block.norm1, block.norm1_context)
    ]
    for layer in (*gates, model.norm_out.linear, model.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


@torch.no_grad()
def pin_padding_flag(parts: dict) -> None:
    """Set the weights that keep attention off padding; without them, hundreds of equal padding
    tokens would take most of the attention.

    One channel of the T5 encoder is constant and far larger than the others, so that RMS norms do
    not change it: +8 for text and -8 for padding. The transformer's last hidden channel takes it
    over as a flag: PADDING for padding, 0 for text and image. No layer writes to this channel. Keys
    copy it into the first channel of each head, which rotary embedding leaves unchanged because
    text and image have the same position on the first axis; queries have a large negative constant
    there.
    """
    t5, model, flag = parts["text_encoder_2"], parts["transformer"], -1
    t5.shared.weight[0] = 0
    t5.shared.weight[:, flag] = T5_CONSTANT
    t5.shared.weight[0, flag] = -T5_CONSTANT
    for block in t5.encoder.block:
        attention, forward = block.layer
        attention.SelfAttention.o.weight[flag] = 0
        forward.DenseReluDense.wo.weight[flag] = 0
        for layer in (attention, forward):
            layer.layer_norm.weight[flag] = 0
    t5.encoder.final_layer_norm.weight[flag] = 1

    model.x_embedder.weight[flag] = 0
    model.x_embedder.bias[flag] = 0
    model.context_embedder.weight[flag] = 0
    model.context_embedder.weight[:, flag] = 0
    model.context_embedder.weight[flag, flag] = -PADDING / 16
    model.context_embedder.bias[flag] = PADDING / 2
    unrotated = [32 * head for head in range(4)]
    for name, layer in model.named_modules():
        part = name.split(".")[-1]
        if part in ("to_q", "to_k", "add_q_proj", "add_k_proj"):
            layer.weight[unrotated] = 0
            layer.bias[unrotated] = -6.0 if "q" in part else 0.0
            if "k" in part:
                layer.weight[unrotated, flag] = 0.3
        elif part in ("norm_q", "norm_added_q", "norm_k", "norm_added_k"):
            layer.weight[0] = 6.0 if "q" in part else 1.0
        elif name.endswith((".to_out.0", ".to_add_out", ".net.2", ".proj_out")):
            layer.weight[flag] = 0
            layer.bias[flag] = 0
        elif name.endswith((".norm1.linear", ".norm1_context.linear", ".norm.linear")):
            layer.weight[127::128] = 0
            layer.bias[127::128] = 0


@torch.no_grad()
def scale_to_padding_flag(parts: dict) -> None:
    """At the start, undo the effect of the flag's size on the other channels under RMS norms."""
    t5, model = parts["text_encoder_2"], parts["transformer"]
    for name, parameter in t5.named_parameters():
        if "layer_norm" in name:
            parameter.fill_(T5_CONSTANT / (24 if "final" in name else 8))
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        for name, norm in block.attn.named_children():
            if name in ("norm_q", "norm_added_q"):
                norm.weight.fill_(2.0)
