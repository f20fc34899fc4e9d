"""The HPSv3 reward (arXiv 2508.03789), on transformers' Qwen2-VL classes. Sources: hpsv3/
inference.py and model/qwen2vl_trainer.py of the published repository."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from tempflow.errors import UserError
from tempflow.rewards.base import locate
from tempflow.rewards.neural.base import ModelReward
from tempflow.rewards.neural.heads import Head
from tempflow.rewards.neural.weights import (
    build,
    fetch,
    read_config,
    read_processor,
    read_tensors,
    read_tokenizer,
)

REWARD_TOKEN = "<|Reward|>"
# The area to which an image is resized; its sides become multiples of 28, so it has about 256
# tokens.
PIXELS = 256 * 28 * 28

# The instruction with which the model was trained, including its trailing spaces and its grammar:
# data_collator_qwen.py of the published repository.
INSTRUCTION = """
You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the best.\x20

**Visual Quality:** \x20
Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:
- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal body structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements (e.g., hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.
- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult material. If such content is present, the image quality and satisfaction score should be the lowest possible.\x20

**Text Alignment:** \x20
Assess how well the image matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with the textual description. The subject should match the description in terms of number, appearance, and behavior.
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image adheres to this style.
- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically fit the scenario described in the prompt. The environment should support and enhance the subject without contradictions.
- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical attributes should be preserved.
- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The generated content should not introduce elements that conflict with or distort the original description.
Textual prompt - {prompt}


"""  # noqa: E501
QUESTION = f"\nPlease provide the overall ratings of this image: {REWARD_TOKEN}\n\nEND\n"

# Qwen2-VL's chat template for one image and one text. {image} becomes one IMAGE_TOKEN per token of
# the image, as Qwen2-VL's own processor does it.
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)
IMAGE_TOKEN = "<|image_pad|>"

_HEAD = (0, 3, 5)  # places of the linear layers in rm_head; the others are ReLU and dropout


@dataclass(eq=False)
class HpsV3(ModelReward):
    """HPSv3 (arXiv 2508.03789), human preference, about -5 to 15.

    Qwen2-VL-7B reads the image and an instruction; at the token <|Reward|>, a head of three layers
    predicts the mean and the spread of the preference, and the score is the mean.

    Args:
        path: a folder or hub repository with its weights as safetensors.
        base: the Qwen2-VL that the weights were fine-tuned from, for its config, tokenizer and
            image processor.
    """

    path: str = "MizzenAI/HPSv3"
    dtype: str = "bfloat16"
    batch_size: int = 8
    base: str = "Qwen/Qwen2-VL-7B-Instruct"

    def check_prompts(self, prompts, metadata):
        for prompt, entry in zip(prompts, metadata):
            if token := re.search(r"<\|\w+\|>", prompt):
                raise UserError(
                    f"{locate(prompt, entry)} holds {token[0]}, which the 'hpsv3' reward's model"
                    " would read as a control token; remove it from the prompt"
                )

    def _load(self):
        from transformers import Qwen2VLConfig, Qwen2VLModel

        folder = fetch("base", self.base, weights=False)
        config = Qwen2VLConfig.from_dict(read_config("base", folder, "qwen2_vl"))
        self._tokenizer, self._processor = (
            read_tokenizer("base", folder),
            read_processor("base", folder),
        )
        # On the right, so that the positions of every text begin at 0 (see `_score`).
        self._tokenizer.padding_side = "right"
        # The base's tokenizer lacks the token; the published weights have an embedding for it at
        # the next free id.
        self._tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        self._reward_id = self._tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        tensors, head = split("path", read_tensors("path", fetch("path", self.path, self.revision)))
        # As many rows as the published embedding has, since added tokens may have resized it.
        config.text_config.vocab_size = len(tensors["language_model.embed_tokens.weight"])
        if self._reward_id >= config.text_config.vocab_size:
            raise UserError(
                f"path: the weights have embeddings of {config.text_config.vocab_size} tokens, but"
                f" {REWARD_TOKEN} is token {self._reward_id}; the weights and `base` do not belong"
                " together"
            )
        self._head = Head(head, self.device, between=F.relu)
        self._model = build("path", Qwen2VLModel, config, tensors, self.torch_dtype, self.device)

    def _score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        # In Qwen2-VL's processor these two names mean the least and the greatest area in pixels.
        area = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
        seen = self._processor(
            list(images), size=area, input_data_format="channels_last", return_tensors="pt"
        )
        grid = seen["image_grid_thw"]
        counts = (grid.prod(-1) // self._processor.merge_size**2).tolist()
        texts = [
            CHAT.format(
                image=IMAGE_TOKEN * count, text=INSTRUCTION.replace("{prompt}", prompt) + QUESTION
            )
            for count, prompt in zip(counts, prompts)
        ]
        tokens = self._tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        at_reward = (tokens["input_ids"] == self._reward_id).int().argmax(1)
        # Positions count up through image and text alike, in all three axes of the model's rotary
        # embedding, because the published model was trained that way.
        positions = torch.arange(tokens["input_ids"].shape[1], device=self.device).expand(
            3, len(images), -1
        )
        hidden = self._model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            position_ids=positions,
            pixel_values=seen["pixel_values"].to(self.device, self.torch_dtype),
            image_grid_thw=grid.to(self.device),
            use_cache=False,  # nothing is generated
        ).last_hidden_state
        return self._head(hidden[torch.arange(len(images), device=self.device), at_reward].float())


def split(key: str, tensors: dict[str, torch.Tensor]) -> tuple[dict, list]:
    """Split HPSv3's tensors into those of `Qwen2VLModel` and those of the head.

    Args:
        key: the option that the tensors come from, for error messages.
        tensors: under the names of older or newer versions of transformers.

    Returns:
        The model's tensors under the installed version's names, and the (weight, bias) of the
        head's layers.

    Raises:
        UserError: if the head or the token embedding is missing.
    """
    try:
        head = [(tensors[f"rm_head.{i}.weight"], tensors[f"rm_head.{i}.bias"]) for i in _HEAD]
    except KeyError as error:
        raise UserError(f"{key}: the weights are not those of HPSv3: no tensor {error}") from None
    model = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(?:model\.)?(visual\.)", r"\1", name)
        name = re.sub(
            r"^model\.(?:language_model\.)?(?=(?:layers|embed_tokens|norm)\.)",
            "language_model.",
            name,
        )
        if name.startswith(("visual.", "language_model.")):
            model[name] = tensor
    if "language_model.embed_tokens.weight" not in model:
        raise UserError(f"{key}: the weights are not those of HPSv3: no embed_tokens.weight")
    return model, head
