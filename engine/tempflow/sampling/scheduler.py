"""Integrates the rows of a plan: rows at different steps share forwards, and a shared prefix is
computed once.

Roots go first, because children wait for them; a child joins as soon as its parent has passed its
branch step, and takes its first step from its parent's (x_k, v_k) without a forward of its own.
Rows whose prompts' conditionings differ in shape, or that different experts of a denoiser predict,
share no forward. The latent being integrated stays in fp32.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Callable, Iterable, Iterator

import numpy as np
import torch

from tempflow.config import Suffix
from tempflow.models import Shape
from tempflow.profiling import span
from tempflow.sampling.denoise import Denoise
from tempflow.sampling.jumps import Jumps
from tempflow.sampling.layout import Forest
from tempflow.sampling.noise import INITIAL, Noise, key_tensor
from tempflow.sampling.steps import Grid
from tempflow.sampling.suffix import first_forward, last_decisions, suffix_path
from tempflow.transfer import send
from tempflow.types import State
from tempflow_kernels import sde_step


@dataclass(frozen=True)
class Stats:
    """What an integration cost; sums over several of them."""

    forwards: int = 0
    """Rows that went through the transformer."""
    batches: int = 0
    """Forwards of any size."""
    padded: int = 0
    """Rows that only filled a batch of fixed size."""
    peak_latents: int = 0
    """Most latents held."""

    def __add__(self, other: Stats) -> Stats:
        """Of two integrations side by side."""
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Arrived:
    """What one forward brought."""

    rows: list[int]
    """Places in the forest of the rows that reached sigma = 0; often none."""
    latents: torch.Tensor | None
    """fp32 [rows, ...]; None without rows."""
    states: list[State]
    """The states that the batch's rows left."""
    forwards: int
    """Rows in the batch."""
    stats: Stats
    """Of the integration so far."""


@dataclass(frozen=True)
class _Brood:
    """Children of some of a batch's rows, as many of each, that take their first step together."""

    noisy: bool
    """Whether that is a step of the SDE."""
    parents: list[int] = field(default_factory=list)
    """Places in the batch."""
    steps: list[int] = field(default_factory=list)
    """Of the parents."""
    members: list[list[int]] = field(default_factory=list)
    """Places of each parent's children in the forest."""


def eager(function: Callable, inputs: dict[str, torch.Tensor]) -> tuple:
    """Calls a function of tensors; a graph cache takes its place."""
    return function(**inputs)


def integrate(
    forest: Forest,
    denoise: Denoise,
    grid: Grid,
    noise: Noise,
    *,
    micro_batch: int,
    suffix: Suffix | None = None,
    execute: Callable = eager,
    pad: bool = False,
    given: dict[int, torch.Tensor] | None = None,
) -> Iterator[Arrived]:
    """Integrate every row of a forest, and yield after every forward what it brought. The caller
    decodes, shows progress, and stops by asking no more.

    Args:
        forest: the rows, with the slots of their states.
        denoise: the velocity.
        grid: sigmas and the stochastic steps' coefficients.
        noise: of this iteration.
        micro_batch: most rows in one forward.
        suffix: how rows go on after their last decision; None is exact.
        execute: calls a function with tensors by name.
        pad: make every forward one of as many rows, for graphs and compiled code: micro_batch, or
            where shapes differ what `_most` says.
        given: latents, fp32 [...], of rows without a parent that begin at their `start`, by place
            in the forest; all others begin with initial noise.
    """
    work = _Integration(
        forest, denoise, grid, noise, micro_batch, suffix, execute, pad, given or {}
    )
    yield from work.run()


class _Integration:
    """The latents under way, by place in the forest."""

    def __init__(self, forest, denoise, grid, noise, micro_batch, suffix, execute, pad, given):
        self.forest, self.denoise, self.grid, self.noise = forest, denoise, grid, noise
        self.micro_batch, self.suffix, self.execute, self.pad, self.given = (
            micro_batch,
            suffix,
            execute,
            pad,
            given,
        )
        self.rows, self.device, self.last = forest.rows, denoise.device, len(grid.sigmas) - 1
        self.free = [k + 1 for k in last_decisions(self.rows)]
        self.paths = {free: suffix_path(free, self.last, suffix) for free in set(self.free)}
        self.shape = [denoise.shape(row.unit) for row in self.rows]
        # by step
        self.expert = [denoise.sampler.policy.expert(sigma) for sigma in grid.sigmas.tolist()]
        self.ahead: Counter[Shape] = Counter()  # forwards of the rows of each shape
        for i, shape in enumerate(self.shape):
            self.ahead[shape] += self._forwards_of(i)
        self.latent: dict[int, torch.Tensor] = {}
        self.step: dict[int, int] = {}
        second = suffix is not None and suffix.order == 2
        self.jumps = Jumps(grid.sigmas, self.free) if second else None
        self.forwards = self.batches = self.padded = self.peak = 0
        self.fill = {
            (shape, coarse): self._most(shape, coarse)
            for shape in set(self.shape)
            for coarse in (False, True)
        }

    def run(self) -> Iterator[Arrived]:
        roots = [i for i, row in enumerate(self.rows) if row.parent is None and i not in self.given]
        if roots:
            keys = [self.noise.key(self.rows[i].unit, INITIAL) for i in roots]
            self._place(
                roots, self.noise.sample(keys, self.denoise.sampler.latent_shape, self.device), 0
            )
        for i, latent in self.given.items():
            self._place([i], latent[None], self.rows[i].start)
        while self.latent:
            with torch.no_grad():  # a generator's body leaves its caller's modes at every yield
                arrived = self._forward(self._next_batch())
            yield arrived

    def _next_batch(self) -> list[int]:
        """Roots first, because children wait for them, then their children; among those the rows
        nearest to their end, because rewards wait for them.

        Rows with as many forwards ahead as there are full batches left of their shape go before
        those: left behind, they would end in small batches of their own.
        """
        batches_left = {shape: -(-ahead // self.micro_batch) for shape, ahead in self.ahead.items()}

        def order(i: int):
            return (
                self.forest.depth[i],
                self._forwards_left(i) < batches_left[self.shape[i]],
                -self.step[i],
                i,
            )

        waiting = sorted(self.latent, key=order)
        waiting = [i for i in waiting if self.shape[i] == self.shape[waiting[0]]]
        waiting = [
            i for i in waiting if self.expert[self.step[i]] == self.expert[self.step[waiting[0]]]
        ]
        # coarse and exact steps share no forward then
        if self.denoise.coarse_transformer is not None:
            coarse = self._is_coarse(waiting[0], self.step[waiting[0]])
            waiting = [i for i in waiting if self._is_coarse(i, self.step[i]) is coarse]
        return waiting[: self.micro_batch]

    def _forward(self, batch: list[int]) -> Arrived:
        steps = [self.step[i] for i in batch]
        with span("forward", rows=len(batch), steps=f"{min(steps)}-{max(steps)}"):
            x = torch.stack([self.latent.pop(i) for i in batch])
            goals = [self._goal(i, k) for i, k in zip(batch, steps, strict=True)]
            broods = self._broods(batch, steps)
            # all that differs from forward to forward, sent at once: the host does not wait
            own, *theirs = send(
                [self._numbers(batch, steps, goals), *map(self._numbers_of, broods)], self.device
            )
            v, x_next, log_prob = self._launch(batch, steps, own, x)
            self.forwards += len(batch)
            self.ahead[self.shape[batch[0]]] -= len(batch)
            self.batches += 1
            if self.jumps:
                self.jumps.remember(batch, steps, goals, v)
            families, done = self._branch(broods, theirs, x, v)
            states = self._states(batch, steps, x, families, x_next, log_prob)
            for goal in sorted(set(goals)):
                members = [n for n, other in enumerate(goals) if other == goal]
                arrived = [x_next[n, 0] for n in members]
                done += self._place([batch[n] for n in members], arrived, goal)
        stats = Stats(self.forwards, self.batches, self.padded, self.peak)
        latents = torch.stack([latent for _, latent in done]) if done else None
        return Arrived([i for i, _ in done], latents, states, len(batch), stats)

    # -------------------------------------------------------------------------------- where rows go
    def _is_coarse(self, index: int, step: int) -> bool:
        """Whether a row has its last decision behind it, and the exact steps after that."""
        return self.suffix is not None and step >= self.free[index] + self.suffix.exact_steps

    def _most(self, shape: Shape, coarse: bool) -> int:
        """The rows of a padded forward.

        Where shapes differ, each has few rows, and another number in the next iteration: a power of
        two is little work for nothing and few graphs. Where coarse steps have forwards of their
        own, the exact ones have no more rows than take them.
        """
        members = [i for i in range(len(self.rows)) if self.shape[i] == shape]
        most = (
            self.micro_batch
            if shape is None
            else min(self.micro_batch, 1 << (len(members) - 1).bit_length())
        )
        if coarse or self.denoise.coarse_transformer is None:
            return most
        return min(most, sum(not self._is_coarse(i, first_forward(self.rows[i])) for i in members))

    def _forwards_of(self, index: int) -> int:
        """How many times a row goes through the transformer in all."""
        return (
            len(self.paths[self.free[index]])
            - 1
            + self.free[index]
            - first_forward(self.rows[index])
        )

    def _forwards_left(self, index: int) -> int:
        step, free = self.step[index], self.free[index]
        path = self.paths[free]
        return free - step + len(path) - 1 if step < free else len(path) - 1 - path.index(step)

    def _goal(self, index: int, step: int) -> int:
        """The grid point that a row at `step` goes to: the next one while decisions lie ahead, then
        its suffix's."""
        if step < self.free[index]:
            return step + 1
        path = self.paths[self.free[index]]
        return path[path.index(step) + 1]

    def _place(
        self, indices: list[int], latents: Iterable[torch.Tensor], step: int
    ) -> list[tuple[int, torch.Tensor]]:
        """Hold latents at a step; those that have reached sigma = 0 are returned instead."""
        if step == self.last:
            return list(zip(indices, latents, strict=True))
        for index, latent in zip(indices, latents, strict=True):
            self.latent[index], self.step[index] = latent, step
        self.peak = max(self.peak, len(self.latent))
        return []

    # ----------------------------------------------------------------------------------- one launch
    def _launch(
        self, batch: list[int], steps: list[int], own: dict[str, torch.Tensor], x: torch.Tensor
    ) -> list[torch.Tensor]:
        """One forward and step; a batch that is not full is filled by its first row where shapes
        must not change. own: `_numbers`, on the device."""
        own, shape = dict(own), self.shape[batch[0]]
        inputs = {
            "x": x,
            **self.denoise.conditions(shape, own.pop("prompt")),
            **(self.jumps.before(batch, x) if self.jumps else {}),
            **own,
        }
        coarse = self._is_coarse(batch[0], steps[0])
        missing = self.fill[shape, coarse] - len(batch) if self.pad else 0
        if missing:
            self.padded += missing
            inputs = {
                name: torch.cat([t, t[:1].expand(missing, *t.shape[1:])])
                for name, t in inputs.items()
            }
        denoise = self.denoise.of(self.expert[steps[0]])
        step = (
            denoise.coarse_step
            if coarse and denoise.coarse_transformer is not None
            else denoise.step
        )
        return [t[: len(batch)] for t in self.execute(step, inputs)]

    def _numbers(
        self, batch: list[int], steps: list[int], goals: list[int]
    ) -> dict[str, torch.Tensor]:
        """What a batch's forward and step take beside latents and embeddings, on the CPU: scalars
        fp32 [n], keys int64 [n, 1], and the place of each row's prompt, int64 [n]."""
        rows = [self.rows[i] for i in batch]
        noisy = [k in row.noise for row, k in zip(rows, steps, strict=True)]
        keys = [[self.noise.key(row.unit, k, row.path)] for row, k in zip(rows, steps, strict=True)]
        return {
            "sigma": self.grid.sigmas[steps],
            **self._scalars(steps, goals, noisy),
            "key": key_tensor(keys, "cpu"),
            "prompt": torch.tensor([self.denoise.within(row.unit) for row in rows]),
            **({"bend": self.jumps.bends(batch, steps, goals)} if self.jumps else {}),
        }

    def _scalars(
        self, steps: list[int], goals: list[int], noisy: list[bool]
    ) -> dict[str, torch.Tensor]:
        """(a, b, tau) of n rows' steps, fp32 [n]: the SDE's where a row is noisy, else the ODE's to
        its goal."""
        choose, sigmas = torch.tensor(noisy), self.grid.sigmas
        dt = (sigmas[goals].double() - sigmas[steps].double()).float()
        ode = {"a": torch.ones_like(dt), "b": dt, "tau": torch.zeros_like(dt)}
        return {
            name: torch.where(choose, getattr(self.grid.sde, name)[steps], value)
            for name, value in ode.items()
        }

    # ------------------------------------------------------------------------------------- branches
    def _broods(self, batch: list[int], steps: list[int]) -> list[_Brood]:
        """The children of the batch's rows that take their first step now."""
        found: dict[tuple[bool, int], _Brood] = {}
        for n, (i, k) in enumerate(zip(batch, steps, strict=True)):
            family = self.forest.branches.get((i, k), [])
            for noisy in (True, False):
                members = [c for c in family if (k in self.rows[c].noise) is noisy]
                if members:
                    brood = found.setdefault((noisy, len(members)), _Brood(noisy))
                    brood.parents.append(n)
                    brood.steps.append(k)
                    brood.members.append(members)
        return list(found.values())

    def _numbers_of(self, brood: _Brood) -> dict[str, torch.Tensor]:
        """What the first step of a brood takes beside latents and velocities, on the CPU."""
        keys = [
            [self.noise.key(self.rows[c].unit, k, self.rows[c].path) for c in members]
            for members, k in zip(brood.members, brood.steps, strict=True)
        ]
        goals, noisy = [k + 1 for k in brood.steps], [brood.noisy] * len(brood.steps)
        return {
            "parents": torch.tensor(brood.parents),
            **self._scalars(brood.steps, goals, noisy),
            "key": key_tensor(keys, "cpu"),
        }

    def _branch(self, broods: list[_Brood], numbers: list[dict], x: torch.Tensor, v: torch.Tensor):
        """Children of the batch's rows take their first step and join. numbers: `_numbers_of` each
        brood, on the device.

        Returns the noisy children's latents [B, ...] and log-probabilities [B] by their parent's
        place in the batch, and the children that have reached sigma = 0 as `_place` does.
        """
        noisy_children: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        done: list[tuple[int, torch.Tensor]] = []
        for brood, given in zip(broods, numbers, strict=True):
            parents = given["parents"]
            x_next, log_prob = sde_step(
                x[parents],
                v[parents],
                **{name: given[name] for name in ("a", "b", "tau", "key")},
                children=len(brood.members[0]),
                out_dtype=torch.float32,
            )
            for j, (n, k) in enumerate(zip(brood.parents, brood.steps, strict=True)):
                if brood.noisy:
                    noisy_children[n] = x_next[j], log_prob[j]
                done += self._place(brood.members[j], x_next[j], k + 1)
        return noisy_children, done

    def _states(self, batch, steps, x, families, x_next, log_prob) -> list[State]:
        """The states that the batch's rows left: a row's own noisy step and the noisy branches off
        it, as one state's children."""
        found = []
        for n, (i, k) in enumerate(zip(batch, steps, strict=True)):
            parts = [(x_next[n], log_prob[n])] if k in self.rows[i].noise else []
            parts += [families[n]] if n in families else []
            if not parts:
                continue
            children, scores = (
                (torch.cat(part) for part in zip(*parts)) if len(parts) > 1 else parts[0]
            )
            sigma, a, b, tau = (
                t[k].item()
                for t in (self.grid.sigmas, self.grid.sde.a, self.grid.sde.b, self.grid.sde.tau)
            )
            slots = self.forest.slots.get((i, k), np.zeros(0, dtype=np.int64))
            found.append(
                State(self.rows[i].unit, k, sigma, a, b, tau, x[n], children, slots, scores)
            )
        return found
