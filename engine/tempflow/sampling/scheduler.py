"""Runs a plan: rows at different steps share forwards, trunks first, children as soon as their parent passes.

A parent's (x_k, v_k) is computed once; its children take their SDE step from it without a forward of their own.
Every stochastic transition is recorded as part of a decision. The latent being integrated stays in fp32.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, fields
from typing import Callable

import torch

from tempflow.config import Suffix
from tempflow.profiling import span
from tempflow.sampling.noise import INITIAL, key_tensor, noise_key
from tempflow.sampling.plans import Row, Unit
from tempflow.sampling.plans import RowPlan as Plan
from tempflow.sampling.steps import Coefficients
from tempflow.sampling.suffix import count_forwards, first_forward, last_decisions, second_order_gain, suffix_path
from tempflow_kernels import normal, sde_step


@dataclass(frozen=True)
class Decision:
    """One state and the B children that left it.

    x: fp32 [...]; x_next: fp32 [B, ...]; log_prob: fp32 [B] under the rollout's own velocity; step: its place in the grid.
    """

    unit: Unit
    step: int
    x: torch.Tensor
    x_next: torch.Tensor
    log_prob: torch.Tensor


@dataclass
class RolloutStats:
    """forwards: rows that went through the transformer; batches: forwards of any size; padded: rows in them that only
    fill a batch of fixed size; peak_latents: most held."""

    forwards: int = 0
    batches: int = 0
    padded: int = 0
    peak_latents: int = 0

    def __add__(self, other: RolloutStats) -> RolloutStats:
        """Of two schedulers side by side."""
        return RolloutStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class _Jump:
    """A row's last jump in a second-order suffix. velocity: fp32 [...] where it began, at grid point `step`. extrapolated: fp32 [...],
    what the velocity's slope added to it."""

    step: int
    velocity: torch.Tensor
    extrapolated: torch.Tensor


@dataclass
class RowScheduler:
    """Integrates the rows of a plan.

    conditioning(units of n rows) -> tensors [n, ...] by name, and velocity(x [n, ...], sigma fp32 [n], **conditioning) ->
    [n, ...], the policy's transformer, a function of its tensors alone. run(function, inputs by name) calls such a
    function; a graph cache takes its place, for which pad makes every forward one of micro_batch rows.
    sigmas: fp32 [T + 1]; sde: the stochastic steps' coefficients. on_finished(row indices, latents fp32 [n, ...])
    is called with rows as they reach sigma = 0. advance(n) is told of every n rows forwarded. suffix: how rows go on
    after their last decision; None is exact. suffix_velocity: the velocity of the coarser steps, where it is another; they then
    share no forward with others.
    """

    plan: Plan
    conditioning: Callable[[list[Unit]], dict[str, torch.Tensor]]
    velocity: Callable[..., torch.Tensor]
    sigmas: torch.Tensor
    sde: Coefficients
    micro_batch: int
    run_seed: int
    iteration: int
    on_finished: Callable[[list[int], torch.Tensor], None]
    advance: Callable[[int], None] = lambda n: None
    device: torch.device | str = "cpu"
    suffix: Suffix | None = None
    suffix_velocity: Callable[..., torch.Tensor] | None = None
    run: Callable[[Callable, dict], tuple] = lambda function, inputs: function(**inputs)
    pad: bool = False
    stats: RolloutStats = field(default_factory=RolloutStats)

    def __post_init__(self):
        self._last = len(self.sigmas) - 1
        self._free = [k + 1 for k in last_decisions(self.plan)]
        self._paths = {free: suffix_path(free, self._last, self.suffix) for free in set(self._free)}
        exact = sum(not self._is_coarse(i, first_forward(row)) for i, row in enumerate(self.plan.rows))
        self._fill = {False: min(self.micro_batch, exact) if self.suffix_velocity else self.micro_batch, True: self.micro_batch}
        self._total = count_forwards(self.plan, self._last, self.suffix)
        self._jumps: dict[int, _Jump] = {}
        self._state: dict[int, torch.Tensor] = {}
        self._step: dict[int, int] = {}
        self._branches: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, row in enumerate(self.plan.rows):
            if row.parent is not None:
                self._branches[row.parent, row.start].append(index)

    @torch.no_grad()
    def roll_out(self, latent_shape: tuple[int, ...]) -> list[Decision]:
        """Integrate every row; returns the decisions, ordered by unit and step."""
        roots = [i for i, row in enumerate(self.plan.rows) if row.parent is None]
        if roots:
            keys = key_tensor([self._key(self.plan.rows[i], INITIAL) for i in roots], self.device)
            noise = normal(keys, torch.Size(latent_shape).numel()).reshape(len(roots), *latent_shape)
            self._place(roots, noise, 0)
        decisions: list[Decision] = []
        while self._state:
            batch = self._next_batch()
            steps = [self._step[i] for i in batch]
            with span("forward", rows=len(batch), steps=f"{min(steps)}-{max(steps)}"):
                self._forward(batch, steps, decisions)
        return sorted(decisions, key=lambda d: (d.unit.index, d.step))

    def _next_batch(self) -> list[int]:
        """Trunks first, because children wait for them; then the rows nearest to their end, because rewards do.

        Rows with as many forwards ahead as there are full batches left go before those: left behind, they would end in
        small batches of their own.
        """
        batches_left = -(-(self._total - self.stats.forwards) // self.micro_batch)

        def order(i: int):
            return self.plan.rows[i].parent is not None, self._forwards_left(i) < batches_left, -self._step[i], i

        waiting = sorted(self._state, key=order)
        if self.suffix_velocity:
            coarse = self._is_coarse(waiting[0], self._step[waiting[0]])
            waiting = [i for i in waiting if self._is_coarse(i, self._step[i]) is coarse]
        return waiting[: self.micro_batch]

    def _is_coarse(self, index: int, step: int) -> bool:
        """Whether a row has its last decision behind it, and the exact steps after that."""
        return self.suffix is not None and step >= self._free[index] + self.suffix.exact_steps

    def _forwards_left(self, index: int) -> int:
        step, free = self._step[index], self._free[index]
        path = self._paths[free]
        return free - step + len(path) - 1 if step < free else len(path) - 1 - path.index(step)

    def _forward(self, batch: list[int], steps: list[int], decisions: list[Decision]) -> None:
        x = torch.stack([self._state.pop(i) for i in batch])
        rows = [self.plan.rows[i] for i in batch]
        goals = [self._goal(i, k) for i, k in zip(batch, steps, strict=True)]
        noisy = [k in row.noise for row, k in zip(rows, steps, strict=True)]
        keys = [[self._key(row, k)] for row, k in zip(rows, steps, strict=True)]
        inputs = {"x": x, "sigma": self.sigmas[steps].to(self.device), **self._scalars(steps, goals, noisy),
                  "key": key_tensor(keys, self.device), **self._history(batch, steps, goals, x),
                  **self.conditioning([row.unit for row in rows])}  # fmt: skip
        v, x_next, log_prob = self._padded_run(inputs, len(batch), self._is_coarse(batch[0], steps[0]))
        self.stats.forwards += len(batch)
        self.stats.batches += 1
        self._remember(batch, steps, goals, v)
        self._branch(batch, steps, x, v, decisions)
        for n in (n for n, is_noisy in enumerate(noisy) if is_noisy):
            decisions.append(Decision(rows[n].unit, steps[n], x[n], x_next[n], log_prob[n]))
        for goal in sorted(set(goals)):
            members = [n for n, other in enumerate(goals) if other == goal]
            self._place([batch[n] for n in members], x_next[members, 0], goal)
        self.advance(len(batch))

    def _goal(self, index: int, step: int) -> int:
        """The grid point that a row at `step` goes to: the next one while decisions lie ahead, then its suffix's."""
        if step < self._free[index]:
            return step + 1
        path = self._paths[self._free[index]]
        return path[path.index(step) + 1]

    def _padded_run(self, inputs: dict[str, torch.Tensor], size: int, coarse: bool) -> list[torch.Tensor]:
        """One forward and step; a batch that is not full is filled by its first row where shapes must not change."""
        missing = self._fill[coarse] - size if self.pad else 0
        if missing:
            self.stats.padded += missing
            inputs = {name: torch.cat([t, t[:1].expand(missing, *t.shape[1:])]) for name, t in inputs.items()}
        step = self._suffix_forward_and_step if coarse and self.suffix_velocity else self._forward_and_step
        return [t[:size] for t in self.run(step, inputs)]

    def _forward_and_step(self, **inputs):
        """What one launch of everything does: the velocity [n, ...], the next latents [n, 1, ...], log-probabilities [n, 1]."""
        return self._step_along(self.velocity, **inputs)

    def _suffix_forward_and_step(self, **inputs):
        """The same in coarser steps, where the velocity there is another."""
        return self._step_along(self.suffix_velocity, **inputs)

    @staticmethod
    def _step_along(velocity, x, sigma, a, b, tau, key, v_before=None, bend=None, extrapolated=None, **conditioning):
        v = velocity(x, sigma, **conditioning)
        used = v
        if v_before is not None:  # v itself stays in its dtype, as training will see it
            used = v.float() + bend.reshape(-1, *[1] * (v.ndim - 1)) * (v.float() - v_before)
            x = x - extrapolated
        return v, *sde_step(x, used, a, b, tau, key=key, children=1, out_dtype=torch.float32)

    def _history(self, batch: list[int], steps: list[int], goals: list[int], x: torch.Tensor) -> dict[str, torch.Tensor]:
        """In a second-order suffix: each row's velocity before, how much the step bends by the difference to it, and what of the
        last jump is taken back, because the new slope covers both jumps."""
        if self.suffix is None or self.suffix.order == 1:
            return {}
        bends, velocities, extrapolated = torch.zeros(len(batch)), torch.zeros_like(x), torch.zeros_like(x)
        for n, (i, step, goal) in enumerate(zip(batch, steps, goals, strict=True)):
            if i in self._jumps:
                jump = self._jumps[i]
                both = second_order_gain(self.sigmas, jump.step, step) + second_order_gain(self.sigmas, step, goal)
                bends[n] = both / self._gap(jump.step, step) / self._gap(step, goal)
                velocities[n], extrapolated[n] = jump.velocity, jump.extrapolated
        return {"v_before": velocities, "bend": bends.to(self.device), "extrapolated": extrapolated}

    def _remember(self, batch: list[int], steps: list[int], goals: list[int], v: torch.Tensor) -> None:
        if self.suffix is None or self.suffix.order == 1:
            return
        for n, (i, step, goal) in enumerate(zip(batch, steps, goals, strict=True)):
            before = self._jumps.pop(i, None)
            if self._free[i] > step or goal == self._last:  # a velocity from before the last noise misleads
                continue
            now = v[n].float()
            part = torch.zeros_like(now)
            if before is not None:
                part = second_order_gain(self.sigmas, step, goal) / self._gap(before.step, step) * (now - before.velocity)
            self._jumps[i] = _Jump(step, now, part)

    def _gap(self, step: int, goal: int) -> float:
        return (self.sigmas[goal] - self.sigmas[step]).item()

    def _branch(self, batch, steps, x, v, decisions) -> None:
        """Children of the batch's rows take their SDE step and join."""
        parents = [n for n, (i, k) in enumerate(zip(batch, steps, strict=True)) if (i, k) in self._branches]
        if not parents:
            return
        families = [self._branches.pop((batch[n], steps[n])) for n in parents]
        keys = [[self._key(self.plan.rows[c], steps[n]) for c in family] for n, family in zip(parents, families)]
        at = [steps[n] for n in parents]
        to = [k + 1 for k in at]
        x_next, log_prob = sde_step(x[parents], v[parents], **self._scalars(at, to, [True] * len(parents)),
                                    key=key_tensor(keys, self.device), children=len(keys[0]), out_dtype=torch.float32)  # fmt: skip
        for j, (n, family) in enumerate(zip(parents, families, strict=True)):
            decisions.append(Decision(self.plan.rows[batch[n]].unit, at[j], x[n], x_next[j], log_prob[j]))
            self._place(family, x_next[j], to[j])

    def _scalars(self, steps: list[int], goals: list[int], noisy: list[bool]) -> dict[str, torch.Tensor]:
        """(a, b, tau) of n rows' steps, fp32 [n]: the SDE's where a row is noisy, else the ODE's to its goal."""
        choose = torch.tensor(noisy)
        dt = (self.sigmas[goals].double() - self.sigmas[steps].double()).float()
        ode = {"a": torch.ones_like(dt), "b": dt, "tau": torch.zeros_like(dt)}
        return {name: torch.where(choose, getattr(self.sde, name)[steps], value).to(self.device) for name, value in ode.items()}

    def _place(self, indices: list[int], latents: torch.Tensor, step: int) -> None:
        if step == self._last:
            self.on_finished(indices, latents)
            return
        for index, latent in zip(indices, latents, strict=True):
            self._state[index], self._step[index] = latent, step
        self.stats.peak_latents = max(self.stats.peak_latents, len(self._state))

    def _key(self, row: Row, step: int) -> int:
        return noise_key(self.run_seed, self.iteration, row.unit.prompt_id, row.unit.seed, step, row.child)
