"""The ImageReward reward (arXiv 2304.05977), on transformers' BLIP classes. Source: ImageReward/
ImageReward.py of the published repository."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tempflow.rewards.neural.base import ModelReward
from tempflow.rewards.neural.heads import linear_head
from tempflow.rewards.neural.weights import build, fetch, read_config, read_tensors, read_tokenizer

# BLIP-large: ViT-L/16 at 224 and a BERT-base with cross-attention, as in the published
# med_config.json.
ARCHITECTURE = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 30524,
        "encoder_hidden_size": 1024,
        "layer_norm_eps": 1e-12,
    },
}

# The vision tower's tensor names in the published checkpoint (timm's), and transformers' names.
_VISION = [
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj", "embeddings.patch_embedding"),
    (r"blocks\.(\d+)\.norm1", r"encoder.layers.\1.layer_norm1"),
    (r"blocks\.(\d+)\.norm2", r"encoder.layers.\1.layer_norm2"),
    (r"blocks\.(\d+)\.attn\.qkv", r"encoder.layers.\1.self_attn.qkv"),
    (r"blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"blocks\.(\d+)\.mlp", r"encoder.layers.\1.mlp"),
    (r"norm", "post_layernorm"),
]

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score r, as published
MAX_LENGTH = 35  # tokens of a prompt, as published


@dataclass(eq=False)
class ImageReward(ModelReward):
    """ImageReward (arXiv 2304.05977), human preference, about -2 to 2.

    BERT reads the prompt, truncated to 35 tokens, with cross-attention to BLIP's image tokens; five
    linear layers on its first output give a raw score, which is normalized with the published mean
    and standard deviation.

    Args:
        path: a folder or hub repository with the published weights as safetensors; a config.json
            beside them (a `BlipConfig`) replaces the published architecture.
        tokenizer: a folder or hub repository with BERT's tokenizer.
    """

    path: str = "RE-N-Y/ImageReward"
    tokenizer: str = "google-bert/bert-base-uncased"

    def _load(self):
        from transformers import BlipConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self._tokenizer = read_tokenizer(
            "tokenizer", fetch("tokenizer", self.tokenizer, weights=False)
        )
        source = fetch("path", self.path, self.revision)
        config = BlipConfig.from_dict(_architecture("path", source))
        self._size = config.vision_config.image_size
        vision, text, head = split(read_tensors("path", source))
        self._head = linear_head("path", head, self.device)
        options = (self.torch_dtype, self.device)
        self._vision = build("path", BlipVisionModel, config.vision_config, vision, *options)
        self._text = build(
            "path", BlipTextModel, config.text_config, text, *options, add_pooling_layer=False
        )

    def _score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        pixels = torch.stack([clip_transform(image, self._size) for image in images])
        seen = self._vision(pixel_values=pixels.to(self.device, self.torch_dtype)).last_hidden_state
        tokens = self._tokenizer(
            prompts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).to(self.device)
        read = self._text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        )
        return (self._head(read.last_hidden_state[:, 0].float()) - MEAN) / STD


def clip_transform(image: np.ndarray, size: int) -> torch.Tensor:
    """uint8 [H, W, 3] -> fp32 [3, size, size]: CLIP's transform, which resizes the shorter side to
    `size` (bicubic), crops the center and normalizes.

    transformers' image processors are not used, because they round the crop's position the other
    way, which shifts it by one pixel.
    """
    from PIL import Image
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    height, width = image.shape[:2]
    short = min(height, width)
    new = (int(size * width / short), int(size * height / short))
    left, top = (round((side - size) / 2) for side in new)
    cropped = (
        Image.fromarray(image)
        .resize(new, Image.Resampling.BICUBIC)
        .crop((left, top, left + size, top + size))
    )
    pixels = torch.from_numpy(np.array(cropped)).float() / 255
    return ((pixels - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)).permute(
        2, 0, 1
    )


def split(tensors: dict[str, torch.Tensor]) -> tuple[dict, dict, dict]:
    """Split the published tensors into those of `BlipVisionModel`, of `BlipTextModel` and of the
    head, each under the names that its module expects."""
    parts: dict[str, dict[str, torch.Tensor]] = {
        "visual_encoder": {},
        "text_encoder": {},
        "mlp": {},
    }
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(?:.*\.)?(visual_encoder|text_encoder)\.(.+)|(mlp)\.(.+)", name)
        if match:
            parts[match[1] or match[3]][match[2] or match[4]] = tensor
    return (
        {_vision_name(name): tensor for name, tensor in parts["visual_encoder"].items()},
        parts["text_encoder"],
        parts["mlp"],
    )


def _vision_name(name: str) -> str:
    """transformers' name of a tensor of the vision tower."""
    for pattern, replacement in _VISION:
        # The lookahead: a pattern matches whole parts of the name only.
        if match := re.match(pattern + r"(?=\.|$)", name):
            return match.expand(replacement) + name[match.end() :]
    return name


def _architecture(key: str, source: Path) -> dict:
    """The config beside the weights; the published architecture if there is none."""
    if source.is_dir() and (source / "config.json").exists():
        return read_config(key, source, "blip")
    return ARCHITECTURE
