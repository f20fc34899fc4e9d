"""Estimate the memory of each GPU and of each process on the host.

Weights, gradients, optimizer state and averages are counted exactly. What a forward and a backward
hold is measured on the meta device for up to three rows, and extrapolated linearly for more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tempflow.config import Config
from tempflow.estimate.costs import busiest_units, training_rows, unit_rows, unit_states
from tempflow.estimate.item import Item
from tempflow.estimate.model import Model, Weights
from tempflow.estimate.processes import process_items
from tempflow.estimate.zero import Zero
from tempflow.models.embeddings import KEPT, KEPT_OF_STORE
from tempflow.rewards import parse_rewards
from tempflow.training.precision import shares_base
from tempflow.training.reference_policy import placement
from tempflow.types import ANY_UNIT


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU and of its process."""

    resident: list[Item]
    """Device memory that is in use all the time."""
    moments: list[Item]
    """Device memory in addition, for one of these at a time."""
    host: list[Item]
    """Host memory of the process while it trains; upper bounds."""
    start: int
    """Host memory of the process while it loads, in bytes."""
    unknown: list[str]
    """Rewards on the GPU whose models are not counted, because their size is not known."""
    embedding: list[Item]
    """Device memory while prompts are embedded, before the rest is loaded, without the activations
    of the text encoders; empty if the encoders stay in memory."""

    @property
    def running(self) -> int:
        """Most bytes of the GPU during training."""
        return sum(item.bytes for item in self.resident) + max(item.bytes for item in self.moments)

    @property
    def embeds(self) -> int:
        """Bytes of the GPU while prompts are embedded."""
        return sum(item.bytes for item in self.embedding)

    @property
    def total(self) -> int:
        """Most bytes of the GPU at any time."""
        return max(self.running, self.embeds)


def memory_of(config: Config, model: Model, zero: Zero, gpus: int, prompts: int) -> Memory:
    """Estimate the memory of a run.

    Args:
        config: of the run.
        model: its model without weights.
        zero: how DeepSpeed distributes the trained weights.
        gpus: number of GPUs.
        prompts: number of training prompts.
    """
    # Two times must fit: embedding the prompts, which comes first, and training. If the encoders
    # stay, embedding is a part of the second.
    stay = _encoders_stay(config)
    processes, unknown = process_items(config)
    resident = [
        *processes,
        *([_encoders(config, model)] if stay else []),
        *_resident(config, model, zero, gpus),
    ]
    vae = Item("VAE", model.vae * model.embeds_with_vae, "model.dtype")
    embedding = [] if stay else [*processes, _encoders(config, model), vae]
    resident, moments, host, embedding = (
        [item for item in items if item.bytes]
        for items in (
            resident,
            _moments(config, model, zero, gpus),
            _host(config, model, zero, gpus, prompts),
            embedding,
        )
    )
    return Memory(resident, moments, host, _loading(config, model), unknown, embedding)


def _encoders_stay(config: Config) -> bool:
    """Whether the text encoders stay in memory; else they are removed before the rest is loaded."""
    return config.data.embedding_cache is None


def _encoders(config: Config, model: Model) -> Item:
    return Item(
        "text encoders",
        model.encoders(config.model.offload_text_encoders),
        "data.embedding_cache, model.offload_text_encoders, model.dtype",
    )


def _rollout_copy(config: Config, model: Model) -> int:
    """Bytes of a rollout copy with weights of its own; 0 if none exists, or it shares the base."""
    own = config.rollout.replica and not shares_base(config, "cuda")
    return model.sizes["denoiser"] if own else 0


def _resident(config: Config, model: Model, zero: Zero, gpus: int) -> list[Item]:
    """What is on every GPU all the time, without processes and text encoders."""
    r, where = config.rollout, placement(config)
    reference, _ = _reference(where, zero, model.weights)
    forward, _ = _inference(config, model, gpus)
    return [
        Item("VAE", model.vae, "model.dtype"),
        Item(
            "rollout copy",
            _rollout_copy(config, model),
            "model.share_base, rollout.replica, model.dtype",
        ),
        Item(
            "rollout copy: adapters",
            model.adapters if shares_base(config, "cuda") else 0,
            "model.lora",
        ),
        Item(
            "float8 copy for suffixes",
            model.float8 if r.suffix and r.suffix.weights == "float8" else 0,
            "rollout.suffix.weights",
        ),
        Item(
            "training engine: parameters",
            zero.parameters,
            "model.lora, model.quantize, zero_optimization.stage, bf16",
        ),
        Item("training engine: gradients", zero.gradients, "model.lora, zero_optimization.stage"),
        Item(
            "training engine: optimizer",
            zero.optimizer,
            "model.lora, zero_optimization.stage, offload_optimizer",
        ),
        Item("training engine: buffers", zero.buffers, "zero_optimization: bucket sizes"),
        Item("reference copy", reference, "training.penalty, training.reference, model.lora"),
        Item(
            "layers of the reference, gathered",
            zero.gathered if where in ("sharded", "offloaded") else 0,
            "zero_optimization.stage3_max_live_parameters",
        ),
        # A graph keeps the memory that its forward needed, while other forwards run.
        Item(
            "CUDA graph of the rollout",
            forward if r.graphs else 0,
            "rollout.graphs, rollout.micro_batch",
        ),
        Item("latents, embeddings", _held(config, model, gpus), "data.prompts_per_iteration"),
    ]


def _moments(config: Config, model: Model, zero: Zero, gpus: int) -> list[Item]:
    """What a GPU holds in addition, for one of these at a time."""
    r, rows = config.rollout, training_rows(config, gpus, model.ragged)
    forward, evaluated = _inference(config, model, gpus)
    return [
        Item(
            f"training: activations of {_rows(rows)}",
            model.training(rows).bytes,
            "gradient_checkpointing, training.micro_batch",
        ),
        Item(f"rollout: a forward of {_rows(r.rows)}", forward, "rollout.micro_batch"),
        Item(
            "evaluation: a forward",
            evaluated if evaluated > forward else 0,
            "eval.guidance_scale, rollout.micro_batch",
        ),
        Item(
            f"decoding {_rows(r.decode_batch)}",
            model.decode().bytes * r.decode_batch,
            "rollout.decode_batch",
        ),
        Item("optimizer step", zero.step, "zero_optimization.stage, sub_group_size"),
        Item(
            "refreshing the rollout copy",
            _refresh(config, model.weights, model.trained_in, shares_base(config, "cuda")),
            "rollout.refresh_bucket",
        ),
    ]


def _host(config: Config, model: Model, zero: Zero, gpus: int, prompts: int) -> list[Item]:
    """What a process holds in host memory while it trains."""
    # The average is kept in host memory and dealt to the processes, whatever the ZeRO stage.
    average = zero.whole_fp32 * config.averaged_copies()
    (each, negative), seen = model.embedding, _prompts_seen(config, gpus, prompts)
    offloaded = _encoders_stay(config) and config.model.offload_text_encoders
    _, reference = _reference(placement(config), zero, model.weights)
    return [
        Item(
            "average: this process's share",
            -(-average // gpus),
            "training.ema, training.merge.last",
        ),
        # A family that edits embeds the negative prompt with each prompt's images; otherwise one
        # embedding of it serves all prompts.
        Item(
            "prompt embeddings",
            each * seen + negative * (seen if model.takes_images else 1),
            "model.max_sequence_length",
        ),
        Item(
            "images or videos on their way to rewards",
            _sent(config, gpus),
            "data.prompts_per_iteration, rewards.NAME.frames",
        ),
        Item(
            "text encoders in host memory",
            model.encoders(False) if offloaded else 0,
            "data.embedding_cache, model.offload_text_encoders",
        ),
        Item("offloaded by DeepSpeed", zero.offloaded, "zero_optimization.offload_*"),
        Item("reference copy: this process's share", reference, "training.reference"),
    ]


def _loading(config: Config, model: Model) -> int:
    """Bytes of host memory while a process loads."""
    encoders, rest = model.encoders(False), model.vae + _rollout_copy(config, model)
    parts = encoders + rest if _encoders_stay(config) else max(encoders, rest)
    # The training engine's transformer is loaded by itself; before adapters are added and layers
    # quantized it may be larger than afterwards.
    return max(parts, model.weights.bytes, model.weights.loaded)


def _inference(config: Config, model: Model, gpus: int) -> tuple[int, int]:
    """Bytes of a forward (in a rollout, in an evaluation). Both decode in the same way.

    They differ by guidance scale: without guidance there is no second half of a forward.
    """
    rows = config.rollout.rows
    evaluated = (
        min(rows, -(-config.eval.prompts // gpus))
        if config.data.heldout and config.eval.every
        else 0
    )
    return model.forward(rows).bytes, (
        model.forward(evaluated, config.eval_guidance()).bytes if evaluated else 0
    )


def _reference(where: str | None, zero: Zero, weights: Weights) -> tuple[int, int]:
    """Bytes of the reference policy (on the GPU, in host memory), without gathered layers."""
    if where in (None, "whole"):
        return (weights.bytes if where else 0), 0
    # Buffers are not parameters, so ZeRO neither partitions nor offloads them.
    buffers = weights.bytes - weights.lasting
    return (buffers, zero.share) if where == "offloaded" else (buffers + zero.share, 0)


def _refresh(config: Config, weights: Weights, dtype: torch.dtype, shared: bool) -> int:
    """Bytes of the buffers for updating the rollout copy.

    They hold a bucket of weights from the training engine or the average, and one weight in fp32
    into which its adapter is merged.
    """
    r, averaged = config.rollout, config.averaging() is not None
    if not r.replica:
        return 0
    if shared:
        # A shared base is not updated. The float8 copy is converted from weights that are merged
        # one by one; an average of the adapters comes in buckets of fp32.
        converted = r.suffix is not None and r.suffix.weights == "float8"
        bucket = 4 * min(r.refresh_bucket, weights.trained) if averaged else 0
        return max(bucket, (4 + dtype.itemsize) * weights.largest_adapted if converted else 0)
    full, spread = config.model.lora is None, config.zero_stage() == 3
    each = 4 if averaged and full else dtype.itemsize if spread else 0
    return min(r.refresh_bucket, weights.parameters) * each + 4 * weights.largest_adapted


def _held(config: Config, model: Model, gpus: int) -> int:
    """Bytes of states, latents and embeddings that an iteration holds on the GPU.

    States count twice: as the rollout made them, and as micro-batches.
    """
    r, t = config.rollout, config.training
    units, children, elements = (
        busiest_units(config, gpus),
        unit_states(config),
        math.prod(model.latent),
    )
    # A micro-batch is a rectangle: states with fewer children are padded to the most of any state.
    widened = len(children) * max(children, default=0)
    stored = units * (2 * len(children) + sum(children) + widened) * 4
    # Several updates need the old policy's velocity at every state, if the objective or a penalty
    # to the old policy uses more than its log-probabilities.
    penalty, repeated = config.penalty(), t.updates.passes * t.updates.parts > 1
    keeps_velocity = repeated and (
        config.objective().keeps_velocity or penalty is not None and not penalty.needs_reference
    )
    velocities = (
        units
        * len(children)
        * model.trained_in.itemsize
        * (config.needs_reference() + keeps_velocity)
    )
    # Rows for values wait at their state until the paths that leave it have gone on.
    waiting = sum(row.value for row in config.plan().rows(ANY_UNIT, 0))
    under_way = (units * (1 + waiting) + r.rows) * 4
    embeddings = sum(model.embedding) * min(config.data.prompts_per_iteration, units)
    return (stored + velocities + under_way) * elements + embeddings


def _sent(config: Config, gpus: int) -> int:
    """Bytes of the decoded batch, and of the images that wait for reward workers.

    An upper bound: all images of an iteration may be waiting at once. In-process rewards score each
    batch right away.
    """
    r, trained = (
        config.rollout,
        [spec for spec in parse_rewards(config.rewards) if not spec.watched],
    )
    asked = sum(spec.frames for spec in trained if spec.frames is not None)
    # Rewards of whole videos share one copy.
    asked += r.frames if any(spec.frames is None for spec in trained) else 0
    waiting = (
        busiest_units(config, gpus) * len(unit_rows(config)) * asked
        if config.reward_pool.workers
        else 0
    )
    return (r.decode_batch * r.frames + waiting) * 3 * r.height * r.width


def _prompts_seen(config: Config, gpus: int, prompts: int) -> int:
    """Number of different prompts that a process embeds and keeps, of `prompts` in the file."""
    # Units are dealt to ranks, so a process sees at most as many prompts per iteration as units.
    trained = min(
        prompts,
        config.training.iterations
        * min(config.data.prompts_per_iteration, busiest_units(config, gpus)),
    )
    heldout = -(-config.eval.prompts // gpus) if config.data.heldout and config.eval.every else 0
    return min(trained + heldout, KEPT if config.data.embedding_cache is None else KEPT_OF_STORE)


def _rows(number: int) -> str:
    return "one row" if number == 1 else f"{number} rows" if number < 10**9 else "very many rows"
