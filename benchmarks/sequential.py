"""The paper's procedure, which throughput.py compares the engine with: branch steps one after another, each with its B children
as one small batch that is integrated, decoded and rewarded before the next begins; then training with a forward for every child.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from bench import PHASES, Bench, Iteration, refresh, synchronize, train

from tempflow.config import Config
from tempflow.sampling.noise import INITIAL, key_tensor, noise_key
from tempflow.sampling.plans import Unit, iteration_units
from tempflow.sampling.scheduler import Decision, RolloutStats
from tempflow.sampling.steps import ode_coefficients
from tempflow_kernels import normal, sde_step


class Sequential:
    """Iterations of that procedure."""

    def __init__(self, bench: Bench, config: Config):
        self.bench, self.config, self.collector = bench, config, bench.collector(config)

    def free(self) -> None:
        """It holds nothing on the device."""

    def __call__(self, iteration: int) -> Iteration:
        self.seconds, self.stats = dict.fromkeys(PHASES, 0.0), RolloutStats()
        plan = self.config.plan()
        units, steps = iteration_units(self.bench.order.indices(iteration), plan.seeds), plan.steps(iteration)
        rewards = np.zeros((self.config.data.prompts_per_iteration, plan.seeds, len(steps), plan.children))
        decisions = []
        with torch.no_grad():  # rewards are waited for, so all cores are the model's
            for unit in units:
                trunk = self.trunk(unit, iteration)
                for place, k in enumerate(steps):
                    decision, values = self.branch(unit, iteration, k, trunk[k])
                    decisions.append(decision)
                    rewards[unit.prompt, unit.seed, place] = values
        data = _Data(decisions, rewards, steps)
        started = time.perf_counter()
        trained = train(self.bench, self.config, self.collector, data, micro_batch=1, share_forward=False)
        self.seconds["train"] = time.perf_counter() - started
        self.seconds["sync"] = refresh(self.bench)
        return Iteration(self.seconds, rewards.size, {"rollout": self.stats.forwards, "train": trained})

    def trunk(self, unit: Unit, iteration: int) -> list[torch.Tensor]:
        started = time.perf_counter()
        key = key_tensor([self.key(unit, iteration, INITIAL, 0)], self.bench.policy.device)
        x = normal(key, int(np.prod(self.collector.latent_shape))).reshape(1, *self.collector.latent_shape)
        states = [x]
        for k in range(self.config.rollout.num_steps - 1):
            states.append(self.step(states[-1], k, unit))
        self.seconds["rollout"] += time.perf_counter() - started
        return states

    def branch(self, unit: Unit, iteration: int, k: int, x: torch.Tensor) -> tuple[Decision, np.ndarray]:
        r, sde, started = self.config.rollout, self.collector.sde, time.perf_counter()
        siblings = self.config.plan().children
        keys = [[self.key(unit, iteration, k, i)] for i in range(siblings)]
        copies = x.expand(siblings, *x.shape[1:])
        children, log_prob = self.transition(copies, k, unit, (sde.a[k], sde.b[k], sde.tau[k]), keys)
        latents = children
        for later in range(k + 1, r.num_steps):
            latents = self.step(latents, later, unit)
        synchronize()
        self.seconds["rollout"] += time.perf_counter() - started
        started = time.perf_counter()
        images, _ = self.collector.sampler.decode(latents)
        self.seconds["decode"] += time.perf_counter() - started
        return Decision(unit, k, x[0], children, log_prob), self.score(unit, images)

    def score(self, unit: Unit, images: np.ndarray) -> np.ndarray:
        from tempflow.rewards import combine

        started, prompt = time.perf_counter(), self.bench.prompts[unit.prompt_id]
        ticket = self.bench.pool.submit(images, [prompt.text] * len(images), [prompt.metadata] * len(images))
        values = combine(self.bench.pool.gather([ticket])[0], self.bench.specs).values
        self.seconds["reward"] += time.perf_counter() - started
        return values

    def step(self, x, k: int, unit: Unit) -> torch.Tensor:
        ode = ode_coefficients(self.collector.sigmas)
        return self.transition(x, k, unit, (ode.a[k], ode.b[k], ode.tau[k]), [[0]] * len(x))[0]

    def transition(self, x, k: int, unit: Unit, scalars, keys):
        n, device = len(x), x.device
        sigma = self.collector.sigmas[k].expand(n).to(device)
        v = self.collector.sampler.velocity(self.bench.policy.denoiser(), x, sigma, self.bench.embed([unit] * n))
        self.stats.forwards += n
        a, b, tau = (s.expand(n).to(device) for s in scalars)
        x_next, log_prob = sde_step(x, v, a, b, tau, key=key_tensor(keys, device), out_dtype=torch.float32)
        return x_next[:, 0], log_prob[:, 0]

    def key(self, unit: Unit, iteration: int, step: int, child: int) -> int:
        return noise_key(self.config.training.seed, iteration, unit.prompt_id, unit.seed, step, child)


@dataclass
class _Data:
    """The part of a Collected that training reads."""

    decisions: list[Decision]
    rewards: np.ndarray
    steps: list[int]
