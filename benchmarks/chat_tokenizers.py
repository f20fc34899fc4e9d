"""Small tokenizers for tests and benchmarks, of bytes and of the marks of a chat template, for the
language models that encode FLUX.2's prompts."""

from __future__ import annotations

import json
from pathlib import Path

KLEIN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if"
    " add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false"
    " %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DEV_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{"
    " m.content[0].text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif"
    " %}{% endfor %}"
)
DEV_MARKS = [
    "<pad>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
]


def klein_tokenizer():
    """The tokenizer of FLUX.2 [klein], which pads on the right."""
    from make_pipeline import qwen_tokenizer

    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "assistant", "user"])
    tokenizer.chat_template = KLEIN_CHAT
    return tokenizer


def dev_tokenizer():
    """The tokenizer of FLUX.2 [dev], which also has the words of the system message, and pads on
    the left."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(
        models.BPE(vocab={name: n for n, name in enumerate([*DEV_MARKS, *letters])}, merges=[])
    )
    plain.pre_tokenizer, plain.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "additional_special_tokens": DEV_MARKS[3:],
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, padding_side="left", chat_template=DEV_CHAT, **special
    )
    tokenizer.add_tokens(
        [word if n == 0 else f" {word}" for n, word in enumerate(SYSTEM_MESSAGE.split())]
    )
    return tokenizer


def save_dev_processor(folder: Path) -> None:
    """Save [dev]'s tokenizer with the files that make it a PixtralProcessor, which can only be
    loaded with torchvision installed."""
    from transformers import PixtralImageProcessorPil

    dev_tokenizer().save_pretrained(folder)
    PixtralImageProcessorPil().save_pretrained(folder)
    settings = {
        "processor_class": "PixtralProcessor",
        "image_token": "[IMG]",
        "patch_size": 14,
        "spatial_merge_size": 2,
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))
