"""What the engine's tests share: small configs, random pipelines, a runtime without DeepSpeed,
naive restatements.

The naive code follows docs/method.md one row and one child at a time and shares nothing with the
engine but the noise.
"""

import copy
import json
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tempflow.types import Example

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = ROOT / "engine/tempflow/assets/tiny-flux"
PROMPTS = ROOT / "engine/tempflow/assets/prompts/words_train.txt"
HELDOUT = ROOT / "engine/tempflow/assets/prompts/words_heldout.txt"


def examples(texts, negatives=None) -> list[Example]:
    """Prompts without metadata, with a negative prompt each or the family's default."""
    return [
        Example(text, negative)
        for text, negative in zip(texts, negatives or [None] * len(texts), strict=True)
    ]


def config_table(**changes) -> dict:
    """A config of the shipped model as nested tables, small and quick; `rollout={...}` and so on
    change its sections."""
    table = {
        "model": {"path": str(MODEL), "max_sequence_length": 20},
        "data": {"train": str(PROMPTS), "heldout": str(HELDOUT), "prompts_per_iteration": 2},
        "rollout": {
            "height": 32,
            "width": 96,
            "num_steps": 10,
            "guidance_scale": 0.0,
            "micro_batch": 48,
            "plan": {"type": "tempflow", "seeds": 2, "children": 2, "branch_steps": [0, 4, 8]},
        },
        "rewards": {"engine_rewards:contrast": 1.0},
        "reward_pool": {"workers": 0},
        "training": {
            "iterations": 2,
            "micro_batch": 8,
            "objective": {"type": "grpo", "clip_low": 1e-3, "clip_high": 1e-3},
        },
        "eval": {"every": 2, "prompts": 8},
        "logging": {"tensorboard": False},
        "deepspeed": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}},
    }
    for section, keys in changes.items():
        table[section] = (
            _merged(table[section], keys) if section in table and section != "rewards" else keys
        )
    return table


def changed(key, value):
    """`config_table` with another value for a dotted key."""
    table = config_table()
    *sections, name = key.split(".")
    inner = table
    for section in sections:
        inner[section] = inner.get(section) or {}
        inner = inner[section]
    inner[name] = value
    return table


def _merged(was: dict, keys: dict) -> dict:
    """A section with some keys changed, and of a component of the same type its options."""
    merged = {**was, **keys}
    for key, value in keys.items():
        before = was.get(key)
        if (
            isinstance(value, dict)
            and isinstance(before, dict)
            and value.get("type", before.get("type")) == before.get("type")
        ):
            merged[key] = {**before, **value}
    return merged


def plan_table(kind: str, **options) -> dict:
    """A plan with those of the options that it has."""
    from tempflow.registry import find, options_of

    return {"type": kind} | {
        option.name: options[option.name]
        for option in options_of(find("plan", kind))
        if option.name in options
    }


def small_config(**changes):
    from tempflow.config import parse_config

    return parse_config(config_table(**changes))


def write_config(folder: Path, name: str = "small.json", **changes) -> Path:
    file = folder / name
    file.write_text(json.dumps(config_table(**changes)))
    return file


# ------------------------------------------------------------------------------------------- models
def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fill every weight, those that start at zero included, so that each one matters to the
    output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 0.5 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.1
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = parameter.data + noise if parameter.ndim == 1 else noise
    return module


class PlainRuntime:
    """Stands in for trainer.runtime.Runtime: plain autograd and plain gradient descent on one
    process."""

    def __init__(self, policy, drift: float = 0.0):
        """drift: size of a random change that sets the trained transformer apart from the
        reference."""
        self.policy, self.dtype = policy, torch.float32
        self.engine = copy.deepcopy(policy.transformer).requires_grad_(True)
        self.reference = policy.transformer
        generator = torch.Generator().manual_seed(5)
        for parameter in self.engine.parameters():
            parameter.data += (
                drift
                * parameter.std(correction=0)
                * torch.randn(parameter.shape, generator=generator)
            )

    @contextmanager
    def reference_transformer(self):
        yield self.reference

    def accumulate(self, loss, last):
        loss.backward()

    def step(self, lr_factor):
        return 0.0

    def gradient(self) -> dict[str, torch.Tensor]:
        """What has been accumulated, taken away."""
        found = {
            name: p.grad.clone() for name, p in self.engine.named_parameters() if p.grad is not None
        }
        self.engine.zero_grad()
        return found

    def descend(self, gradient: dict[str, torch.Tensor], length: float) -> None:
        """Move the weights against a gradient, by `length` in all."""
        size = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
        with torch.no_grad():
            for name, parameter in self.engine.named_parameters():
                parameter -= length / size * gradient[name]


@contextmanager
def quiet_pool(config):
    """The config's rewards, scored in this process."""
    from tempflow.rewards import RewardPool, parse_rewards

    specs = parse_rewards(config.rewards)
    with RewardPool(specs, workers=0) as pool:
        yield pool, specs


class Iteration:
    """One real iteration's rollout, and what its updates need, as the trainer puts them
    together."""

    def __init__(self, policy, config, prompt_ids=(0, 1)):
        from tempflow.data.prompts import load_prompts
        from tempflow.models.embeddings import EmbeddingCache
        from tempflow.training.rollout import gather_rewards, plan_iteration, roll_out
        from tempflow.training.session import assemble

        self.policy, self.config = policy, config
        with quiet_pool(config) as (pool, specs):
            self.session = assemble(
                config, policy, EmbeddingCache(policy), pool, specs, load_prompts(config.data.train)
            )
            self.layout = plan_iteration(self.session, list(prompt_ids), 0)
            self.rolled = roll_out(self.session, self.layout, 0, config.rollout.suffix)
            self.scored = gather_rewards(self.session, self.rolled)

    def roll_out(self, suffix):
        """The scores of the same rows under another suffix."""
        from tempflow.training.rollout import gather_rewards, roll_out

        with quiet_pool(self.config) as (self.session.pool, _):
            return gather_rewards(self.session, roll_out(self.session, self.layout, 0, suffix))

    @property
    def slots(self):
        return self.layout.slots

    def dense(self, values):
        """By slot -> [prompts, seeds, steps, children], for plans whose states have as many
        children each."""
        shape = [
            len(np.unique(column))
            for column in (self.slots.prompt, self.slots.seed, self.slots.step, self.slots.child)
        ]
        return np.asarray(values).reshape(shape)

    @property
    def states(self):
        return self.rolled.kept.states

    @property
    def rewards(self):
        """float64 [n] by slot."""
        return self.scored.rewards.total

    def updater(self, runtime, config=None):
        from tempflow.training.update import Updater

        session = self.session.variant(config) if config else self.session
        return Updater(runtime, session.sampler, session.objective, session.penalty, session.embed)

    def advantages(self, rewards=None):
        return self.session.advantage(
            self.slots,
            replace(self.scored.rewards, total=self.rewards if rewards is None else rewards),
        )

    def part(self, advantages, size, extra=0, config=None):
        """All states in micro-batches of about `size`; `extra` more of nothing but padding."""
        from tempflow.sampling.weights import step_weights
        from tempflow.training.batches import make_batches, padding_of, select
        from tempflow.training.update import Part

        config = config or self.config
        chosen = select(self.states, advantages, config.penalty())
        weights = step_weights(
            self.session.grid,
            self.slots.steps(),
            ratio=config.objective().ratio,
            **config.training.profile(),
        )
        fallback = padding_of(self.states)
        batches = make_batches(chosen, fallback, size, weights, "cpu")
        batches += [replace(batches[0], weight=torch.zeros_like(batches[0].weight), real=0)] * extra
        return Part.of(batches, self.total)

    @property
    def total(self) -> int:
        return len(self.states)


def dense_slots(shape):
    """The slots of rewards [P, S, K, B] in their order."""
    from tempflow.types import Slots

    prompt, seed, step, child = (index.ravel() for index in np.indices(shape))
    return Slots(prompt, seed, step, np.ravel_multi_index((prompt, seed, step), shape[:3]), child)


def dense(how, rewards, parts=None, weights=None, applies=None):
    """`how` on a dense array of rewards, and on R parts with their weights; applies: bool [P] each.
    Dense values come back."""
    from tempflow.types import Advantages, Rewards

    rewards = np.asarray(rewards, dtype=np.float64)
    names = [f"reward {n}" for n in range(len(parts or []))]
    everywhere = [np.ones(len(rewards), dtype=bool)] * len(names)
    spread_out = [
        np.broadcast_to(np.reshape(one, (-1, 1, 1, 1)), rewards.shape).ravel()
        for one in applies or everywhere
    ]
    given = Rewards(
        rewards.ravel(),
        {name: np.ravel(part) for name, part in zip(names, parts or [])},
        dict(zip(names, weights or [])),
        dict(zip(names, spread_out)),
    )
    found = how(dense_slots(rewards.shape), given)
    return Advantages(
        found.values.reshape(rewards.shape),
        found.valid.reshape(rewards.shape),
        found.zero_spread,
        found.spread,
    )


def flat(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)])


# -------------------------------------------------------------------------------- the sampling step
def step_scalars(kind: str, sigmas, k: int, eta: float) -> tuple[float, float, float]:
    """(a, b, tau) of step k in float64, from the table of docs/method.md."""
    grid = np.asarray(sigmas, dtype=np.float64)
    s, s_next = grid[k], grid[k + 1]
    dt = s_next - s
    if kind == "ode":
        return 1.0, dt, 0.0
    if kind == "cps":
        tau = s_next * np.sin(eta * np.pi / 2)
        q = np.sqrt(s_next**2 - tau**2)
        return (1 - s_next) + q, q * (1 - s) - s * (1 - s_next), tau
    # fresh noise where the share of old noise that is kept, squared, is not; snr = (1 - s) / s
    if kind == "precise":
        kept = 0.0 if s == 1 or s_next == 0 else ((1 - s) / s * s_next / (1 - s_next)) ** (eta**2)
        q = s_next * np.sqrt(kept)
        return (1 - s_next) + q, q * (1 - s) - s * (1 - s_next), s_next * np.sqrt(1 - kept)
    std = eta * np.sqrt(s / (1 - (grid[1] if s == 1 else s))) if kind == "flow" else eta
    return 1 + std**2 * dt / (2 * s), (1 + std**2 * (1 - s) / (2 * s)) * dt, std * np.sqrt(-dt)


def initial_noise(config, unit, shape, iteration=0):
    from tempflow.sampling.noise import INITIAL

    return step_noise(config, unit, INITIAL, 0, shape, iteration)


def step_noise(config, unit, step, child, shape, iteration=0):
    from tempflow.sampling.noise import key_tensor, noise_key
    from tempflow_kernels import normal

    key = noise_key(config.training.seed, iteration, unit.prompt_id, unit.seed, step, (child,))
    return normal(key_tensor([key], "cpu"), math.prod(shape)).reshape(shape)


def naive_trajectories(config, velocity, units, sigmas, shape) -> tuple[dict, dict]:
    """TempFlow's rollout one row at a time, fp32, every child with forwards of its own.

    velocity(x [1, ...], sigma [1], [unit]) -> [1, ...]. Returns the finished latents by (unit
    index, step or None for the trunk, child), and by (unit index, step) the state and the children
    that left it.
    """
    plan, sde, last = config.rollout.plan, config.rollout.sde, len(sigmas) - 1

    def step(x, unit, k, noise=None):
        a, b, tau = step_scalars("ode" if noise is None else sde["type"], sigmas, k, sde["eta"])
        v = velocity(x[None], sigmas[k : k + 1], [unit])[0]
        return a * x + b * v if noise is None else a * x + b * v + tau * noise

    def integrate(x, unit, first):
        for k in range(first, last):
            x = step(x, unit, k)
        return x

    finished, states = {}, {}
    for unit in units:
        x = initial_noise(config, unit, shape)
        for k in range(last):
            if k in plan["branch_steps"]:
                noise = [step_noise(config, unit, k, i, shape) for i in range(plan["children"])]
                children = [step(x, unit, k, one) for one in noise]
                states[unit.index, k] = x, torch.stack(children)
                for i, child in enumerate(children):
                    finished[unit.index, k, i] = integrate(child, unit, k + 1)
            x = step(x, unit, k)
        finished[unit.index, None, 0] = x
    return finished, states


# ----------------------------------------------------------------------------------------- the loss
def naive_loss(
    config, velocity, velocity_old, velocity_ref, states, advantages, sigmas
) -> torch.Tensor:
    """The loss of GRPO over all states, one forward per child, float64 after the velocity.

    velocity(state) -> [1, ...], with gradient; the other two without. Children whose reward failed
    are left out of their group; a state without a scored child counts in the mean alone, its KL
    included.
    """
    plan, sde, t = config.rollout.plan, config.rollout.sde, config.training
    objective, penalty = t.objective, t.penalty or {"coef": 0.0, "form": "x"}
    scalars = {k: step_scalars(sde["type"], sigmas, k, sde["eta"]) for k in plan["branch_steps"]}
    dt = np.diff(np.asarray(sigmas, dtype=np.float64))
    size = {
        k: abs(b) / (1 if objective["ratio"] == "guard" else tau)
        for k, (_, b, tau) in scalars.items()
    }
    wanted = {
        "uniform": lambda k, b: size[k],
        "noise": lambda k, b: abs(b),
        "guard": lambda k, b: abs(b / dt[k]),
    }[t.weighting]
    weights = {k: wanted(k, b) / size[k] for k, (_, b, _) in scalars.items()}
    total = 0.0
    for state in states:
        a, b, tau = scalars[state.step]
        x = state.x.double()
        old, reference = velocity_old(state).double(), velocity_ref(state).double()
        weight = weights[state.step] / np.mean(list(weights.values()))
        terms, divergences = [], []
        for i in np.flatnonzero(advantages.valid[state.slots]):
            v = velocity(state).double()
            child, mean, mean_old = state.children[i].double(), a * x + b * v, a * x + b * old
            if objective["ratio"] == "guard":
                log_ratio = ((child - mean_old) / tau * (mean - mean_old)).mean()
            else:
                density, density_old = (
                    -((child - m) ** 2) / (2 * tau**2) for m in (mean, mean_old)
                )
                log_ratio = density.mean() - density_old.mean()
            ratio, advantage = log_ratio.exp(), float(advantages.values[state.slots[i]])
            clipped = ratio.clamp(1 - objective["clip_low"], 1 + objective["clip_high"])
            terms.append(torch.maximum(-advantage * ratio, -advantage * clipped))
            gap = (
                (b * (v - reference)) ** 2 / (2 * tau**2)
                if penalty["form"] == "x"
                else (v - reference) ** 2
            )
            divergences.append(gap.mean())
        if terms:
            total = (
                total
                + weight * torch.stack(terms).mean()
                + penalty["coef"] * torch.stack(divergences).mean()
            )
    return total / len(states)
