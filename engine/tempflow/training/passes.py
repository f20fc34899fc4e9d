"""The updates of one iteration: passes over its parts, the handling of skipped updates, and a check
that two forwards of the same states agree."""

from __future__ import annotations

from typing import Callable

from tempflow.errors import UserError, shown
from tempflow.run.recorder import Recorder
from tempflow.training import distributed
from tempflow.training.session import Session
from tempflow.training.update import Part, Updater
from tempflow.types import Unit


class Passes:
    """Takes the optimizer steps of iterations, and counts how many were skipped in a row.

    Args:
        session: the run.
        recorder: shows progress and warnings.
        save: writes a checkpoint; called before too many skipped updates end the run.
    """

    def __init__(self, session: Session, recorder: Recorder, save: Callable[[], None]):
        self._session, self._recorder, self._save = session, recorder, save
        self._updater = Updater(
            session.runtime, session.sampler, session.objective, session.penalty, session.embed
        )
        self._skipped_in_a_row = 0

    def take(
        self, parts: list[Part], iteration: int, lr_factor: Callable[[], float]
    ) -> tuple[list[dict], int]:
        """All updates of an iteration (a collective).

        Args:
            parts: the iteration's states in parts; each part makes one optimizer step in every
                pass.
            iteration: its number, from 0.
            lr_factor: returns the factor of the learning rate; called at every update.

        Returns:
            The metrics of each update, and the number of rows forwarded besides, on all ranks.

        Raises:
            UserError: more than training.max_skipped updates in a row were skipped.
        """
        count, updates, forwards = self._session.config.training.updates.passes, [], 0
        steps = sum(len(part.batches) for part in parts)
        with self._recorder.console.phase("train", count * steps) as advance:
            # Before any update: the check needs two forwards with the same weights.
            if iteration == 0 and parts:
                self._check_replay(parts[0])
            # The first part's first update defines its own old policy. It also moves the weights,
            # so the old policy of the other parts must be recorded before it.
            for part in parts[1:]:
                forwards += self._updater.remember(part)
            for _ in range(count):
                for part in parts:
                    updates.append(self._updater.update(part, lr_factor(), advance))
                    self._after(updates, iteration)
        return updates, int(distributed.reduce(forwards))

    def _after(self, updates: list[dict], iteration: int) -> None:
        if updates[-1]["skipped"]:
            self._skipped(
                f"iteration {iteration + 1}, update {len(updates)}", updates[-1]["broken"]
            )
            return
        self._skipped_in_a_row = 0
        # Not after a skipped update: the weights did not change.
        if self._session.average:
            self._session.average.update()

    def _skipped(self, which: str, broken: list[Unit]) -> None:
        """Warn about a skipped update and name the prompts that caused it (a collective).

        Raises:
            UserError: it was one too many; a checkpoint is written first.
        """
        self._skipped_in_a_row += 1
        gathered = distributed.gather_objects(
            [self._session.prompts[unit.prompt_id].text for unit in broken]
        )
        texts = list(dict.fromkeys(text for texts in gathered or [] for text in texts))
        named = ", ".join(map(shown, texts[:5])) + (" and others" if len(texts) > 5 else "")
        cause = f"log-probabilities of {named}" if texts else "gradient"
        self._recorder.note(f"warning: {which} skipped: {cause} not finite; weights unchanged")
        allowed = self._session.config.training.max_skipped
        if self._skipped_in_a_row > allowed:
            self._save()
            raise UserError(
                f"{self._skipped_in_a_row} updates in a row had no finite gradient, more than"
                f" training.max_skipped ({allowed}) allows; the weights before them are saved. A"
                " lower learning rate, or more precision in the deepspeed section and model.dtype,"
                " may help"
            )

    def _check_replay(self, part: Part) -> None:
        """Warn if a second forward of the same states, with the same weights, gives ratios other
        than 1 (a collective)."""
        # One micro-batch of the run's first iteration: each that is checked costs two forwards.
        deviation = float(
            distributed.reduce(self._updater.replay_deviation(part.batches[0]), "max")
        )
        allowed = min(self._session.objective.clip_high, 1e-2)
        if deviation > 0.1 * allowed:
            self._recorder.note(
                "warning: two passes over the same states with the same weights give ratios up to"
                f" {deviation:.1e} from 1 (clip_high {allowed:.1e}). Dropout, non-deterministic"
                " kernels or too low a precision in the deepspeed section cause this."
            )
