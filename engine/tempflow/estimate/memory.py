"""Bytes on each GPU and in host memory.

Weights, gradients, optimizer state and averages are counted exactly. What a forward and a backward
hold is measured on the meta device at one to three rows and continued along a line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tempflow.config import Config
from tempflow.estimate.costs import ONE, busiest_units, training_rows, unit_rows, unit_states
from tempflow.estimate.item import Item
from tempflow.estimate.model import Model, Weights
from tempflow.estimate.processes import process_items
from tempflow.estimate.zero import Zero
from tempflow.models.embeddings import KEPT, KEPT_OF_STORE
from tempflow.rewards import parse_rewards
from tempflow.training.precision import shares_base
from tempflow.training.reference_policy import placement


@dataclass(frozen=True)
class Memory:
    """Of one GPU and its process."""

    resident: list[Item]
    """On every GPU, all the time."""
    moments: list[Item]
    """On top, one at a time."""
    host: list[Item]
    """Of every process, at most."""
    start: int
    """Host memory of every process while it loads."""
    unknown: list[str]
    """Rewards on the GPU whose models are not counted, because their size is not known."""
    embedding: list[Item]
    """On every GPU while prompts are embedded, before the rest is loaded, without the encoders'
    activations; empty where the text encoders stay."""

    @property
    def running(self) -> int:
        return sum(item.bytes for item in self.resident) + max(item.bytes for item in self.moments)

    @property
    def embeds(self) -> int:
        return sum(item.bytes for item in self.embedding)

    @property
    def total(self) -> int:
        return max(self.running, self.embeds)


def memory_of(config: Config, model: Model, zero: Zero, gpus: int, prompts: int) -> Memory:
    """prompts: how many the training file holds."""
    r, weights, sizes, where = config.rollout, model.weights, model.sizes, placement(config)
    plain, vae = sizes["denoiser"], sizes.get("vae", 0)
    encoders, offload = model.encoders(False), config.model.offload_text_encoders
    encoding = Item(
        "text encoders",
        model.encoders(offload),
        "data.embedding_cache, model.offload_text_encoders, model.dtype",
    )
    reference, offloaded = _reference(where, zero, weights)
    forward, evaluated = _inference(config, model, gpus)
    rows, shared = training_rows(config, gpus, model.ragged), shares_base(config, "cuda")
    own = plain if r.replica and not shared else 0
    stay = config.data.embedding_cache is None  # otherwise they are gone before the rest is loaded
    processes, unknown = process_items(config)
    resident = [
        *processes,
        *([encoding] if stay else []),
        Item("VAE", vae, "model.dtype"),
        Item("rollout copy", own, "model.share_base, rollout.replica, model.dtype"),
        Item("rollout copy: adapters", model.adapters if shared else 0, "model.lora"),
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
        Item(
            "CUDA graph of the rollout",
            forward if r.graphs else 0,
            "rollout.graphs, rollout.micro_batch",
        ),
        Item("latents, embeddings", _held(config, model, gpus), "data.prompts_per_iteration"),
    ]
    moments = [
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
            _refresh(config, weights, model.trained_in, shared),
            "rollout.refresh_bucket",
        ),
    ]
    average = zero.whole_fp32 * config.averaged_copies()
    (each, negative), seen = model.embedding, _prompts_seen(config, gpus, prompts)
    host = [
        Item(
            "average: this process's share",
            -(-average // gpus),
            "training.ema, training.merge.last",
        ),
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
            encoders if stay and offload else 0,
            "data.embedding_cache, model.offload_text_encoders",
        ),
        Item("offloaded by DeepSpeed", zero.offloaded, "zero_optimization.offload_*"),
        Item("reference copy: this process's share", offloaded, "training.reference"),
    ]
    rest = vae + own
    start = max(encoders + rest if stay else max(encoders, rest), weights.bytes, weights.loaded)
    embedding = [*processes, encoding, Item("VAE", vae * model.embeds_with_vae, "model.dtype")]
    resident, moments, host, embedding = (
        [item for item in items if item.bytes]
        for items in (resident, moments, host, [] if stay else embedding)
    )
    return Memory(resident, moments, host, start, unknown, embedding)


def _inference(config: Config, model: Model, gpus: int) -> tuple[int, int]:
    """The most that a forward holds in a rollout, and in an evaluation, whose guidance may be
    another. Both decode alike."""
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
    """(on the GPU, in host memory) of the frozen copy, without the layers gathered while it
    runs."""
    if where in (None, "whole"):
        return (weights.bytes if where else 0), 0
    buffers = weights.bytes - weights.lasting
    return (buffers, zero.share) if where == "offloaded" else (buffers + zero.share, 0)


def _refresh(config: Config, weights: Weights, dtype: torch.dtype, shared: bool) -> int:
    """The weights under way from the training engine, or from the average, to the rollout copy, and
    one with its adapter merged."""
    r, averaged = config.rollout, config.averaging() is not None
    if not r.replica:
        return 0
    if shared:
        # from weights that are merged one by one
        converted = r.suffix is not None and r.suffix.weights == "float8"
        bucket = 4 * min(r.refresh_bucket, weights.trained) if averaged else 0
        return max(bucket, (4 + dtype.itemsize) * weights.largest_adapted if converted else 0)
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    each = 4 if averaged and config.model.lora is None else dtype.itemsize if stage == 3 else 0
    return min(r.refresh_bucket, weights.parameters) * each + 4 * weights.largest_adapted


def _held(config: Config, model: Model, gpus: int) -> int:
    """States, once as rolled out and once as micro-batches, the latents under way, and the prompts'
    embeddings."""
    r, t = config.rollout, config.training
    units, children, elements = (
        busiest_units(config, gpus),
        unit_states(config),
        math.prod(model.latent),
    )
    # a micro-batch has as many children for every state
    widened = len(children) * max(children, default=0)
    stored = units * (2 * len(children) + sum(children) + widened) * 4
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
    # rows that stand at a path's states until the paths have gone on
    waiting = sum(row.value for row in config.plan().rows(ONE, 0))
    under_way = (units * (1 + waiting) + r.rows) * 4
    embeddings = sum(model.embedding) * min(config.data.prompts_per_iteration, units)
    return (stored + velocities + under_way) * elements + embeddings


def _sent(config: Config, gpus: int) -> int:
    """The decoded batch, and the frames that rewards of the training are given, where all of an
    iteration wait for the workers."""
    r, trained = (
        config.rollout,
        [spec for spec in parse_rewards(config.rewards) if not spec.watched],
    )
    asked = sum(spec.frames for spec in trained if spec.frames is not None)
    # one copy for all rewards that get whole videos
    asked += r.frames if any(spec.frames is None for spec in trained) else 0
    waiting = (
        busiest_units(config, gpus) * len(unit_rows(config)) * asked
        if config.reward_pool.workers
        else 0
    )
    return (r.decode_batch * r.frames + waiting) * 3 * r.height * r.width


def _prompts_seen(config: Config, gpus: int, prompts: int) -> int:
    """Different prompts that a process embeds and keeps in a run over `prompts` of them."""
    trained = min(
        prompts,
        config.training.iterations
        * min(config.data.prompts_per_iteration, busiest_units(config, gpus)),
    )
    heldout = -(-config.eval.prompts // gpus) if config.data.heldout and config.eval.every else 0
    return min(trained + heldout, KEPT if config.data.embedding_cache is None else KEPT_OF_STORE)


def _rows(number: int) -> str:
    return "one row" if number == 1 else f"{number} rows" if number < 10**9 else "very many rows"
