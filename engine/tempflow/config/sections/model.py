"""What is trained: the diffusers pipeline, its adapters, and how its frozen part is held."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tempflow.config.fields import Section


class Lora(Section):
    rank: Annotated[int, Field(ge=1, le=65536)] = Field(32, description="rank of the adapters")
    alpha: Annotated[float, Field(gt=0)] = Field(64.0, description="their scale is alpha / rank")
    targets: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="module names to adapt; null: those of `start`, else the family's own list",
    )
    start: str | None = Field(
        None,
        description=(
            "adapters to begin with: a folder or .safetensors file of diffusers or peft; null: none"
        ),
    )


class Model(Section):
    path: str = Field(description="a diffusers pipeline folder, or a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32",
        description=(
            "of the frozen parts and the rollout copy; auto: bfloat16 where the hardware"
            " computes it"
        ),
    )
    lora: Lora | None = Field(None, description="null trains all weights of the transformer")
    share_base: bool | None = Field(
        None,
        description=(
            "with LoRA: rollouts read the training engine's own frozen weights and apply the"
            " adapters beside them; false keeps a second copy with the adapters merged; null:"
            " shared below ZeRO stage 3 where `dtype` is the one that is trained in"
        ),
    )
    quantize: Literal["8bit", "4bit"] | None = Field(
        None,
        description=(
            "with LoRA: hold the frozen weights of the transformer's large layers in 8 or 4 bits,"
            " for training, rollouts, the reference and evaluations alike; needs bitsandbytes, the"
            " extra quantize"
        ),
    )
    attention_backend: str | None = Field(
        None, description="a diffusers attention backend; null: diffusers' own choice"
    )
    gradient_checkpointing: bool = Field(
        False, description="trade a second forward for activation memory"
    )
    vae_slicing: bool = Field(
        False, description="decode images one after another: less memory for a decode_batch of many"
    )
    vae_tiling: bool = Field(
        False, description="decode large images in overlapping tiles: less memory, seams may show"
    )
    offload_text_encoders: bool = Field(
        False,
        description=(
            "keep the text encoders in host memory and bring each layer to the GPU for its forward"
            " alone; the same embeddings, but every text reads all weights over the bus"
        ),
    )
    max_sequence_length: Annotated[int, Field(ge=1, le=65536)] | None = Field(
        None,
        description=(
            "text tokens; null: the default of the family's diffusers pipeline "
            "(FLUX.1, FLUX.2, Qwen-Image, Z-Image, Wan 512, SD3.5 256)"
        ),
    )
