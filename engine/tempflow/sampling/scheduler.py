"""Integrates the rows of a plan. Rows at different steps share forwards, and a shared prefix of
several rows is computed once.

Roots go first, because children wait for them. A child joins as soon as its parent has passed its
branch step, and takes its first step from its parent's (x_k, v_k) without a forward of its own.
Rows share no forward if the conditionings of their prompts differ in shape, or if different experts
of the denoiser predict them. Latents are integrated in fp32. Decoding and rewards are left to the
caller.
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
    """The cost of an integration, or the sum over several."""

    forwards: int = 0
    """Forwards, counted row by row."""
    batches: int = 0
    """Forwards, counted batch by batch."""
    padded: int = 0
    """Rows that only fill batches to a fixed size."""
    peak_latents: int = 0
    """The largest number of latents held at a time."""

    def __add__(self, other: Stats) -> Stats:
        """The cost of two integrations at the same time; their peaks may coincide, so they add
        up."""
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Arrived:
    """The results of one forward."""

    rows: list[int]
    """Places in the forest of the rows that reached sigma 0; often none."""
    latents: torch.Tensor | None
    """Their latents, fp32 [rows, ...]; None without rows."""
    states: list[State]
    """The states that the rows of the batch left with noise."""
    forwards: int
    """Rows in the batch."""
    stats: Stats
    """The cost of the integration so far."""


@dataclass(frozen=True)
class _Brood:
    """Children that take their first step in one launch: the same number for each of some rows of
    a batch."""

    noisy: bool
    """Whether that step is one of the SDE."""
    parents: list[int] = field(default_factory=list)
    """The parents' places in the batch."""
    steps: list[int] = field(default_factory=list)
    """The parents' steps."""
    members: list[list[int]] = field(default_factory=list)
    """The places of each parent's children in the forest."""


def eager(function: Callable, inputs: dict[str, torch.Tensor]) -> tuple:
    """Call a function with tensors by name. A `GraphCache` can be used instead."""
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
    """Integrate all rows of a forest. Each forward is computed when the next result is asked for,
    so the caller can decode in between, or stop early.

    Args:
        forest: the rows, with the slots of their states.
        denoise: computes velocities and steps.
        grid: the sigmas, and the coefficients of stochastic steps.
        noise: of this iteration.
        micro_batch: the largest number of rows in a forward.
        suffix: how rows are integrated after their last decision; None takes every step.
        execute: called with a function and its tensors by name, to run it.
        pad: fill every forward to a fixed number of rows, for graphs and compiled code:
            `micro_batch`, or a smaller number if conditionings differ in shape.
        given: latents, fp32 [...], of rows without a parent that begin at their `start`, by place
            in the forest. All other rows without a parent begin with initial noise.

    Yields:
        The results of each forward.
    """
    work = _Integration(
        forest, denoise, grid, noise, micro_batch, suffix, execute, pad, given or {}
    )
    yield from work.run()


class _Integration:
    """The state of an integration. Rows are known by their place in the forest; `latent` and `step`
    hold those under way, `free` is the first step after each row's last decision, and `paths` are
    the grid points from there on."""

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
        # The expert of each step.
        self.expert = [denoise.sampler.policy.expert(sigma) for sigma in grid.sigmas.tolist()]
        # Row forwards that are still ahead, by shape.
        self.ahead: Counter[Shape] = Counter()
        for i, shape in enumerate(self.shape):
            self.ahead[shape] += self._forwards_of(i)
        self.latent: dict[int, torch.Tensor] = {}
        self.step: dict[int, int] = {}
        second = suffix is not None and suffix.order == 2
        self.jumps = Jumps(grid.sigmas, self.free) if second else None
        self.forwards = self.batches = self.padded = self.peak = 0
        # Row count of padded forwards, fixed at the start: each other number is another graph.
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
            # Not around the whole loop: a mode that is set in a generator would stay set for the
            # caller at every yield.
            with torch.no_grad():
                arrived = self._forward(self._next_batch())
            yield arrived

    def _next_batch(self) -> list[int]:
        """The rows of the next forward.

        Roots come first, because children wait for them, then their children, and so on. At the
        same depth, rows nearest to their end come first, because rewards wait for them. But a row
        with as many forwards ahead as there are full batches left of its shape goes before those:
        if it waited, its last forwards would be small batches.
        """
        batches_left = {shape: -(-ahead // self.micro_batch) for shape, ahead in self.ahead.items()}

        def order(i: int):
            return (
                self.forest.depth[i],
                self._forwards_left(i) < batches_left[self.shape[i]],
                -self.step[i],
                i,  # a total order, so that batches and their bits do not depend on dict order
            )

        waiting = sorted(self.latent, key=order)
        waiting = [i for i in waiting if self.shape[i] == self.shape[waiting[0]]]
        waiting = [
            i for i in waiting if self.expert[self.step[i]] == self.expert[self.step[waiting[0]]]
        ]
        # If coarse steps use a transformer of their own, they share no forward with exact ones.
        if self.denoise.coarse_transformer is not None:
            coarse = self._is_coarse(waiting[0], self.step[waiting[0]])
            waiting = [i for i in waiting if self._is_coarse(i, self.step[i]) is coarse]
        return waiting[: self.micro_batch]

    def _forward(self, batch: list[int]) -> Arrived:
        steps = [self.step[i] for i in batch]
        with span("forward", rows=len(batch), steps=f"{min(steps)}-{max(steps)}"):
            # The rows leave `latent`; `_place` puts back those that have not reached sigma 0.
            x = torch.stack([self.latent.pop(i) for i in batch])
            goals = [self._goal(i, k) for i, k in zip(batch, steps, strict=True)]
            broods = self._broods(batch, steps)
            # Everything from the host that this forward and its branches need, in one pinned copy,
            # so that the host does not wait for the forwards before.
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
            # Rows of different steps have different goals; `_place` takes those of one.
            for goal in sorted(set(goals)):
                members = [n for n, other in enumerate(goals) if other == goal]
                arrived = [x_next[n, 0] for n in members]
                done += self._place([batch[n] for n in members], arrived, goal)
        stats = Stats(self.forwards, self.batches, self.padded, self.peak)
        latents = torch.stack([latent for _, latent in done]) if done else None
        return Arrived([i for i, _ in done], latents, states, len(batch), stats)

    # -------------------------------------------------------------------------------- where rows go
    def _is_coarse(self, index: int, step: int) -> bool:
        """Whether a row is past its last decision and the exact steps of the suffix after it."""
        return self.suffix is not None and step >= self.free[index] + self.suffix.exact_steps

    def _most(self, shape: Shape, coarse: bool) -> int:
        """The number of rows of a padded forward.

        If shapes differ, each shape has few rows, and another number in each iteration. The next
        power of two then wastes little work and needs few graphs. If coarse steps have forwards of
        their own, exact forwards need no more rows than take exact steps.
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
        """The number of forwards of a row from its start to sigma 0."""
        return (
            len(self.paths[self.free[index]])
            - 1
            + self.free[index]
            - first_forward(self.rows[index])
        )

    def _forwards_left(self, index: int) -> int:
        """The number of forwards that a row under way still needs."""
        step, free = self.step[index], self.free[index]
        path = self.paths[free]
        return free - step + len(path) - 1 if step < free else len(path) - 1 - path.index(step)

    def _goal(self, index: int, step: int) -> int:
        """The grid point that a row at `step` goes to: the next one up to its last decision, and
        after that the next one of its suffix."""
        if step < self.free[index]:
            return step + 1
        path = self.paths[self.free[index]]
        return path[path.index(step) + 1]

    def _place(
        self, indices: list[int], latents: Iterable[torch.Tensor], step: int
    ) -> list[tuple[int, torch.Tensor]]:
        """Keep latents of rows that are now at `step`. At sigma 0 they are returned instead, with
        their rows' places."""
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
        """One forward and the step after it.

        Args:
            batch: places of the rows.
            steps: the rows' steps.
            own: `_numbers` of the batch, on the device.
            x: the rows' latents, fp32 [n, ...].

        Returns:
            Velocity, next latents and log-probabilities of the n rows, as `Denoise.step`.
        """
        own, shape = dict(own), self.shape[batch[0]]
        inputs = {
            "x": x,
            **self.denoise.conditions(shape, own.pop("prompt")),
            **(self.jumps.before(batch, x) if self.jumps else {}),
            **own,
        }
        coarse = self._is_coarse(batch[0], steps[0])
        missing = self.fill[shape, coarse] - len(batch) if self.pad else 0
        # With copies of the first row; the results of these rows are dropped.
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
        """The numbers that a batch's forward and step need besides latents and embeddings, on the
        CPU: scalars fp32 [n], keys int64 [n, 1], and the place of each row's prompt, int64 [n]."""
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
        """(a, b, tau) of the steps of n rows, fp32 [n] each: those of the SDE for a noisy row, else
        those of the ODE from its step to its goal."""
        choose, sigmas = torch.tensor(noisy), self.grid.sigmas
        # In fp64 and rounded once, as `steps.ode_coefficients` does: the bits must be the same.
        dt = (sigmas[goals].double() - sigmas[steps].double()).float()
        ode = {"a": torch.ones_like(dt), "b": dt, "tau": torch.zeros_like(dt)}
        return {
            name: torch.where(choose, getattr(self.grid.sde, name)[steps], value)
            for name, value in ode.items()
        }

    # ------------------------------------------------------------------------------------- branches
    def _broods(self, batch: list[int], steps: list[int]) -> list[_Brood]:
        """The children of the batch's rows that take their first step now."""
        # One launch for each number of children, because a launch takes the same number for all of
        # its rows; noisy and other children apart, because a launch has one tau for each parent.
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
        """The numbers that the first step of a brood needs besides latents and velocities, on the
        CPU: `_scalars`, keys int64 [parents, children], and the parents' places int64
        [parents]."""
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
        """Take the first step of children that branch off the batch's rows, and keep them.

        Args:
            broods: `_broods` of the batch.
            numbers: `_numbers_of` each brood, on the device.
            x: the batch's latents before the step, fp32 [n, ...].
            v: their velocities, [n, ...].

        Returns:
            The noisy children's latents [B, ...] and log-probabilities [B] by their parent's place
            in the batch, and the children that have reached sigma 0, as `_place` returns them.
        """
        noisy_children: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        done: list[tuple[int, torch.Tensor]] = []
        for brood, given in zip(broods, numbers, strict=True):
            parents = given["parents"]
            # Children stay in fp32, like all latents. Rounding them to a coarser dtype after their
            # log-probability was taken would break the ratio of 1 before the first update.
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
        """The states that the batch's rows left. The children of a state are a row's own noisy step
        and the noisy branches off it."""
        found = []
        for n, (i, k) in enumerate(zip(batch, steps, strict=True)):
            # The row itself first, in the order of `layout.states_of`, which numbers the slots.
            parts = [(x_next[n], log_prob[n])] if k in self.rows[i].noise else []
            parts += [families[n]] if n in families else []
            if not parts:
                continue
            children, scores = (
                (torch.cat(part) for part in zip(*parts)) if len(parts) > 1 else parts[0]
            )
            # The grid is on the CPU, so these reads do not wait for the device.
            sigma, a, b, tau = (
                t[k].item()
                for t in (self.grid.sigmas, self.grid.sde.a, self.grid.sde.b, self.grid.sde.tau)
            )
            # No slots: an objective that learns from finished latents has states without any.
            slots = self.forest.slots.get((i, k), np.zeros(0, dtype=np.int64))
            found.append(
                State(self.rows[i].unit, k, sigma, a, b, tau, x[n], children, slots, scores)
            )
        return found
