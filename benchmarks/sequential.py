"""The paper's procedure, with which throughput.py compares the engine: branch steps one after
another, each with its B children as one small batch that is integrated, decoded and scored before
the next step begins; then training with a forward for every child."""

from __future__ import annotations

import time

import numpy as np
import torch
from bench import PHASES, Bench, Iteration, changed, refresh, synchronize, train

from tempflow.config import Config
from tempflow.objectives import Rollout
from tempflow.rewards import combine
from tempflow.sampling.noise import INITIAL, Noise, key_tensor
from tempflow.sampling.steps import ode_coefficients
from tempflow.training.rollout import Scored, plan_iteration
from tempflow.types import Rewards, Row, State, Unit
from tempflow_kernels import sde_step


class Sequential:
    """Iterations of that procedure, for a plan whose branches leave one trunk."""

    def __init__(self, bench: Bench, config: Config):
        # One state per micro-batch, and a forward for each of its children.
        self.bench, self.session = (
            bench,
            bench.session.variant(changed(config, training={"micro_batch": 1})),
        )

    def free(self) -> None:
        """It holds nothing on the device."""

    def __call__(self, iteration: int) -> Iteration:
        s = self.session
        self.seconds, self.forwards, self.noise = (
            dict.fromkeys(PHASES, 0.0),
            0,
            Noise(s.config.training.seed, iteration),
        )
        layout = plan_iteration(s, self.bench.order.indices(iteration), iteration)
        states, total = [], np.zeros(len(layout))
        with (
            torch.no_grad()
        ):  # nothing is scored during the rollout, so the model can use all cores
            for place, unit in enumerate(layout.units):
                forest = layout.forest([place])
                trunk = self.trunk(unit)
                for (parent, k), slots in forest.slots.items():
                    rows = forest.branches[parent, k]
                    state, values = self.branch(
                        unit, k, trunk[k], [forest.rows[n] for n in rows], slots
                    )
                    states.append(state)
                    total[[forest.numbers[n] for n in rows]] = values
        rolled = _Rolled(
            layout, Rollout(layout.slots, states, [], s.grid, self.noise, s.advantage.over)
        )
        rewards = layout.slots.means(total[None])[0]
        everywhere = np.ones(len(rewards), dtype=bool)
        name = s.trained[0].name
        given = Rewards(rewards, {name: rewards}, {name: 1.0}, {name: everywhere})
        started = time.perf_counter()
        trained = train(
            s, rolled, Scored(given, len(rewards), 0, float("nan"), {}, {}), each_child=True
        )
        self.seconds["train"] = time.perf_counter() - started
        self.seconds["sync"] = refresh(s)
        return Iteration(self.seconds, len(rewards), {"rollout": self.forwards, "train": trained})

    def trunk(self, unit: Unit) -> list[torch.Tensor]:
        s, started = self.session, time.perf_counter()
        states = [
            self.noise.sample(
                [self.noise.key(unit, INITIAL)], s.sampler.latent_shape, s.policy.device
            )
        ]
        for k in range(s.config.rollout.num_steps - 1):
            states.append(self.step(states[-1], k, unit))
        self.seconds["rollout"] += time.perf_counter() - started
        return states

    def branch(
        self, unit: Unit, k: int, x: torch.Tensor, rows: list[Row], slots: np.ndarray
    ) -> tuple[State, np.ndarray]:
        s, started = self.session, time.perf_counter()
        a, b, tau = s.grid.sde.a[k], s.grid.sde.b[k], s.grid.sde.tau[k]
        keys = [[self.noise.key(unit, k, row.path)] for row in rows]
        children, log_prob = self.transition(
            x.expand(len(rows), *x.shape[1:]), k, unit, (a, b, tau), keys
        )
        latents = children
        for later in range(k + 1, s.config.rollout.num_steps):
            latents = self.step(latents, later, unit)
        synchronize()
        self.seconds["rollout"] += time.perf_counter() - started
        started = time.perf_counter()
        images, _ = s.sampler.decode(latents)
        self.seconds["decode"] += time.perf_counter() - started
        state = State(
            unit,
            k,
            s.grid.sigmas[k].item(),
            a.item(),
            b.item(),
            tau.item(),
            x[0],
            children,
            slots,
            log_prob,
        )
        return state, self.score(unit, images)

    def score(self, unit: Unit, images: np.ndarray) -> np.ndarray:
        s, started = self.session, time.perf_counter()
        prompt = s.prompts[unit.prompt_id]
        ticket = s.pool.submit(images, [prompt.text] * len(images), [prompt.metadata] * len(images))
        values = combine(s.pool.gather([ticket])[0], s.specs).values
        self.seconds["reward"] += time.perf_counter() - started
        return values

    def step(self, x, k: int, unit: Unit) -> torch.Tensor:
        ode = ode_coefficients(self.session.grid.sigmas)
        return self.transition(x, k, unit, (ode.a[k], ode.b[k], ode.tau[k]), [[0]] * len(x))[0]

    def transition(self, x, k: int, unit: Unit, scalars, keys):
        s, n, device = self.session, len(x), x.device
        v = s.sampler.velocity(
            s.policy.denoiser(), x, s.grid.sigmas[k].expand(n).to(device), s.embed([unit] * n)
        )
        self.forwards += n
        a, b, tau = (t.expand(n).to(device) for t in scalars)
        x_next, log_prob = sde_step(
            x, v, a, b, tau, key=key_tensor(keys, device), out_dtype=torch.float32
        )
        return x_next[:, 0], log_prob[:, 0]


class _Rolled:
    """The part of a rollout that training reads."""

    def __init__(self, layout, kept: Rollout):
        self.layout, self.kept = layout, kept
