"""Rewards that compare CLIP embeddings, or apply a small head to them.

With u the embedding of the image and v that of the text, both of length 1, and cos = u . v:

* pickscore: exp(logit_scale) cos. arXiv 2305.01569, section 4; model card of
  yuvalkirstain/PickScore_v1.
* clipscore: 2.5 max(cos, 0), with "A photo depicts " before the text. arXiv 2104.08718, section 3.
* hpsv2: cos. arXiv 2306.09341; hpsv2/img_score.py of its repository.
* aesthetic: head(u). improved-aesthetic-predictor (MLP), LAION's aesthetic-predictor (linear).
* clip_image: the mean of u . c over the prompt's condition images, with c their embeddings. CLIP-I
  of arXiv 2208.12242.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tempflow.errors import UserError
from tempflow.rewards.conditions import check_conditions, condition_images
from tempflow.rewards.neural.base import ModelReward
from tempflow.rewards.neural.heads import linear_head
from tempflow.rewards.neural.open_clip import to_transformers
from tempflow.rewards.neural.weights import (
    build,
    fetch,
    read_config,
    read_processor,
    read_tensors,
    read_tokenizer,
)


class ClipEncoder:
    """A transformers CLIP model with its tokenizer and image processor. Both towers return fp32
    embeddings of length 1.

    Args:
        key: the option that the folder comes from, for error messages.
        folder: has the config, tokenizer, image processor and, unless `tensors` are given, the
            weights of a `CLIPModel`.
        dtype: of weights and activations.
        device: "cpu" or "cuda".
        tensors: the weights under transformers' names; None: read from `folder`.
    """

    def __init__(
        self,
        key: str,
        folder: Path,
        dtype: torch.dtype,
        device: str,
        tensors: dict[str, torch.Tensor] | None = None,
    ):
        from transformers import CLIPConfig, CLIPModel

        config = CLIPConfig.from_dict(read_config(key, folder, "clip"))
        self.tokenizer, self.processor = read_tokenizer(key, folder), read_processor(key, folder)
        self.model = build(
            key,
            CLIPModel,
            config,
            read_tensors(key, folder) if tensors is None else tensors,
            dtype,
            device,
        )
        self.size = config.vision_config.image_size
        self._dtype, self._device = dtype, device
        self._length = config.text_config.max_position_embeddings

    def pixels(self, images: np.ndarray | list[np.ndarray]) -> torch.Tensor:
        """uint8 [n, H, W, 3], or a list of n [H, W, 3] of any sizes -> fp32 [n, 3, size, size],
        resized, cropped and normalized as the image processor's config says."""
        # The layout is given, because the processor would guess it from the shape, wrongly for an
        # image that is 3 pixels high.
        return self.processor(list(images), input_data_format="channels_last", return_tensors="pt")[
            "pixel_values"
        ]

    def normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        """fp32 [n, 3, H, W] in [0, 1] -> the same, minus the mean and divided by the standard
        deviation of the image processor's config."""
        mean, std = (
            torch.tensor(v)[:, None, None]
            for v in (self.processor.image_mean, self.processor.image_std)
        )
        return (pixels - mean) / std

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """fp32 [n, 3, size, size] -> fp32 [n, d] of length 1."""
        vision = self.model.vision_model(pixel_values=pixels.to(self._device, self._dtype))
        # float() before the normalization: cosines of one group differ by less than bfloat16's
        # resolution.
        return F.normalize(self.model.visual_projection(vision.pooler_output).float(), dim=-1)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """n texts, truncated to the model's length -> fp32 [n, d] of length 1."""
        # A batch has many images of few prompts; each text is encoded once.
        unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        tokens = self.tokenizer(
            list(unique),
            padding=True,
            truncation=True,
            max_length=self._length,
            return_tensors="pt",
        ).to(self._device)
        text = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        embeddings = F.normalize(self.model.text_projection(text.pooler_output).float(), dim=-1)
        return embeddings[[unique[text] for text in texts]]


class ClipReward(ModelReward):
    """Base class of rewards on a CLIP model; `path` has its config, tokenizer and weights."""

    def _load(self):
        self._clip = ClipEncoder(
            "path", fetch("path", self.path, self.revision), self.torch_dtype, self.device
        )

    def _cosine(self, pixels: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """fp32 [n, 3, size, size] and n texts -> fp32 [n], the similarity of each image to its
        text."""
        return (self._clip.embed_images(pixels) * self._clip.embed_texts(texts)).sum(-1)


@dataclass(eq=False)
class PickScore(ClipReward):
    """PickScore (arXiv 2305.01569), human preference: `exp(logit_scale) cos`, about 18 to 24.

    Flow-GRPO divides it by 26 to bring it near 1; here, divide the weight instead.
    """

    path: str = "yuvalkirstain/PickScore_v1"

    def _score(self, images, prompts, metadata):
        return self._clip.model.logit_scale.float().exp() * self._cosine(
            self._clip.pixels(images), prompts
        )


@dataclass(eq=False)
class ClipScore(ClipReward):
    """CLIPScore (arXiv 2104.08718), agreement with the prompt: `2.5 max(cos, 0)` of the image and
    the prompt after `prefix`.

    The paper's model is ViT-B/32; the default is ViT-L/14, the common choice in text-to-image work.

    Args:
        prefix: put before the prompt, with one space; "" for the bare prompt.
    """

    path: str = "openai/clip-vit-large-patch14"
    prefix: str = "A photo depicts"

    def _score(self, images, prompts, metadata):
        texts = [f"{self.prefix.strip()} {prompt}".lstrip() for prompt in prompts]
        return 2.5 * self._cosine(self._clip.pixels(images), texts).clamp(min=0)


@dataclass(eq=False)
class HpsV2(ClipReward):
    """HPSv2 and HPSv2.1 (arXiv 2306.09341), human preference: `cos`, about 0.2 to 0.35.

    As in the published transform, an image that is not square is padded with black instead of
    cropped, and resized as torchvision 0.17 and later resize tensors.

    Args:
        path: a folder or hub repository with the weights, in open_clip's layout, as published, or
            in transformers'.
        base: the CLIP model that the weights were fine-tuned from, for its config, tokenizer and
            image statistics.
    """

    path: str = "RE-N-Y/hpsv21"
    base: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def _load(self):
        folder = fetch("base", self.base, weights=False)
        read_config("base", folder, "clip")
        tensors = read_tensors("path", fetch("path", self.path, self.revision))
        # A name that only transformers' layout has.
        if not any(name.startswith("vision_model.") for name in tensors):
            tensors = to_transformers("path", tensors)
        self._clip = ClipEncoder("path", folder, self.torch_dtype, self.device, tensors)

    def _score(self, images, prompts, metadata):
        # Resized as a tensor, like the published code, and not by the processor's Pillow.
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        return self._cosine(self._clip.normalized(resize_and_pad(pixels, self._clip.size)), prompts)


@dataclass(eq=False)
class ClipImage(ClipReward):
    """How similar an image is to its prompt's condition images: `cos` of their CLIP embeddings, the
    mean over several images, about 0.5 to 1.

    It rewards edits that keep the original image, so it is highest if nothing was edited: give it
    less weight than a reward of the edit itself.
    """

    path: str = "openai/clip-vit-large-patch14"

    def check_prompts(self, prompts, metadata):
        check_conditions(prompts, metadata)

    def _score(self, images, prompts, metadata):
        given = [condition_images(entry) for entry in metadata]
        # By identity: `condition_images` returns one array for all images of a prompt, which is
        # then embedded once. `given` keeps the arrays alive, so no identity is used twice.
        different = {id(image): image for own in given for image in own}
        known = (
            dict(zip(different, self._embedded(list(different.values())), strict=True))
            if different
            else {}
        )
        # For an image whose prompt has no condition image. `check_prompts` refuses such prompts in
        # a run; through a reward server they may come.
        unknown = torch.tensor(math.nan, device=self.device)
        pairs = zip(self._embedded(images), given, strict=True)
        return torch.stack(
            [
                torch.stack([known[id(one)] @ made for one in own]).mean() if own else unknown
                for made, own in pairs
            ]
        )

    def _embedded(self, images) -> torch.Tensor:
        return self._clip.embed_images(self._clip.pixels(images))


@dataclass(eq=False)
class Aesthetic(ClipReward):
    """LAION's aesthetic score of an image, about 1 to 10. It does not depend on the prompt.

    Args:
        path: the CLIP model that the head was trained on.
        head: a .safetensors file, folder or hub repository with one or several linear layers, which
            are applied to the embedding one after another, without activations. The default is
            improved-aesthetic-predictor's "sac+logos+ava1-l14-linearMSE".
    """

    path: str = "openai/clip-vit-large-patch14"
    head: str = "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"

    def _load(self):
        super()._load()
        self._head = linear_head(
            "head", read_tensors("head", fetch("head", self.head)), self.device
        )
        width = self._clip.model.config.projection_dim
        if self._head.width != width:
            raise UserError(
                f"head: {self.head} takes embeddings of width {self._head.width}, but those of"
                f" {self.path} have {width}; choose the CLIP model that the head was trained on"
            )

    def _score(self, images, prompts, metadata):
        return self._head(self._clip.embed_images(self._clip.pixels(images)))


def resize_and_pad(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """fp32 [n, 3, H, W] -> fp32 [n, 3, size, size]: the longer side is scaled to `size`, and the
    shorter one is padded with 0 on both sides."""
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    new = (round(height * scale), round(width * scale))
    if scale != 1:  # torchvision returns an image that has the right size unchanged
        pixels = F.interpolate(
            pixels, size=new, mode="bicubic", antialias=True, align_corners=False
        )
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    return F.pad(pixels, (left, size - new[1] - left, top, size - new[0] - top))
