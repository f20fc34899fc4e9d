"""Models of real shapes with random weights that are made on the device, and a session around them.
Only JSON files are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import torch
from bench import changed
from make_pipeline import random_model, shrunk

from gpu_steps.context import ROOT, Context
from tempflow.config import Config, load_config
from tempflow.models.hub import CARDS
from tempflow.models.skeleton import not_loaded
from tempflow.training.rehearse import LAYERS
from tempflow.types import Example

CONFIGS = {
    "flux-dev": "flux_lora",
    "sd35-medium": "sd35_lora",
    "qwen-image": "qwen_image_lora",
    "flux2-klein-base-4b": "flux2_klein_lora",
    "z-image": "z_image_lora",
    "qwen-image-2.1": "qwen_image_21_lora",
    "wan21-1b": "wan21_1b_lora",
}
# Editing and control models are left out: they run the same transformers on more tokens, and need
# condition images. So is Wan 2.2, whose two experts are of wan21-1b's class.
TINY = 0.02  # scale of a rehearsal's models
PIXELS, TOKENS, FRAMES = 64, 16, 5  # of a rehearsal's images, texts and videos


def card_folder(card: str, scratch: Path, layers: int | None, rehearse: bool) -> Path:
    """A copy of a model card's folder whose transformer has fewer layers; in a rehearsal also fewer
    heads."""
    folder = scratch / f"{card}-{layers or 'all'}"
    shutil.copytree(CARDS / card, folder)
    file = folder / "transformer/config.json"
    config = json.loads(file.read_text())
    if rehearse:
        config = shrunk(config, TINY)
        _narrow(folder / "vae/config.json")
    elif layers:
        config |= {key: layers for key in LAYERS if key in config}
        config |= {"dual_attention_layers": [0]} if config.get("dual_attention_layers") else {}
    file.write_text(json.dumps(config))
    return folder


def _narrow(file: Path) -> None:
    """Give a VAE few channels, with the same number of blocks."""
    config = json.loads(file.read_text())
    config |= (
        {"block_out_channels": [32] * len(config["block_out_channels"])}
        if "block_out_channels" in config
        else {"base_dim": 16}
    )
    file.write_text(json.dumps(config))


def card_config(card: str, folder: Path, rehearse: bool, *settings: str) -> Config:
    """The shipped config of a card, for `folder`: with one unit, the JPEG reward in this process,
    and no second copy of the transformer."""
    own = [
        f"model.path={folder}",
        "data.prompts_per_iteration=1",
        "rollout.plan.seeds=1",
        "rollout.plan.branch_steps=[0,4,8]",
        "rollout.replica=false",
        "rollout.graphs=false",
        "rollout.suffix=null",
        f"rewards={json.dumps({'jpeg': _jpeg(card)})}",
        "reward_pool.workers=0",
        'training.updates={"passes": 1, "parts": 1}',
        "training.ema=null",
        "eval.every=0",
    ]
    if rehearse:
        own += [
            f"rollout.height={PIXELS}",
            f"rollout.width={PIXELS}",
            f"rollout.frames={FRAMES if _makes_videos(card) else 1}",
            f"model.max_sequence_length={TOKENS}",
            "rollout.plan.children=2",
            "rollout.plan.branch_steps=[0,2]",
            "rollout.num_steps=4",
            "model.dtype=float32",
            "deepspeed.bf16={}",
        ]
    config = load_config(ROOT / f"configs/{CONFIGS[card]}.json", [*own, *settings])
    return changed(config, data={"embedding_cache": None})


def _makes_videos(card: str) -> bool:
    return load_config(ROOT / f"configs/{CONFIGS[card]}.json").rollout.frames > 1


def _jpeg(card: str) -> float | dict:
    """The JPEG reward's config entry. It scores images, so for videos it takes two frames."""
    return {"weight": 1.0, "frames": 2} if _makes_videos(card) else 1.0


def random_policy(config: Config, device: torch.device, dtype: torch.dtype):
    """A policy whose folder has only JSON files: transformer and VAE have random weights on the
    device, and embeddings of texts are random."""
    import diffusers

    from tempflow.models import check_text_length, family_of

    folder = Path(config.model.path)
    index = json.loads((folder / "model_index.json").read_text())
    parts = {}
    for name in ("transformer", "vae"):
        settings = json.loads((folder / name / "config.json").read_text())
        parts[name] = random_model("diffusers", index[name][1], settings, str(device), dtype)
    parts["scheduler"] = getattr(diffusers, index["scheduler"][1]).from_pretrained(
        folder / "scheduler"
    )
    named = {
        name: parts.get(name, not_loaded(name))
        for name, value in index.items()
        if isinstance(value, list)
    }
    length = check_text_length(str(folder), config.model.max_sequence_length)
    policy = family_of(str(folder))(
        getattr(diffusers, index["_class_name"])(**named), device=device, max_sequence_length=length
    )
    described = type(policy).skeleton(str(folder), policy.dtype, length)
    described.size = config.rollout.size

    def embed(examples: list[Example]) -> dict[str, torch.Tensor]:
        return {name: _embedding(like, device) for name, like in described.embed(examples).items()}

    policy.embed = embed
    return policy


def _embedding(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Ones for a mask, otherwise normal numbers, in the shape of `like`."""
    return (torch.ones_like if like.dtype == torch.bool else torch.randn_like)(like, device=device)


class RandomEngine:
    """A session with a random policy. `start_training` gives the policy's own transformer to
    DeepSpeed."""

    def __init__(self, context: Context, card: str, layers: int | None, *settings: str):
        from tempflow.data.prompts import PromptOrder, load_prompts
        from tempflow.models.embeddings import EmbeddingCache
        from tempflow.rewards import RewardPool, parse_rewards
        from tempflow.training import distributed
        from tempflow.training.session import assemble

        distributed.init_distributed()
        config = card_config(
            card,
            card_folder(card, context.scratch, layers, context.rehearse),
            context.rehearse,
            *settings,
        )
        before = context.allocated()
        policy = random_policy(config, context.device, context.dtype)
        self.weights = None if before is None else context.allocated() - before  # bytes
        specs, prompts = parse_rewards(config.rewards), load_prompts(config.data.train)
        self.order = PromptOrder(len(prompts), 1, 0)
        self.session = assemble(
            config, policy, EmbeddingCache(policy), RewardPool(specs, workers=0), specs, prompts
        )

    def start_training(self) -> None:
        from tempflow.training import engine as runtime

        s = self.session
        with mock.patch.object(
            runtime, "load_denoiser", lambda path, dtype: s.policy.denoiser().to(dtype)
        ):
            s.runtime = runtime.Runtime(s.config, s.policy)
