"""Which prompts are worth a rollout: those whose rewards never spread rest for a while, those that
spread most may come first.

Both are ideas of SAGE (arXiv 2602.01207), simplified. The signal of a prompt is the standard
deviation of the rewards within its groups; what all children of a state share teaches nothing, be
it success or failure. A prompt whose running signal is far below the average prompt's rests, and is
tried again after some iterations, because the model has changed. Nothing is random but the order,
so a run's choices follow from its rewards, the same on every rank; the state is small and goes into
the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tempflow.advantages.base import normalize
from tempflow.config import Curation as Settings
from tempflow.data.prompts import PromptOrder
from tempflow.types import Slots

MEMORY = 0.5  # weight of a prompt's earlier values in its running means


@dataclass(frozen=True)
class Draw:
    """An iteration's prompts."""

    indices: list[int]
    passed: list[int]
    """Resting prompts passed over on the way."""
    cursor: int
    """Place in the endless order after it."""
    preferred: int = 0
    """How many of the prompts, the first ones, were chosen by their signal and not met in that
    order."""


class Curation:
    """Draws prompts of an endless shuffled order, passing over those that rest; a share of them by
    their signal, out of order.

    `draw` changes nothing; `update` makes a draw count, with the rewards that it brought.
    """

    def __init__(
        self, settings: Settings, order: PromptOrder, group: str, kinds: np.ndarray | None = None
    ):
        """group: whose rewards are normalized together, one of `Slots.OVER`. kinds: int [count],
        prompts with the same rewards, which alone can be compared; None: all are of one kind."""
        self.settings, self.order, self.group = settings, order, group
        self.kinds = np.zeros(order.count, dtype=int) if kinds is None else kinds
        self.cursor = 0
        # running spread of a prompt's groups; NaN: never seen
        self.signal = np.full(order.count, np.nan)
        self.error = np.full(order.count, np.nan)  # standard error of the signal
        self.level = np.full(order.count, np.nan)  # running mean reward
        # first iteration in which it is drawn again
        self.until = np.zeros(order.count, dtype=np.int64)

    def draw(self, iteration: int) -> Draw:
        """The preferred prompts and the next ones that do not rest, each once. Where too few are
        awake, those that would wake first join them."""
        chosen = self._preferred(iteration)
        passed: list[int] = []
        preferred = len(chosen)
        cursor, size = self.cursor, self.order.per_iteration
        while len(chosen) < size and len(chosen) + len(passed) < self.order.count:
            index = self.order.at(cursor)
            cursor += 1
            if index not in chosen and index not in passed:  # met again where an epoch ends
                (passed if self.until[index] > iteration else chosen).append(index)
        woken = sorted(passed, key=lambda index: self.until[index])[: size - len(chosen)]
        return Draw(
            chosen + woken, [index for index in passed if index not in woken], cursor, preferred
        )

    def _preferred(self, iteration: int) -> list[int]:
        """The prompts of `prefer` places: of the known ones that do not rest those of the highest
        signal, less a standard error."""
        places = round(self.settings.prefer * self.order.per_iteration)
        known = np.flatnonzero(np.isfinite(self.signal) & (self.until <= iteration))
        # signals of different rewards differ in scale
        average = np.maximum(self._average(self.signal), np.finfo(float).tiny)
        surely = (self.signal - self.error) / average
        return sorted(known.tolist(), key=lambda index: (-surely[index], index))[:places]

    def update(self, draw: Draw, iteration: int, slots: Slots, rewards: np.ndarray) -> None:
        """Take up an iteration's rewards, [n] by slot with NaN where scoring failed, of the draw's
        prompts in their order."""
        self.cursor = draw.cursor
        groups = normalize(rewards, slots.groups(self.group))
        for place, index in enumerate(draw.indices):
            known = (slots.prompt == place) & groups.valid
            if known.any():
                labels = np.unique(groups.labels[known])
                spread, freedom = groups.std[labels].mean(), max(int(known.sum()) - len(labels), 1)
                self.error[index] = _running_error(self.error[index], spread / np.sqrt(2 * freedom))
                self.signal[index] = _running(self.signal[index], spread)
                self.level[index] = _running(self.level[index], rewards[known].mean())
        least = self.settings.spread * self._average(self.signal)
        for index in draw.indices:
            if self.signal[index] < least[index]:
                self.until[index] = iteration + 1 + self.settings.rest

    def metrics(self, draw: Draw, iteration: int) -> dict[str, float]:
        """Shares: of the prompts met in this iteration those passed over; of all prompts those at
        rest after it, solved (their rewards above the average prompt's) and hopeless."""
        resting, met = (
            self.until > iteration + 1,
            len(draw.passed) + len(draw.indices) - draw.preferred,
        )
        above = self.level >= self._average(self.level)
        return {
            "prompts/skipped": len(draw.passed) / max(met, 1),
            "prompts/solved": float((resting & above).mean()),
            "prompts/hopeless": float((resting & ~above).mean()),
        }

    def _average(self, values: np.ndarray) -> np.ndarray:
        """For each prompt the mean over those of its kind that were seen, [count]; NaN where none
        was."""
        means = np.full(len(values), np.nan)
        for kind in np.unique(self.kinds):
            seen = values[self.kinds == kind]
            means[self.kinds == kind] = np.nanmean(seen) if np.isfinite(seen).any() else np.nan
        return means

    def state(self) -> dict:
        """JSON values from which `load` goes on exactly; only prompts that were seen."""
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
        self.cursor = state["cursor"]
        for index, (signal, level, until, *error) in state[
            "prompts"
        ].items():  # earlier versions had no errors, and preferred none
            self.signal[int(index)], self.level[int(index)], self.until[int(index)] = (
                signal,
                level,
                until,
            )
            self.error[int(index)] = error[0] if error else 0.0


def _running(mean: float, value: float) -> float:
    return value if np.isnan(mean) else MEMORY * mean + (1 - MEMORY) * value


def _running_error(error: float, value: float) -> float:
    """The standard error of `_running`, of independent values."""
    return value if np.isnan(error) else float(np.hypot(MEMORY * error, (1 - MEMORY) * value))
