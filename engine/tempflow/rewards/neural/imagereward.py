"""ImageReward (arXiv 2304.05977) on transformers' BLIP classes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tempflow.rewards.neural.base import ModelReward
from tempflow.rewards.neural.clip import linear_layers
from tempflow.rewards.neural.weights import build, fetch, read_config, read_part, read_tensors

# BLIP-large: ViT-L/16 at 224 and a BERT-base with cross-attention, as in the published med_config.json.
ARCHITECTURE = {
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 30524, "encoder_hidden_size": 1024, "layer_norm_eps": 1e-12,
    },
}  # fmt: skip

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


class ImageReward(ModelReward):
    """ImageReward (arXiv 2304.05977; ImageReward/ImageReward.py of its repository), about -2 to 2.

    BERT reads the prompt, cut at 35 tokens, with cross-attention to BLIP's picture tokens; five linear layers on its
    first output give r, and the score is (r - 0.16717362830052426) / 1.0333394966054072, the published statistics.

    path: the published tensors as safetensors; a config.json beside them (a `BlipConfig`) replaces the published
    architecture. tokenizer: BERT's.
    """

    ID = "imagereward"
    PATH = "RE-N-Y/ImageReward"
    MEAN, STD = 0.16717362830052426, 1.0333394966054072
    MAX_LENGTH = 35

    def __init__(
        self,
        path: str = "",
        revision: str = "main",
        device: str = "cpu",
        dtype: str = "",
        batch_size: int = 16,
        tokenizer: str = "google-bert/bert-base-uncased",
    ):
        super().__init__(path, revision, device, dtype, batch_size)
        self._tokenizer_path = tokenizer

    def _load(self):
        from transformers import AutoTokenizer, BlipConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        key, tokenizer = self._key("path"), self._key("tokenizer")
        folder = fetch(tokenizer, self._tokenizer_path, weights=False)
        self._tokenizer = read_part(tokenizer, "tokenizer", folder, AutoTokenizer.from_pretrained)
        source = fetch(key, self._path, self._revision)
        config = BlipConfig.from_dict(_architecture(key, source))
        tensors = read_tensors(key, source)
        vision, text, head = split(tensors)
        self._size, options = config.vision_config.image_size, (self._dtype, self._device)
        self._layers = [(w.to(self._device), b.to(self._device)) for w, b in linear_layers(key, head)]
        self._vision = build(key, BlipVisionModel, config.vision_config, vision, *options)
        self._text = build(key, BlipTextModel, config.text_config, text, *options, add_pooling_layer=False)

    def _score(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        pixels = torch.stack([clip_transform(image, self._size) for image in images])
        seen = self._vision(pixel_values=pixels.to(self._device, self._dtype)).last_hidden_state
        tokens = self._tokenizer(
            prompts, padding=True, truncation=True, max_length=self.MAX_LENGTH, return_tensors="pt"
        ).to(self._device)
        read = self._text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        )
        x = read.last_hidden_state[:, 0].float()
        for weight, bias in self._layers:
            x = F.linear(x, weight, bias)
        return (x[:, 0] - self.MEAN) / self.STD


def clip_transform(image: np.ndarray, size: int) -> torch.Tensor:
    """uint8 [H, W, 3] -> fp32 [3, size, size]: CLIP's transform, bicubic to the shorter side, centre crop, normalised.

    The image processors of transformers round the crop's place the other way, by one pixel.
    """
    from PIL import Image
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    height, width = image.shape[:2]
    short = min(height, width)
    new = (int(size * width / short), int(size * height / short))
    left, top = (round((side - size) / 2) for side in new)
    picture = Image.fromarray(image).resize(new, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(picture)).float() / 255
    return ((pixels - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)).permute(2, 0, 1)


def split(tensors: dict[str, torch.Tensor]) -> tuple[dict, dict, dict]:
    """The published tensors as those of `BlipVisionModel`, of `BlipTextModel`, and of the head, under their names."""
    parts: dict[str, dict[str, torch.Tensor]] = {"visual_encoder": {}, "text_encoder": {}, "mlp": {}}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(?:.*\.)?(visual_encoder|text_encoder)\.(.+)|(mlp)\.(.+)", name)
        if match:
            parts[match[1] or match[3]][match[2] or match[4]] = tensor
    return {_vision_name(name): tensor for name, tensor in parts["visual_encoder"].items()}, parts["text_encoder"], parts["mlp"]


def _vision_name(name: str) -> str:
    for pattern, replacement in _VISION:
        if match := re.match(pattern + r"(?=\.|$)", name):
            return match.expand(replacement) + name[match.end() :]
    return name


def _architecture(key: str, source: Path) -> dict:
    if source.is_dir() and (source / "config.json").exists():
        return read_config(key, source, "blip")
    return ARCHITECTURE
