"""Estimate GPU memory beside training: CUDA contexts, workspaces, and reward models.

Each reward worker is a process with a CUDA context of its own and a copy of every reward model that
has `device: "cuda"`. The weights of these models are counted, the activations of their forwards are
not.
"""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import safe_open

from tempflow.config import Config
from tempflow.estimate.item import Item
from tempflow.rewards.base import Reward
from tempflow.rewards.neural.base import ModelReward
from tempflow.rewards.neural.weights import weight_files
from tempflow.rewards.registry import RewardSpec, build_reward, parse_rewards

# Bytes of a process's CUDA context, before its first tensor; 0.4 to 0.6 GB on recent cards.
CONTEXT = 500_000_000
# Bytes that cuDNN, cuBLAS and compiled kernels allocate on their own; an allowance, not measured.
WORKSPACES = 500_000_000
# Elements of published weights, of the parts that the rewards load.
PARAMETERS = {
    "MizzenAI/HPSv3": 7_744_923_136,  # Qwen2-VL-7B without its output layer
    "RE-N-Y/ImageReward": 303_301_632 + 141_977_088,  # BLIP-large's image and text towers
    "RE-N-Y/hpsv21": 986_109_441,  # CLIP ViT-H/14
    "openai/clip-vit-large-patch14": 427_616_513,
    "yuvalkirstain/PickScore_v1": 986_109_441,
}


def process_items(config: Config) -> tuple[list[Item], list[str]]:
    """Memory of one GPU beside training.

    Returns:
        The items, and the names of rewards on the GPU whose size is unknown.
    """
    on_gpu = [
        spec for spec in parse_rewards(config.rewards) if spec.options.get("device") == "cuda"
    ]
    workers, keys = config.reward_pool.workers, "reward_pool.workers"
    items = [Item("CUDA context, libraries' workspaces (an allowance)", CONTEXT + WORKSPACES)]
    if on_gpu:
        items.append(Item(f"reward workers: {workers} CUDA contexts", workers * CONTEXT, keys))
    unknown = []
    for spec in on_gpu:
        size, copies = _model_bytes(spec), max(1, workers)
        if size is None:
            unknown.append(spec.name)
        else:
            label = f"reward {spec.name}: {copies} copies" if copies > 1 else f"reward {spec.name}"
            items.append(Item(label, copies * size, f"rewards.{spec.name}.dtype, {keys}"))
    return items, unknown


def _model_bytes(spec: RewardSpec) -> int | None:
    """Bytes of a reward's weights in its dtype; None if its class or repository is unknown here."""
    # The constructor is cheap by contract: models are loaded in `load`.
    reward: Reward = build_reward(spec.name, spec.options, spec.type)
    if not isinstance(reward, ModelReward):
        return None
    source = Path(reward.path).expanduser()
    elements = (
        _elements(f"rewards.{spec.name}.path", source)
        if source.exists()
        else PARAMETERS.get(reward.path)
    )
    return None if elements is None else elements * reward.torch_dtype.itemsize


def _elements(key: str, source: Path) -> int:
    """Number of floating-point elements in safetensors files, read from their headers.

    Integer tensors (position ids) are left out: they do not take the model's dtype.
    """
    count = 0
    for file in weight_files(key, source):
        with safe_open(file, "pt") as tensors:
            slices = (tensors.get_slice(name) for name in tensors.keys())
            count += sum(
                math.prod(s.get_shape()) for s in slices if s.get_dtype().startswith(("F", "BF"))
            )
    return count
