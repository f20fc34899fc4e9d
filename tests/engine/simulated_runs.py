"""The shipped configs on the simulated GPU: real shapes, fewer layers, one unit of work. All of the
engine is real but the loading of weights, prompts' embeddings (zeros), and DeepSpeed's engine, for
which `PlainEngine` stands."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from engine_cases import ROOT, quiet_pool
from fake_gpu import FakeGpu, Seen

from tempflow import types
from tempflow.config import load_config
from tempflow.data.prompts import load_prompts
from tempflow.models.embeddings import EmbeddingCache
from tempflow.models.hub import local_model
from tempflow.models.loading import family_of
from tempflow.models.opened import Opened
from tempflow.models.skeleton import read_index, skeleton_module
from tempflow.objectives import Batch
from tempflow.run import evaluation
from tempflow.sampling.weights import step_weights
from tempflow.training import engine as trainer_runtime
from tempflow.training.batches import make_batches, select
from tempflow.training.engine import Runtime, engine_dtype
from tempflow.training.rehearse import LAYERS
from tempflow.training.rollout import RolledOut, Scored, gather_rewards, plan_iteration, roll_out
from tempflow.training.session import Session, assemble

ONE_UNIT = [
    "data.prompts_per_iteration=1",
    "rollout.plan.seeds=1",
    "reward_pool.workers=0",
    "training.updates.parts=1",  # `batches` has all states in one
]


def cut_card(path: str, folder: Path, layers: int) -> Path:
    """A copy of a model's card whose transformers have `layers` blocks of each kind; a half of
    SD3.5's, as it has, with two attentions."""
    card = Path(shutil.copytree(local_model(path), folder / Path(local_model(path)).name))
    for part in family_of(str(card)).denoiser_parts(read_index(str(card))):
        file = card / part / "config.json"
        config = json.loads(file.read_text())
        config |= {key: layers for key in LAYERS if key in config}
        if "dual_attention_layers" in config:
            config["dual_attention_layers"] = list(range(layers // 2))
        file.write_text(json.dumps(config))
    return card


class PlainEngine:
    """What a Runtime asks of DeepSpeed's engine. A gradient is added to its fp32 sum as it comes,
    as ZeRO's optimizers do."""

    dp_world_size = 1

    def __init__(self, module: torch.nn.Module, parameters: list[torch.nn.Parameter]):
        self.module, self.sums = (
            module,
            {p: torch.zeros_like(p, dtype=torch.float32) for p in parameters},
        )
        self.optimizer = mock.Mock(param_groups=[{"lr": 1e-4}])
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: torch.nn.Parameter) -> None:
        self.sums[parameter].add_(parameter.grad)
        parameter.grad = None

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        pass

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        pass

    def was_step_applied(self) -> bool:
        return True

    def get_global_grad_norm(self) -> float:
        return 1.0


def already_there():
    """Modules are not moved: they are made where they belong, and a fake weight cannot be exchanged
    for another."""
    return mock.patch.object(torch.nn.Module, "to", lambda module, *args, **more: module)


@contextmanager
def adapters_in(dtype: torch.dtype):
    """New layers have the dtype that DeepSpeed would cast them to."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class Forwards:
    """Takes the graph cache's place in a Session: runs what would be captured, and sees what each
    run does.

    Of every function the first run is apart, as a capture is warmed up before.
    """

    def __init__(self, gpu: FakeGpu):
        self._gpu, self._warm = gpu, set()
        self.seen: dict[str, list[Seen]] = {}

    def watch(self, tensors) -> None:
        assert all(tensor.device == self._gpu.device for tensor in tensors)

    def __call__(self, function, inputs):
        assert {tensor.device for tensor in inputs.values()} == {self._gpu.device}
        name = function.__name__
        if name not in self._warm:
            self._warm.add(name)
            function(**inputs)
        with self._gpu.watch() as seen:
            out = function(**inputs)
        self.seen.setdefault(name, []).append(seen)
        return out


@dataclass
class Rolled:
    """An iteration's rollout. whole: all of it; forwards: by function; decodes: each decoding."""

    data: RolledOut
    scored: Scored
    session: Session
    whole: Seen
    forwards: dict[str, list[Seen]]
    decodes: list[Seen]


class SimulatedModel:
    """A policy on `gpu` of a card's shapes, with embeddings of zeros, and what runs of it need."""

    def __init__(self, gpu: FakeGpu, card: Path, length: int | None, size: types.Size):
        self.gpu, self.card = gpu, str(card)
        family = family_of(self.card)
        self.length = length or family.text_length
        self.policy = family.skeleton(self.card, torch.bfloat16, self.length)
        self.policy.size = size
        self._shapes = self.policy.embed([types.Example("")])
        for module in (self.policy.denoiser(), self.policy.pipe.vae):
            self.on_gpu(module)
        self.policy.device = gpu.device
        self.policy.embed = self._embed
        self.embeddings = EmbeddingCache(self.policy)

    def on_gpu(self, module: torch.nn.Module) -> torch.nn.Module:
        """A module from the meta device with weights on the GPU."""

        def there(t):
            return torch.empty(t.shape, dtype=t.dtype, device=self.gpu.device)

        for part in module.modules():
            for name, p in part.named_parameters(recurse=False):
                setattr(part, name, torch.nn.Parameter(there(p), p.requires_grad))
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, there(buffer))
        return module

    def _embed(self, examples: list[types.Example]) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros(len(examples), *t.shape[1:], dtype=t.dtype)
            for name, t in self._shapes.items()
        }


class SimulatedRun:
    """A shipped config with one unit of work on a SimulatedModel.

    changes: settings in place of the usual number of steps.
    more: further settings, which make the config another model's.
    """

    def __init__(
        self,
        model: SimulatedModel,
        name: str,
        changes: list[str] | None = None,
        more: tuple[str, ...] = (),
    ):
        self.model, self.gpu, self.policy = model, model.gpu, model.policy
        file = ROOT / f"configs/{name}.json"
        if changes is None:  # states for a whole micro-batch
            steps = max(2, load_config(file).training.micro_batch)
            changes = [
                f"rollout.num_steps={steps + 1}",
                f"rollout.plan.branch_steps={list(range(steps))}",
            ]
        rewards, frames = {"engine_rewards:contrast": 1.0}, []
        # the first frames and the next, which the decoder makes in another way
        if load_config(file).rollout.frames > 1:
            rewards, frames = (
                {"engine_rewards:contrast": {"weight": 1.0, "frames": 2}},
                ["rollout.frames=5"],
            )
        card = f"model.path={model.card}"
        shared = [*more, card, f"rewards={json.dumps(rewards)}", *frames, *ONE_UNIT]
        self.config = load_config(file, [*shared, *changes])
        self.prompts = load_prompts(self.config.data.train)

    def make_runtime(self) -> Runtime:
        dtype, card, family = (
            engine_dtype(self.config.deepspeed),
            self.model.card,
            type(self.policy),
        )
        parts = (
            skeleton_module(card, part, dtype) for part in family.denoiser_parts(read_index(card))
        )
        module = self.model.on_gpu(family.join_denoiser(*parts).train())

        def initialize(model, optimizer, model_parameters, config):
            return (PlainEngine(model, model_parameters),)

        with (
            mock.patch.object(trainer_runtime, "load_denoiser", lambda path, dtype: module),
            mock.patch.object(trainer_runtime.deepspeed, "initialize", initialize),
            already_there(),
            adapters_in(dtype),
            torch.device(self.gpu.device),
        ):
            return Runtime(self.config, self.policy)

    def roll_out(self) -> Rolled:
        """One iteration's collection, every forward padded to full size."""
        forwards, decodes = Forwards(self.gpu), []
        with quiet_pool(self.config) as (pool, specs), self._watched("pixels", decodes):
            session = assemble(
                self.config,
                self.policy,
                self.model.embeddings,
                pool,
                specs,
                self.prompts,
                graphs=forwards,
            )
            with self.gpu.watch() as whole:
                data = roll_out(
                    session, plan_iteration(session, [0], 0), 0, self.config.rollout.suffix
                )
                scored = gather_rewards(session, data)
        return Rolled(data, scored, session, whole, forwards.seen, decodes)

    @contextmanager
    def _watched(self, method: str, into: list[Seen]):
        """Every call of a method of the policy is watched."""
        real = getattr(self.policy, method)

        def call(*args, **kwargs):
            with self.gpu.watch() as seen:
                out = real(*args, **kwargs)
            into.append(seen)
            return out

        setattr(self.policy, method, call)
        try:
            yield
        finally:
            delattr(self.policy, method)

    def batches(self, rolled: Rolled) -> list[Batch]:
        """The micro-batches of every state, as the trainer makes them, with made-up rewards."""
        t, states, session = self.config.training, rolled.data.kept.states, rolled.session
        rewards = np.random.default_rng(0).normal(size=len(rolled.data.layout.slots))
        credit = session.advantage(
            rolled.data.layout.slots, replace(rolled.scored.rewards, total=rewards)
        )
        chosen = select(states, credit, session.penalty)
        weights = step_weights(
            session.grid,
            rolled.data.layout.slots.steps(),
            ratio=session.objective.ratio,
            **t.profile(),
        )
        return make_batches(chosen, states[0], t.micro_batch, weights, self.policy.device)

    def evaluate(self, num_steps: int = 2) -> Seen:
        """Draw as many prompts as are integrated together, as the trainer's evaluation does."""
        rows, model = (
            self.config.rollout.rows,
            Opened(self.config, self.policy, self.model.embeddings),
        )
        with self.gpu.watch() as seen:
            drawn = evaluation.draw(model, self.prompts, list(range(rows)), num_steps=num_steps)
            assert sum(len(part[0]) for part in drawn) == rows
        return seen
