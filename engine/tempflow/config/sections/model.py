"""Which model is trained, with which adapters, and how its frozen parts are kept in memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tempflow.config.fields import Section


class Lora(Section):
    """Low-rank adapters (LoRA) of the transformer."""

    rank: Annotated[int, Field(ge=1, le=65536)] = Field(32, description="rank of the adapters")
    alpha: Annotated[float, Field(gt=0)] = Field(
        64.0, description="the adapters' output is multiplied by alpha / rank"
    )
    targets: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description=(
            "names of the modules to adapt; null: those that `start` adapts, or without it the"
            " model family's own list"
        ),
    )
    start: str | None = Field(
        None,
        description=(
            "trained adapters to start from: a folder or .safetensors file of diffusers or peft;"
            " null: new ones"
        ),
    )


class Model(Section):
    """The diffusers pipeline whose transformer is trained."""

    path: str = Field(description="diffusers pipeline: a folder or a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32",
        description=(
            "dtype of the text encoders, the VAE and the rollout copy (the `deepspeed` section sets"
            " that of training); auto: bfloat16 if the hardware has instructions for it, else"
            " float32"
        ),
    )
    lora: Lora | None = Field(
        None, description="train adapters; null: train all weights of the transformer"
    )
    # Three values: null chooses, while true is refused with a reason where it is impossible.
    share_base: bool | None = Field(
        None,
        description=(
            "with LoRA. true: rollouts use the frozen weights of the training engine and compute"
            " the adapters beside them; false: rollouts use a second copy of the weights with the"
            " adapters merged; null: true below ZeRO stage 3 if `dtype` is the dtype of training,"
            " else false"
        ),
    )
    quantize: Literal["8bit", "4bit"] | None = Field(
        None,
        description=(
            "with LoRA: store the frozen weights of the transformer's large layers in 8 or 4 bits,"
            " in training, rollouts, the reference policy and evaluations; needs bitsandbytes (the"
            " extra quantize)"
        ),
    )
    attention_backend: str | None = Field(
        None, description="attention backend of diffusers, by its name; null: diffusers' default"
    )
    gradient_checkpointing: bool = Field(
        False, description="save activation memory by computing each forward again in the backward"
    )
    vae_slicing: bool = Field(
        False,
        description=(
            "decode the images of a batch one by one, to save memory with a large"
            " rollout.decode_batch"
        ),
    )
    vae_tiling: bool = Field(
        False,
        description="decode large images in overlapping tiles, to save memory; seams may show",
    )
    offload_text_encoders: bool = Field(
        False,
        description=(
            "keep the text encoders in host memory and copy each layer to the GPU for its forward;"
            " the embeddings are the same, but every text transfers all weights"
        ),
    )
    max_sequence_length: Annotated[int, Field(ge=1, le=65536)] | None = Field(
        None,
        description=(
            "text tokens per prompt; null: the default of the diffusers pipeline (SD3.5 256;"
            " FLUX.1, FLUX.2, Qwen-Image, Z-Image and Wan 512)"
        ),
    )
