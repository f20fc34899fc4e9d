"""The numbers of a dry run: bytes on each GPU and in host memory, forwards and seconds of an iteration.

Weights, gradients, optimizer state, averages and forwards are counted exactly. What a forward and a backward hold is measured on
the meta device at one to three rows and continued along a line. Seconds are floating point operations over the stated speed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from tempflow import types
from tempflow.config import Config, Lora
from tempflow.errors import UserError
from tempflow.estimate import measure
from tempflow.estimate.advice import Advice, changes
from tempflow.estimate.disk import Disk, disk
from tempflow.estimate.families import Forward, Size
from tempflow.estimate.item import Item
from tempflow.estimate.model import Model, module_bytes, tensor_bytes
from tempflow.estimate.processes import process_items
from tempflow.estimate.zero import Zero
from tempflow.models.embeddings import KEPT, KEPT_OF_STORE
from tempflow.models.hub import local_model
from tempflow.models.loading import check_model, check_size, check_text_length, resolve_dtype
from tempflow.sampling.float8 import float8_bytes
from tempflow.sampling.plans import Unit, build_plan
from tempflow.sampling.suffix import count_forwards
from tempflow.training.engine import engine_dtype
from tempflow.training.reference_policy import placement


@dataclass(frozen=True)
class Phase:
    """Part of an iteration. forwards: rows of all GPUs together; busiest: of the GPU that has most; flops: of one of them;
    seconds: of the busiest GPU; share: of iterations that have it."""

    name: str
    forwards: int
    busiest: int
    flops: int
    seconds: float
    share: float = 1.0


@dataclass(frozen=True)
class Memory:
    """resident: on every GPU, all the time. moments: on top, one at a time. host: of every process, at most; start: of
    every process while it loads. unknown: rewards on the GPU whose models are not counted, because their size is not known."""

    resident: list[Item]
    moments: list[Item]
    host: list[Item]
    start: int
    unknown: list[str]

    @property
    def total(self) -> int:
        return sum(item.bytes for item in self.resident) + max(item.bytes for item in self.moments)


@dataclass(frozen=True)
class Estimate:
    """What a run on `gpus` GPUs of `card` bytes each needs. trained, parameters: numbers of elements."""

    model: str
    gpus: int
    card: int
    speed: float
    parameters: int
    trained: int
    memory: Memory
    disk: Disk
    phases: list[Phase]
    advice: list[Advice]

    @property
    def total(self) -> int:
        return self.memory.total

    @property
    def fits(self) -> bool:
        return self.total <= self.card

    def phase(self, name: str) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)

    @property
    def seconds(self) -> float:
        """Of an iteration, evaluations and audits spread over all."""
        return sum(phase.seconds * phase.share for phase in self.phases)


def estimate(config: Config, *, gpus: int = 1, mfu: float = 0.4, card_gb: float = 80.0, peak_tflops: float = 989.0,
             prompts: int = KEPT, advise: bool = True) -> Estimate:  # fmt: skip
    """Numbers of a run, from the config and the model's JSON files. prompts: how many the training file holds.

    Raises UserError where the run would: an unusable model or size, fewer units of work than GPUs, an ill-typed DeepSpeed key.
    """
    model = Model(local_model(config.model.path))
    check_model(model.folder)
    check_size(model.folder, types.Size(config.rollout.height, config.rollout.width))
    units = config.data.prompts_per_iteration * config.plan().seeds
    if units < gpus:
        raise UserError(f"data.prompts_per_iteration x rollout.plan.seeds: {units} units for {gpus} GPUs")
    memory = _memory(config, model, gpus, prompts)
    card, speed = int(card_gb * 1e9), peak_tflops * 1e12 * mfu
    advice: list[Advice] = []
    if advise and memory.total > card:
        for setting, changed in changes(config):
            saving = memory.total - _memory(changed, model, gpus, prompts).total
            advice.append(Advice(setting, saving, memory.total - saving <= card))
    worth = sorted((a for a in advice if a.bytes > 0.005 * card), key=lambda a: -a.bytes)
    weights = _weights(model.folder, engine_dtype(config.deepspeed), _lora_key(config))
    phases = _phases(config, model, gpus, speed)
    return Estimate(config.model.path, gpus, card, speed, weights.parameters, weights.trained, memory, disk_of(config), phases, worth)


def disk_of(config: Config) -> Disk:
    """The disk that a run's checkpoints take, from the config and the model's JSON files; as quick as making the transformer on the
    meta device. UserError as `estimate`."""
    trained_in = engine_dtype(config.deepspeed)
    weights = _weights(local_model(config.model.path), trained_in, _lora_key(config))
    return disk(config, Zero(config.deepspeed, 1, weights, trained_in))


# ---------------------------------------------------------------------------------------------------------- memory
def _memory(config: Config, model: Model, gpus: int, prompts: int) -> Memory:
    r, folder = config.rollout, model.folder
    dtype, trained_in = resolve_dtype(config.model.dtype, "cuda"), engine_dtype(config.deepspeed)
    frozen, weights = _frozen_bytes(folder, dtype), _weights(folder, trained_in, _lora_key(config))
    plain = _weights(folder, dtype, None).bytes
    zero = Zero(config.deepspeed, gpus, weights, trained_in)
    where = placement(config)
    reference, offloaded = _reference(where, zero, weights)
    encoders = sum(size for name, size in frozen.items() if name != "vae")
    size = _size(config, model)
    forward, evaluated = _inference(config, model, gpus, dtype)
    stay = config.data.embedding_cache is None  # otherwise they are gone before the rest is loaded
    processes, unknown = process_items(config)
    resident = [
        *processes,
        Item("text encoders", encoders if stay else 0, "data.embedding_cache, model.dtype"),
        Item("VAE", frozen.get("vae", 0), "model.dtype"),
        Item("rollout copy", plain if r.replica else 0, "rollout.replica, model.dtype"),
        Item("float8 copy for suffixes", _float8(config, folder, dtype), "rollout.suffix.weights"),
        Item("training engine: parameters", zero.parameters, "model.lora, zero_optimization.stage, bf16"),
        Item("training engine: gradients", zero.gradients, "model.lora, zero_optimization.stage"),
        Item("training engine: optimizer", zero.optimizer, "model.lora, zero_optimization.stage, offload_optimizer"),
        Item("training engine: buffers", zero.buffers, "zero_optimization: bucket sizes"),
        Item("reference copy", reference, "training.penalty, training.reference, model.lora"),
        Item("layers of the reference, gathered", zero.gathered if where in ("sharded", "offloaded") else 0,
             "zero_optimization.stage3_max_live_parameters"),
        Item("CUDA graph of the rollout", forward if r.graphs else 0, "rollout.graphs, rollout.micro_batch"),
        Item("latents, embeddings", _held(config, model, gpus, dtype, trained_in), "data.prompts_per_iteration"),
    ]
    moments = [
        Item(f"training: activations of {_rows(_training_rows(config, gpus))}", _activations(config, model, gpus),
             "gradient_checkpointing, training.micro_batch"),
        Item(f"rollout: a forward of {_rows(r.micro_batch)}", forward, "rollout.micro_batch"),
        Item("evaluation: a forward", evaluated if evaluated > forward else 0, "eval.guidance_scale, rollout.micro_batch"),
        Item(f"decoding {_rows(r.decode_batch)}", _decode_pass(folder, dtype, size)[0] * r.decode_batch, "rollout.decode_batch"),
        Item("optimizer step", zero.step, "zero_optimization.stage, sub_group_size"),
        Item("refreshing the rollout copy", _refresh(config, weights, trained_in), "rollout.refresh_bucket"),
    ]  # fmt: skip
    average = zero.whole_fp32 if config.training.ema else 0
    each, negative = _embedding_bytes(folder, dtype, size)
    embedded = each * _prompts_seen(config, gpus, prompts) + negative
    host = [
        Item("average: this process's share", -(-average // gpus), "training.ema"),
        Item("prompt embeddings", embedded, "model.max_sequence_length"),
        Item("offloaded by DeepSpeed", zero.offloaded, "zero_optimization.offload_*"),
        Item("reference copy: this process's share", offloaded, "training.reference"),
    ]
    rest = frozen.get("vae", 0) + plain
    start = max(encoders + rest if stay else max(encoders, rest), weights.bytes)
    resident, moments, host = ([item for item in items if item.bytes] for items in (resident, moments, host))
    return Memory(resident, moments, host, start, unknown)


def _inference(config: Config, model: Model, gpus: int, dtype: torch.dtype) -> tuple[int, int]:
    """The most that a forward holds in a rollout, and in an evaluation, whose guidance may be another. Both decode alike."""
    size, rows = _size(config, model), config.rollout.micro_batch

    def held(size: Size, rows: int) -> int:
        return _line(lambda n: _forward_pass(model.folder, dtype, _at(size, n))[0], rows)

    if not (config.data.heldout and config.eval.every):
        return held(size, rows), 0
    evaluated = min(rows, -(-config.eval.prompts // gpus))
    return held(size, rows), held(replace(size, guided=config.eval_guidance() > 1), evaluated)


def _reference(where: str | None, zero: Zero, weights: Weights) -> tuple[int, int]:
    """(on the GPU, in host memory) of the frozen copy, without the layers gathered while it runs."""
    if where in (None, "whole"):
        return (weights.bytes if where else 0), 0
    buffers = weights.bytes - weights.lasting
    return (buffers, zero.share) if where == "offloaded" else (buffers + zero.share, 0)


def _refresh(config: Config, weights: Weights, dtype: torch.dtype) -> int:
    """The weights under way from the training engine, or from the average, to the rollout copy, and one with its adapter merged."""
    averaged = config.training.ema is not None and config.model.lora is None
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    each = 4 if averaged else dtype.itemsize if stage == 3 else 0
    bucket = min(config.rollout.refresh_bucket, weights.parameters) * each
    return bucket + 4 * weights.largest_adapted if config.rollout.replica else 0


def _float8(config: Config, folder: str, dtype: torch.dtype) -> int:
    suffix = config.rollout.suffix
    return float8_bytes(_module(folder, dtype, None)) if suffix and suffix.weights == "float8" else 0


def _held(config: Config, model: Model, gpus: int, dtype: torch.dtype, trained_in: torch.dtype) -> int:
    """Decisions, once as rolled out and once as micro-batches, the latents under way, and the prompts' embeddings."""
    r, t = config.rollout, config.training
    units, plan = _busiest_units(config, gpus), build_plan(config, [Unit(0, 0, 0, 0)], 0)
    size = _size(config, model)
    elements = math.prod(model.forward(_at(size, 1), dtype).latent)
    decisions = units * len(plan.steps)
    stored = decisions * (1 + plan.width) * 4
    batched = decisions * (1 + plan.width) * 4
    keeps_velocity = t.objective.get("ratio") == "guard" and t.updates.passes > 1
    velocities = decisions * trained_in.itemsize * ((t.penalty is not None) + keeps_velocity)
    under_way = (units + r.micro_batch) * 4
    embeddings = sum(_embedding_bytes(model.folder, dtype, size)) * min(config.data.prompts_per_iteration, units)
    return (stored + batched + velocities + under_way) * elements + embeddings


def _prompts_seen(config: Config, gpus: int, prompts: int) -> int:
    """Different prompts that a process embeds and keeps in a run over `prompts` of them."""
    trained = min(prompts, config.training.iterations * min(config.data.prompts_per_iteration, _busiest_units(config, gpus)))
    heldout = -(-config.eval.prompts // gpus) if config.data.heldout and config.eval.every else 0
    return min(trained + heldout, KEPT if config.data.embedding_cache is None else KEPT_OF_STORE)


def _activations(config: Config, model: Model, gpus: int) -> int:
    """The most that the forward and the backward of a micro-batch hold."""
    size = _size(config, model)
    return _line(lambda n: _training_peak(*_training_key(config, model), _at(size, n)), _training_rows(config, gpus))


def _training_key(config: Config, model: Model) -> tuple:
    return model.folder, engine_dtype(config.deepspeed), _lora_key(config), config.model.gradient_checkpointing


def _training_rows(config: Config, gpus: int) -> int:
    """Rows of the largest micro-batch: the trainer makes them even. Every decision is taken to have something to teach."""
    decisions = _busiest_units(config, gpus) * len(build_plan(config, [Unit(0, 0, 0, 0)], 0).steps)
    return -(-decisions // -(-decisions // config.training.micro_batch))


def _rows(number: int) -> str:
    return "one row" if number == 1 else f"{number} rows" if number < 10**9 else "very many rows"


def _busiest_units(config: Config, gpus: int) -> int:
    return -(-config.data.prompts_per_iteration * config.plan().seeds // gpus)


def _line(measured, rows: int) -> int:
    """A measurement at many rows, from those at two and three. One row is apart: much is broadcast then, not copied."""
    if rows <= 3:
        return measured(rows)
    two, three = measured(2), measured(3)
    return two + (rows - 2) * (three - two)


# ---------------------------------------------------------------------------------------------------------- phases
def _phases(config: Config, model: Model, gpus: int, speed: float) -> list[Phase]:
    r, t, folder = config.rollout, config.training, model.folder
    dtype = resolve_dtype(config.model.dtype, "cuda")
    one = _at(_size(config, model), 1)
    units, busiest = config.data.prompts_per_iteration * config.plan().seeds, _busiest_units(config, gpus)
    plan = build_plan(config, [Unit(0, 0, 0, 0)], 0)
    flops = _forward_pass(folder, dtype, one)[1]
    decode = _decode_pass(folder, dtype, one)[1]

    def phase(name: str, each: int, flops: int, share: float = 1.0) -> Phase:
        return Phase(name, units * each, busiest * each, flops, _seconds(busiest * each * flops, speed), share)

    decisions = len(plan.steps)
    phases = [phase("rollout", count_forwards(plan, r.num_steps, r.suffix), flops), phase("decode", len(plan.rows), decode)]
    if t.penalty:
        phases.append(phase("reference", decisions, flops))
    trained = _training_flops(*_training_key(config, model), one)
    phases.append(phase("training", decisions * t.updates.passes, trained))
    if r.suffix and r.suffix.audit_every:
        audited = count_forwards(plan, r.num_steps, None)
        phases.append(phase("audit", audited, flops, 1 / min(r.suffix.audit_every, 10**9)))
    if config.data.heldout and config.eval.every:
        steps = config.eval.num_steps or r.num_steps
        most = -(-config.eval.prompts // gpus) * steps
        own = _forward_pass(folder, dtype, replace(one, guided=config.eval_guidance() > 1))[1]
        phases.append(Phase("evaluation", config.eval.prompts * steps, most, own, _seconds(most * own, speed),
                            1 / min(config.eval.every, 10**9)))  # fmt: skip
    return phases


def _seconds(flops: int, speed: float) -> float:
    return float(flops) / speed if flops < 10**300 else math.inf


# ------------------------------------------------------------------------------------------------ measurements, once each
@dataclass(frozen=True)
class Weights:
    """Of a transformer as trained. parameters, trained: numbers of elements; tensors: trained ones; bytes: with buffers;
    lasting: bytes of parameters alone; largest_adapted: elements of the largest weight that has an adapter."""

    parameters: int
    trained: int
    tensors: int
    bytes: int
    lasting: int
    largest_adapted: int


def _lora_key(config: Config) -> str | None:
    """Of a config's adapters, to find measurements by; their scale does not matter."""
    lora = config.model.lora
    if lora is None:
        return None
    return (lora if lora.start else lora.model_copy(update={"alpha": 1.0})).model_dump_json()  # alpha has to be that of `start`


def _size(config: Config, model: Model) -> Size:
    r = config.rollout
    return Size(1, r.height, r.width, check_text_length(model.folder, config.model.max_sequence_length), r.guidance_scale > 1)


def _at(size: Size, rows: int) -> Size:
    return replace(size, rows=rows)


@lru_cache(maxsize=4)
def _module(folder: str, dtype: torch.dtype, lora: str | None) -> torch.nn.Module:
    return Model(folder).transformer(dtype, Lora.model_validate_json(lora) if lora else None)


@lru_cache(maxsize=256)
def _weights(folder: str, dtype: torch.dtype, lora: str | None) -> Weights:
    module = _module(folder, dtype, lora)
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    adapted = max((p.numel() for name, p in module.named_parameters() if name.endswith("base_layer.weight")), default=0)
    return Weights(sum(p.numel() for p in parameters), sum(p.numel() for p in trained), len(trained), module_bytes(module),
                   tensor_bytes(parameters), adapted)  # fmt: skip


@lru_cache(maxsize=64)
def _frozen_bytes(folder: str, dtype: torch.dtype) -> dict[str, int]:
    return {name: module_bytes(module) for name, module in Model(folder).frozen(dtype).items()}


@lru_cache(maxsize=256)
def _training_peak(folder: str, dtype: torch.dtype, lora: str | None, checkpointing: bool, size: Size) -> int:
    forward = Model(folder).forward(size, dtype)
    return measure.training_peak(_prepared(folder, dtype, lora, checkpointing), forward.arguments) + _joined(forward)


@lru_cache(maxsize=256)
def _training_flops(folder: str, dtype: torch.dtype, lora: str | None, checkpointing: bool, size: Size) -> int:
    return measure.training_flops(_prepared(folder, dtype, lora, checkpointing), Model(folder).forward(size, dtype).arguments)


def _prepared(folder: str, dtype: torch.dtype, lora: str | None, checkpointing: bool) -> torch.nn.Module:
    module = _module(folder, dtype, lora)
    (module.enable_gradient_checkpointing if checkpointing else module.disable_gradient_checkpointing)()
    return module


@lru_cache(maxsize=256)
def _forward_pass(folder: str, dtype: torch.dtype, size: Size) -> tuple[int, int]:
    """(most bytes held, operations) of a forward of the rollout."""
    module, forward = _prepared(folder, dtype, None, False), Model(folder).forward(size, dtype)
    held, flops = measure.inference_pass(lambda: module(**forward.arguments))
    return held + _joined(forward), flops


def _joined(forward: Forward) -> int:
    """Inputs that are made for the forward, of a row's two halves."""
    return tensor_bytes(measure.tensors(forward)) if forward.halves > 1 else 0


@lru_cache(maxsize=256)
def _decode_pass(folder: str, dtype: torch.dtype, size: Size) -> tuple[int, int]:
    """(most bytes held, operations) of decoding one picture."""
    model = Model(folder)
    vae, shape = model.frozen(dtype)["vae"], model.forward(size, dtype).vae_latent
    return measure.inference_pass(lambda: vae.decode(torch.empty(1, *shape, dtype=dtype, device="meta"), return_dict=False))


@lru_cache(maxsize=256)
def _embedding_bytes(folder: str, dtype: torch.dtype, size: Size) -> tuple[int, int]:
    """(of a prompt, of the negative prompt that is set against it, 0 where the family takes none)."""
    forward = Model(folder).forward(_at(size, 1), dtype)
    each = tensor_bytes(forward.arguments[name] for name in forward.conditioning) // forward.halves
    return each, each if forward.negatives else 0
