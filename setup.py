"""Packages `tempflow` (from engine/) and `tempflow_kernels` (from kernels/) as one distribution."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
DATASETS = ["datasets>=4.0"]  # prompts from hub datasets
SERVER = ["fastapi>=0.115", "uvicorn>=0.30"]  # engine/reward_server.py
QUANTIZE = ["bitsandbytes>=0.50"]  # deepspeed.optimizer of type AdamW8bit
DOCS = [  # the documentation site: make docs
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.5",
    "mkdocstrings>=1.0",
    "mkdocstrings-python>=2.0",
    "latex2mathml>=3.78",
]
GENEVAL = ["scipy>=1.11"]  # recipes/geneval.py: transformers' Mask2Former asks for it

setup(
    name="tempflow-grpo",
    version="0.1.0",
    description="Reinforcement learning of flow-matching text-to-image models with TempFlow-GRPO",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages("engine") + find_packages("kernels"),
    package_dir={"tempflow": "engine/tempflow", "tempflow_kernels": "kernels/tempflow_kernels"},
    package_data={
        "tempflow": ["assets/**/*", "run/report/*.html", "run/report/*.css", "run/report/*.js"]
    },
    entry_points={
        "console_scripts": [
            f"tempflow-{name.replace('_', '-')} = tempflow.commands.{name}:command"
            for name in (
                "train",
                "evaluate",
                "sample",
                "export",
                "merge",
                "refine",
                "reward_server",
            )
        ]
    },
    install_requires=[
        "torch>=2.9",
        "diffusers>=0.38",
        "transformers>=5.0",
        "accelerate>=1.0",
        "peft>=0.18",
        "deepspeed>=0.18.3",
        "safetensors>=0.6",
        "sentencepiece",
        "protobuf",
        "numpy",
        "nvtx>=0.2.12",
        "pillow",
        "pydantic>=2.10",
        "rich>=13",
        "tensorboard>=2.18",
        "rapidocr>=3.10,<4",
        "onnxruntime>=1.19",
        "ninja",
    ],
    extras_require={
        "gpu": ["triton>=3.5", "xformers>=0.0.33"],  # all with wheels: no compiler, no CUDA toolkit
        "flash": ["flash-attn>=2.6.3"],  # no wheel: compiled on the spot with nvcc, after torch
        "wandb": ["wandb"],
        "server": SERVER,
        "quantize": QUANTIZE,
        "geneval": GENEVAL,
        "datasets": DATASETS,
        "docs": DOCS,
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "matplotlib>=3.8",
            "triton>=3.5",
            "ruff",
            *SERVER,
            *QUANTIZE,
            *GENEVAL,
            *DATASETS,
            *DOCS,
        ],
    },
)
