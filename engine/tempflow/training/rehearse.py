"""The child process of `training.rehearsal`: captures a small rollout of a run's kind.

`python -m tempflow.training.rehearse` reads {"config": ..., "device": ...} from stdin and writes
{"refusal": reason or null} as the last line of stdout. The transformer has two layers of the
checkpoint's config with random weights, in the run's dtype, attention backend and compilation. The
rollout is the trainer's own, with the run's plan and suffix at a small size. The VAE and the text
encoders are not made; embeddings are random and images are black.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import cast

import torch

from tempflow.compat import kept_in_float32
from tempflow.config import Config, parse_config
from tempflow.errors import UserError
from tempflow.media import plain
from tempflow.types import Example

SIDE = 256  # pixels, at most
# Number of layers to keep, by key of the transformer's config. With two of these keys, a
# transformer has blocks of two kinds and gets one of each.
LAYERS = {"num_layers": 2, "num_single_layers": 1, "n_layers": 2, "n_refiner_layers": 1}


def rehearse(config: Config, device: torch.device, capture) -> str | None:
    """Roll out twice through a graph cache.

    Args:
        config: the run's config.
        device: the device to try.
        capture: captures forwards, as `tempflow.sampling.graphs.CudaCapture`.

    Returns:
        The reason why forwards would not be captured in the run, or None.
    """
    from tempflow.models.embeddings import EmbeddingCache
    from tempflow.rewards import RewardPool, parse_rewards
    from tempflow.training.rollout import gather_rewards, plan_iteration, roll_out
    from tempflow.training.session import assemble, make_graphs

    notes: list[str] = []
    policy = small_policy(config, device)
    vae_config, family = policy.pipe.vae.config, type(policy)
    config = small_config(config, family.size_multiple(vae_config), family.frame_step(vae_config))
    policy.size = config.rollout.size
    graphs, specs = (
        make_graphs(config, policy, notes.append, capture),
        parse_rewards(config.rewards),
    )
    with RewardPool(specs, **config.reward_pool.pool()) as pool:
        session = assemble(
            config,
            policy,
            EmbeddingCache(policy),
            pool,
            specs,
            [Example("a word")],
            graphs=graphs,
            note=notes.append,
        )
        # The first rollout captures its forwards, and the second one must replay them.
        for iteration in range(2):
            gather_rewards(
                session,
                roll_out(  # type: ignore[arg-type]  # without a stop a rollout always ends
                    session,
                    plan_iteration(session, [0], iteration),
                    iteration,
                    config.rollout.suffix,
                ),
            )
    if notes:
        return notes[0].removeprefix("rollout.graphs: ")
    assert graphs  # the config asks for them
    return None if graphs.captures else "nothing was captured"


def small_config(config: Config, multiple: int, frame_step: int | None = None) -> Config:
    """The config with a rollout of a few rows at a small size, and a reward that loads no model.

    Args:
        config: the run's config.
        multiple: as of `Policy.size_multiple`.
        frame_step: as of `Policy.frame_step`; None for images.
    """
    # Through JSON and parse_config, so that the result passes the checks of a user's config.
    table = json.loads(config.model_dump_json())
    r = table["rollout"]
    side = multiple * max(1, SIDE // multiple)
    frames = min(r["frames"], 1 + (frame_step or 0))
    r |= {
        "height": min(r["height"], side),
        "width": min(r["width"], side),
        "frames": frames,
        "micro_batch": 2,
        "lanes": 1,
    }
    r["plan"] |= {key: 2 for key in ("seeds", "children") if key in r["plan"]}
    table |= {
        "rewards": {"jpeg": {"frames": 1} if frames > 1 else 1.0},
        "reward_pool": {"workers": 0},
    }
    table["eval"]["stop"] = None  # it may name a reward that was replaced above
    return parse_config(table)


def small_policy(config: Config, device: torch.device):
    """The run's policy on a device, with two layers, and random embeddings of the run's length."""
    import diffusers

    from tempflow.models import check_text_length, family_of, resolve_dtype
    from tempflow.models.attention import set_attention_backend
    from tempflow.models.component import is_component
    from tempflow.models.skeleton import not_loaded, plain_options
    from tempflow.training.engine import compile_blocks

    path, dtype = config.model.path, resolve_dtype(config.model.dtype, device)
    index = diffusers.DiffusionPipeline.load_config(path)
    family, kind = family_of(path), getattr(diffusers, index["_class_name"])
    parts = plain_options(kind, index) | {
        name: not_loaded(name) for name, value in index.items() if is_component(value)
    }
    for name in family.denoiser_parts(index):
        parts[name] = _small_transformer(
            path, name, getattr(diffusers, index[name][1]), dtype, device
        )
    parts["scheduler"] = getattr(diffusers, index["scheduler"][1]).from_pretrained(
        path, subfolder="scheduler"
    )
    parts["vae"] = _described(path, getattr(diffusers, index["vae"][1]))
    policy = family(
        kind(**parts),
        device=device,
        max_sequence_length=check_text_length(path, config.model.max_sequence_length),
    )
    policy.set_denoiser(_as_rolled_out(config, policy.denoiser(), family.lora_targets, device))
    set_attention_backend(policy.denoiser(), config.model.attention_backend)
    compile_blocks(policy.denoiser(), config.rollout.compile)
    # Stand-ins for two methods of this object alone.
    vars(policy).update(
        embed=_embeddings(config, policy),
        pixels=lambda latents, size: (
            torch.from_numpy(plain(len(latents), size, 0)),
            torch.ones(len(latents), dtype=torch.bool),
        ),
    )
    return policy


def _small_transformer(
    path: str, name: str, kind, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    table = kind.load_config(path, subfolder=name)
    layers = {key: most for key, most in LAYERS.items() if key in table}
    layers = dict.fromkeys(layers, 1) if len(layers) == 2 else layers
    table |= {key: min(table[key], most) for key, most in layers.items()}
    # SD3.5's list of layers with a second attention: it must not name layers that are gone.
    if table.get("dual_attention_layers"):
        table["dual_attention_layers"] = [0]
    with torch.device(device):
        module = kind.from_config(table)
    # Loading leaves some weights in fp32; a module made from a config must have the same dtypes.
    kept = kept_in_float32(module, dtype)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return module


def _as_rolled_out(
    config: Config, module: torch.nn.Module, targets: tuple[str, ...], device: torch.device
) -> torch.nn.Module:
    """The module as the run's rollout copy: with adapters beside its weights if the copy shares the
    base, on those target layers that the small module has."""
    from tempflow.training.engine import ADAPTER, add_lora
    from tempflow.training.precision import shares_base
    from tempflow.training.shared_base import adopt, bare_copy

    if not shares_base(config, device.type):
        return module
    lora = config.model.lora
    assert lora  # the base is shared with adapters beside it
    layers = [name for name, _ in module.named_modules()]
    here = [
        t
        for t in lora.targets or targets
        if any(name == t or name.endswith("." + t) for name in layers)
    ]
    if not here:
        return module
    copy = bare_copy(module, cast(torch.dtype, module.dtype))
    with device:
        add_lora(module, lora.model_copy(update={"targets": here, "start": None}), targets, 0)
    adopt(copy, module, ADAPTER)
    return copy


@dataclass
class _Described:
    """The attributes of a VAE that pipelines and policies read, without its weights."""

    config: dict
    temperal_downsample: list | None


def _described(path: str, kind) -> _Described:
    with torch.device("meta"):
        vae = kind.from_config(kind.load_config(path, subfolder="vae"))
    return _Described(vae.config, getattr(vae, "temperal_downsample", None))


def _embeddings(config: Config, policy):
    """A stand-in for `policy.embed`: random tensors of the shapes that the real one returns."""
    # A skeleton of the whole pipeline on the meta device gives the shapes.
    described = type(policy).skeleton(config.model.path, policy.dtype, policy.max_sequence_length)

    def embed(examples: list[Example]) -> dict[str, torch.Tensor]:
        made = {}
        with described.embedding_for(policy.size):
            likes = described.embed(examples)
        for name, like in likes.items():
            if like.is_floating_point():
                made[name] = torch.randn_like(like, device=policy.device)
            # A mask. Half of it is 0, because some code treats a mask of ones as none at all.
            else:
                made[name] = torch.ones_like(like, device=policy.device)
                made[name][:, like.shape[1] // 2 + 1 :] = 0
        return made

    return embed


def main() -> None:
    from tempflow import cli

    cli.quiet_libraries()
    request = json.load(sys.stdin)
    from tempflow.sampling.graphs import CudaCapture

    device = torch.device(request["device"])
    torch.cuda.set_device(device)
    try:
        refusal = rehearse(parse_config(request["config"]), device, CudaCapture())
    except UserError as error:  # also raised when a capture failed
        refusal = str(error)
    # Whatever goes wrong is a reason not to capture, and never one to end the run.
    except Exception as error:
        refusal = f"{type(error).__name__}: {error}"
    print(json.dumps({"refusal": refusal}), flush=True)


if __name__ == "__main__":
    main()
