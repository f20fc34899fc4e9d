"""One iteration of training in steps, for notebooks: branch, inspect the results, update.

A `Walkthrough` has the parts of a run (model, reward workers, optimizer) but writes no run
directory. It calls the functions of the training loop, so it shows what a run does. It does without
the order of prompts, curation, rollout.adapt, averaged weights and evaluations, and works in one
process only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Sequence

import numpy as np

from tempflow.config import load_config
from tempflow.data.prompts import typed_prompts
from tempflow.errors import UserError, note, shown
from tempflow.rewards import RewardPool, check_prompts
from tempflow.rewards.pool import Ticket
from tempflow.run.environment import LAUNCH
from tempflow.training.start import check_hardware, checked_inputs


@dataclass(frozen=True)
class Branching:
    """A rollout and its rewards: m sampled rows, and the n children of their states.

    Rows are ordered by prompt, then by seed; a trunk comes before its children.
    """

    images: np.ndarray
    """uint8 [m, H, W, 3], or videos [m, F, H, W, 3]."""
    rewards: np.ndarray
    """float64 [m]: the weighted sum of the rewards; NaN where one failed."""
    parent: np.ndarray
    """int [m]: the row that each row branched off; -1 if it starts from the initial noise."""
    start: np.ndarray
    """int [m]: the step at which it branched off."""
    sigmas: np.ndarray
    """float32 [T + 1]: the sampling grid, from 1 to 0."""
    weights: np.ndarray
    """float32 [T]: the loss weight of each step; 0 where no row branches."""
    row: np.ndarray
    """int [n]: the row of each child."""
    state: np.ndarray
    """int [n]: the state that each child left, an index into `latents`."""
    step: np.ndarray
    """int [n]: the step at which it left."""
    child_rewards: np.ndarray
    """float64 [n]: the mean reward of the child's row and of those that branch off it."""
    advantages: np.ndarray
    """float32 [n]; 0 where the reward failed."""
    latents: np.ndarray
    """float32 [states, ...]: before the step."""
    child_latents: np.ndarray
    """float32 [n, ...]: after the step."""
    _parts: list = field(repr=False)
    """The updater's parts, which keep the old policy's outputs for later passes."""
    _updates: int = field(repr=False)
    """Number of updates before these rows were sampled."""


class _KeepingPool(RewardPool):
    """A reward pool that keeps the images it scores, which a run would drop."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seen: dict[Ticket, np.ndarray] = {}

    def submit(self, images: np.ndarray, *arguments, **options) -> Ticket:
        ticket = super().submit(images, *arguments, **options)
        # A copy: the caller may reuse the array.
        self.seen[ticket] = np.array(images)
        return ticket


class Walkthrough:
    """The parts of a run, for some prompts. Close it, or use it in a `with` block.

    Args:
        config: a JSON file, or its content as a dict, as for `tempflow.train`. Objectives that
            learn from finished latents are refused.
        prompts: the prompts of every iteration, instead of the config's.
        overrides: texts `section.key=value`, as for --set.

    Raises:
        tempflow.errors.UserError: for bad input, or in a process that a launcher started as one of
            several ranks.
    """

    def __init__(
        self, config: str | Path | dict, prompts: Sequence[str], overrides: Sequence[str] = ()
    ):
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(
                "Walkthrough: works in one process only, but WORLD_SIZE is"
                f" {shown(os.environ['WORLD_SIZE'])}; start it without a launcher"
            )
        self._environment = {name: os.environ.get(name) for name in LAUNCH}
        loaded = load_config(config, list(overrides))
        if loaded.objective().wants != "states":
            raise UserError(
                "training.objective: learns from finished latents; Walkthrough needs one on states,"
                ' such as "grpo"'
            )
        specs, _, _ = checked_inputs(loaded)
        examples = typed_prompts(list(prompts), "prompts")
        for line in check_prompts(specs, [p.text for p in examples], [{} for _ in examples]):
            note(line)
        check_hardware(loaded)
        self.updates = 0
        self._pool = _KeepingPool(specs, **loaded.reward_pool.pool())
        try:
            self._open(loaded, specs, examples)
        except BaseException:
            # Otherwise the worker processes would outlive a failed cell of a notebook.
            self.close()
            raise

    def _open(self, config, specs, examples) -> None:
        from tempflow.training import distributed
        from tempflow.training.session import build
        from tempflow.training.update import Updater

        distributed.init_distributed()
        s = self.session = build(config, examples, [], specs, pool=self._pool, note=note)
        assert s.runtime is not None  # it trains
        self._runtime = s.runtime
        self._updater = Updater(s.runtime, s.sampler, s.objective, s.penalty, s.embed)

    def __enter__(self) -> Walkthrough:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """End the reward workers, and restore the environment variables of launchers."""
        self._pool.close()
        for name, value in self._environment.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})

    def branch(self, iteration: int = 0) -> Branching:
        """Sample the rows of an iteration with the current weights, and score them.

        Args:
            iteration: determines the noise, and the branch steps of plans that vary them.
        """
        from tempflow.training.credit import loss_weights, make_parts
        from tempflow.training.rollout import gather_rewards, plan_iteration, roll_out

        s = self.session
        layout = plan_iteration(s, list(range(len(s.prompts))), iteration)
        with s.threads.shared():
            rolled = roll_out(s, layout, iteration, s.config.rollout.suffix)
            assert rolled is not None  # nobody asks this session to stop
            scored = gather_rewards(s, rolled)
        credit = s.advantage(layout.slots, scored.rewards)
        # A row's parent is an index among its unit's rows; `first` makes it one among all rows.
        rows = [(first, row) for first, unit in zip(layout.first, layout.rows) for row in unit]
        states = rolled.kept.states
        places = {number: place for place, state in enumerate(states) for number in state.slots}
        latents = {n: y for s in states for n, y in zip(s.slots, s.children, strict=True)}
        slots = range(len(layout.slots))
        return Branching(
            images=self._images(rolled),
            rewards=scored.by_row,
            parent=np.array([-1 if r.parent is None else first + r.parent for first, r in rows]),
            start=np.array([row.start for _, row in rows]),
            sigmas=rolled.kept.grid.sigmas.cpu().numpy(),
            weights=loss_weights(s, rolled).cpu().numpy(),
            row=np.array([leaves[0] for leaves in layout.slots.leaves]),
            state=np.array([places[n] for n in slots]),
            step=layout.slots.step,
            child_rewards=scored.rewards.total,
            advantages=credit.values,
            latents=np.stack([state.x.cpu().numpy() for state in states]),
            child_latents=np.stack([latents[n].cpu().numpy() for n in slots]),
            _parts=make_parts(s, rolled, credit),
            _updates=self.updates,
        )

    def _images(self, rolled) -> np.ndarray:
        """The images in the order of `Branching`'s rows."""
        # The scheduler decodes rows as they finish, so images come in another order.
        seen = np.concatenate([self._pool.seen.pop(ticket) for ticket in rolled.images.tickets])
        numbers = [rolled.forest.numbers[place] for place in rolled.images.rows]
        return seen[np.argsort(numbers)]

    def update(self, branching: Branching) -> list[dict]:
        """Make one pass over the states of a branching.

        A second call trains on the same states again, with ratios to the policy that sampled them.

        Args:
            branching: from `branch`.

        Returns:
            The metrics of each optimizer step. `loss` and `ratio/max_dev` are computed with the
            weights before the step, so in the first step of the first pass all ratios are 1.

        Raises:
            tempflow.errors.UserError: the weights have changed between `branch` and the first pass.
        """
        fresh = any(old is None for part in branching._parts for old in part.old)
        if fresh and branching._updates != self.updates:
            raise UserError(
                "update: the weights have changed since these rows were sampled; call branch again"
            )
        s, found = self.session, []
        # Later passes have the old policy's outputs already.
        if fresh:
            # Before the first step changes the weights. The first part gets the old policy's
            # outputs from its own forward.
            for part in branching._parts[1:]:
                self._updater.remember(part)
        for part in branching._parts:
            found.append(self._updater.update(part, lr_factor=1.0))
        self.updates += 1
        # The next `branch` samples with the rollout copy, which is updated as in a run.
        if s.config.rollout.replica:
            self._runtime.refresh(s.policy.denoiser())
        return found

    def draw(self, seed: int = 0) -> np.ndarray:
        """Sample the prompts with the current weights and the ODE, as evaluations do.

        Args:
            seed: of the initial noise.

        Returns:
            uint8 images [prompts, H, W, 3], or videos [prompts, F, H, W, 3].
        """
        import torch

        from tempflow.run import evaluation

        s = self.session
        with torch.no_grad():
            drawn = list(evaluation.draw(s, s.prompts, list(range(len(s.prompts))), seed=seed))
        order = np.argsort(np.concatenate([places for places, _, _ in drawn]))
        return np.concatenate([images for _, images, _ in drawn])[order]
