"""Choosing an iteration's prompts by their past rewards: prompts without a gradient are skipped for
a while, and prompts with a strong one can be drawn first.

Both are ideas of SAGE (arXiv 2602.01207), simplified. The signal of a prompt is the standard
deviation of the rewards within its groups: a group whose rewards are all equal has no gradient,
whether they are all high or all low. A prompt whose running signal is far below the average of all
prompts is skipped for some iterations and then tried again, because the model has changed since.

Only the order of the prompts is random. The choices are a function of the order and the rewards,
both the same on every rank, so nothing is communicated here. The state is small and is saved in
each checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tempflow.advantages.base import normalize
from tempflow.config import Curation as Settings
from tempflow.data.prompts import PromptOrder
from tempflow.types import Slots

MEMORY = 0.5  # weight of the earlier values in a prompt's running means


@dataclass(frozen=True)
class Draw:
    """The prompts of one iteration."""

    indices: list[int]
    """Indices into the prompt file, all different."""
    passed: list[int]
    """Indices of the prompts that were skipped, because they have no gradient at present."""
    cursor: int
    """Position in the endless order at which the next draw starts."""
    preferred: int = 0
    """How many of `indices`, the first ones, were chosen by their signal instead of by the
    order."""


class Curation:
    """Draws prompts from an endless shuffled order and skips those that have no gradient; a share
    of the prompts (`data.curation.prefer`) is chosen by signal instead.

    `draw` changes no state. `update` commits a draw, together with its rewards.

    Args:
        settings: the config's `data.curation`.
        order: the shuffled order.
        group: which rewards are normalized together, one of `Slots.OVER`.
        kinds: int [count], prompts that have the same rewards share a number; signals are compared
            within a kind only, since rewards differ in scale. None: all prompts are of one kind.
    """

    def __init__(
        self, settings: Settings, order: PromptOrder, group: str, kinds: np.ndarray | None = None
    ):
        self.settings, self.order, self.group = settings, order, group
        self.kinds = np.zeros(order.count, dtype=int) if kinds is None else kinds
        self.cursor = 0
        # Per prompt. NaN means never seen: 0 would be taken for a prompt without a gradient.
        self.signal = np.full(order.count, np.nan)  # running standard deviation within its groups
        self.error = np.full(order.count, np.nan)  # standard error of the signal
        self.level = np.full(order.count, np.nan)  # running mean reward
        # the first iteration in which the prompt may be drawn again
        self.until = np.zeros(order.count, dtype=np.int64)

    def draw(self, iteration: int) -> Draw:
        """The prompts of an iteration: the preferred ones, then the next ones of the order that are
        not skipped, each once. If all others are skipped, those whose time ends first fill up."""
        chosen = self._preferred(iteration)
        passed: list[int] = []
        preferred = len(chosen)
        cursor, size = self.cursor, self.order.per_iteration
        # The second condition ends the loop when every prompt has been met and too few are left.
        while len(chosen) < size and len(chosen) + len(passed) < self.order.count:
            index = self.order.at(cursor)
            cursor += 1
            # A prompt is met twice if it is preferred, or if the draw crosses the end of an epoch.
            if index not in chosen and index not in passed:
                (passed if self.until[index] > iteration else chosen).append(index)
        # Skipped prompts are better than fewer prompts: an iteration's size must not vary.
        woken = sorted(passed, key=lambda index: self.until[index])[: size - len(chosen)]
        return Draw(
            chosen + woken, [index for index in passed if index not in woken], cursor, preferred
        )

    def _preferred(self, iteration: int) -> list[int]:
        """The prompts with the highest signal minus its standard error, among those that were seen
        and are not skipped: a share `prefer` of the iteration."""
        places = round(self.settings.prefer * self.order.per_iteration)
        known = np.flatnonzero(np.isfinite(self.signal) & (self.until <= iteration))
        # Divided by the average of the kind, because signals of different rewards differ in scale;
        # the bound keeps 0 / 0 of a kind without any spread from becoming NaN.
        average = np.maximum(self._average(self.signal), np.finfo(float).tiny)
        # One standard error less: a signal from few children that is high by chance does not win.
        surely = (self.signal - self.error) / average
        # The index decides ties, so that all ranks choose alike.
        return sorted(known.tolist(), key=lambda index: (-surely[index], index))[:places]

    def update(self, draw: Draw, iteration: int, slots: Slots, rewards: np.ndarray) -> None:
        """Commit a draw and take its rewards into the running means.

        Args:
            draw: what `draw` returned for this iteration.
            iteration: its number.
            slots: the iteration's slots; `slots.prompt` counts the prompts in the draw's order.
            rewards: [n] by slot, NaN where scoring failed.
        """
        self.cursor = draw.cursor
        groups = normalize(rewards, slots.groups(self.group))
        for place, index in enumerate(draw.indices):
            known = (slots.prompt == place) & groups.valid
            if known.any():  # a prompt whose scoring failed throughout keeps its old values
                labels = np.unique(groups.labels[known])
                # Each group's mean takes one degree of freedom. The standard error of a standard
                # deviation s of normal values is s / sqrt(2 * degrees of freedom).
                spread, freedom = groups.std[labels].mean(), max(int(known.sum()) - len(labels), 1)
                self.error[index] = _running_error(self.error[index], spread / np.sqrt(2 * freedom))
                self.signal[index] = _running(self.signal[index], spread)
                self.level[index] = _running(self.level[index], rewards[known].mean())
        # After the loop above: the average includes this iteration's values, of all its prompts.
        least = self.settings.spread * self._average(self.signal)
        for index in draw.indices:
            # False for a signal that is still NaN
            if self.signal[index] < least[index]:
                self.until[index] = iteration + 1 + self.settings.rest

    def metrics(self, draw: Draw, iteration: int) -> dict[str, float]:
        """Three shares for the log: the skipped prompts among those met in this iteration, and the
        prompts among all that are skipped from now on, split into solved (mean reward at least the
        average of all prompts) and hopeless (below it)."""
        resting = self.until > iteration + 1
        met = len(draw.passed) + len(draw.indices) - draw.preferred
        above = self.level >= self._average(self.level)  # False for prompts never seen
        return {
            "prompts/skipped": len(draw.passed) / max(met, 1),
            "prompts/solved": float((resting & above).mean()),
            "prompts/hopeless": float((resting & ~above).mean()),
        }

    def _average(self, values: np.ndarray) -> np.ndarray:
        """For each prompt the mean over the prompts of its kind that were seen, [count]; NaN if
        none was."""
        means = np.full(len(values), np.nan)
        for kind in np.unique(self.kinds):
            seen = values[self.kinds == kind]
            # nanmean warns about a slice of NaN alone
            means[self.kinds == kind] = np.nanmean(seen) if np.isfinite(seen).any() else np.nan
        return means

    def state(self) -> dict:
        """JSON values from which `load` continues bit-exactly: of the prompts that were seen, as
        prompt files can be long."""
        seen = np.flatnonzero(np.isfinite(self.signal)).tolist()
        table = {
            str(i): [
                float(self.signal[i]),
                float(self.level[i]),
                int(self.until[i]),
                float(self.error[i]),
            ]
            for i in seen
        }
        return {"cursor": self.cursor, "prompts": table}

    def load(self, state: dict) -> None:
        """Continue from what `state` returned."""
        self.cursor = state["cursor"]
        # Checkpoints of earlier versions have three numbers for a prompt, without the error.
        for index, (signal, level, until, *error) in state["prompts"].items():
            i = int(index)  # JSON's keys are texts
            self.signal[i], self.level[i], self.until[i] = signal, level, until
            self.error[i] = error[0] if error else 0.0


def _running(mean: float, value: float) -> float:
    return value if np.isnan(mean) else MEMORY * mean + (1 - MEMORY) * value


def _running_error(error: float, value: float) -> float:
    """The standard error of `_running` for independent values: variances add, with the squares of
    the weights."""
    return value if np.isnan(error) else float(np.hypot(MEMORY * error, (1 - MEMORY) * value))
