"""Adapters written as LoRA files that plain diffusers reads, for the commands that hand them out.

Reading such files is in models/lora.py.
"""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig

from tempflow.checkpoints import load
from tempflow.models.lora import by_expert, layers_of


def write_lora(weights, rank: int, alpha: float, pipeline_class, folder: Path, dtype) -> None:
    """Write pytorch_lora_weights.safetensors, which `pipe.load_lora_weights(folder)` reads.

    A denoiser with two transformers has one file for each, in folders named after them. The second
    is loaded by `load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)`.

    Args:
        weights: adapter matrices by name, with a checkpoint's names or a file's.
        rank: rank of all adapters.
        alpha: their scale is alpha / rank.
        pipeline_class: the diffusers pipeline, whose method writes the files.
        folder: an existing folder.
        dtype: a torch.dtype for floating-point weights.
    """
    # peft inserts the adapter's name ("default") into parameter names; diffusers' files leave it
    # out.
    state = {
        name.replace(".default.weight", ".weight"): load.cast(name, value, dtype)
        for name, value in weights.items()
    }
    for part, layers in by_expert(state).items():
        # Without this metadata diffusers takes alpha = rank, which scales the adapters wrongly.
        settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers_of(layers)).to_dict()
        pipeline_class.save_lora_weights(
            folder / part,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=settings,
        )
