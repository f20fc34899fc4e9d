"""Refinement guided by a reward, without training: the best image so far is noised to a middle
step, sampled again from there, and replaced by a better one.

After reward-guided iterative refinement (arXiv 2502.14944), with the scheduler of training: in each
round the best latent x_0 of a prompt, its incumbent, becomes x_k = (1 - sigma_k) x_0 + sigma_k eps,
from which candidates are integrated to sigma 0. With zero rounds this is best-of-n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator, cast

import numpy as np
import torch

from tempflow.config import Suffix
from tempflow.models.opened import Opened
from tempflow.run import evaluation
from tempflow.sampling.denoise import Denoise
from tempflow.sampling.layout import Forest
from tempflow.sampling.noise import AFTERWARDS, Noise
from tempflow.sampling.scheduler import integrate
from tempflow.sampling.steps import Grid
from tempflow.types import Example, Row, Unit

# Round r uses the noise of iteration FIRST_ROUND - r. Training has no negative iterations and
# evaluations have -1, so no noise is used twice.
FIRST_ROUND = evaluation.EVAL_ITERATION - 1

Judge = Callable[[list[int], torch.Tensor], Callable[[], tuple[np.ndarray, np.ndarray]]]
"""Takes the places of n prompts and their final latents [n, ...]. Returns a function that waits for
(uint8 images [n, ...], rewards float [n], NaN where one failed)."""


@dataclass(frozen=True)
class Search:
    """How candidates are made."""

    rounds: int
    """Rounds after the first candidates, which are made from initial noise."""
    children: int
    """Candidates of each prompt in every round, and at the beginning."""
    steps: tuple[int, int] = (0, 0)
    """k in the first and in the last round; evenly spaced in between."""
    branch: bool = True
    """True: all candidates of a prompt's round start from the same x_k; the first follows the ODE,
    each other one takes one SDE step and then follows the ODE, as in training. False: each
    candidate has its own eps and follows the ODE."""
    target: float | None = None
    """A prompt whose reward has reached this value is not searched any further."""

    def step(self, number: int) -> int:
        """k of round `number`, from 1 on."""
        first, last = self.steps
        return round(first + (last - first) * (number - 1) / max(self.rounds - 1, 1))


class Incumbents:
    """The best image of each prompt so far.

    Attributes:
        images: uint8 [H, W, 3] or [F, H, W, 3] for each prompt.
        latents: the final latent of each image.
        rewards: float64 [prompts], NaN as long as all candidates of a prompt have failed.
    """

    def __init__(self, count: int):
        self.images: list[np.ndarray | None] = [None] * count
        self.latents: list[torch.Tensor | None] = [None] * count
        self.rewards = np.full(count, np.nan)

    def consider(self, prompt: int, image: np.ndarray, latent: torch.Tensor, reward: float) -> None:
        """Take a candidate if it is better than the incumbent; of equal ones the first stays."""
        # Comparisons with NaN are false: a failed candidate never wins, and replaces nothing but
        # the empty place at the start.
        known = self.rewards[prompt]
        if (
            self.images[prompt] is None
            or reward > known
            or (np.isnan(known) and not np.isnan(reward))
        ):
            # Copied: a view would keep its whole batch in memory, gigabytes of videos.
            self.images[prompt], self.latents[prompt], self.rewards[prompt] = (
                np.array(image),
                latent,
                reward,
            )


@dataclass(frozen=True)
class Round:
    """The state of the search after a round."""

    number: int
    """0: the first candidates."""
    step: int | None
    """k; None in round 0."""
    images: list[np.ndarray]
    """The best image of each prompt so far."""
    rewards: np.ndarray
    """float64 [prompts]: the rewards of these images."""
    drawn: np.ndarray
    """int64 [prompts]: number of images made of each prompt so far."""
    forwards: int
    """Rows that went through the transformer so far."""


@torch.no_grad()
def refine(
    model: Opened,
    prompts: list[Example],
    judge: Judge,
    search: Search,
    *,
    seed: int = 0,
    num_steps: int | None = None,
    suffix: Suffix | None = None,
    first: Callable[[list[np.ndarray], np.ndarray], None] = lambda images, rewards: None,
) -> Iterator[Round]:
    """Search, and yield the state after each round; round 0 makes the first candidates.

    Candidate j of round 0 is bit for bit the image of `evaluation.draw` with seed `seed + j`.

    Args:
        model: with the weights to use.
        prompts: n of them.
        judge: decodes and scores.
        search: how candidates are made.
        seed: of all noise.
        num_steps: steps of the grid; None: as in the run's evaluations.
        suffix: which steps candidates of later rounds take after their noise; None: all of them.
        first: called with the images and rewards of candidate 0.

    Yields:
        A `Round`; fewer than `search.rounds` where all prompts reach the target.
    """
    work = _Refinement(model, prompts, judge, search, seed, num_steps, suffix)
    yield work.begin(first)
    for number in range(1, search.rounds + 1):
        if not work.open():
            return
        yield work.round(number)


class _Refinement:
    """The state of one search; `refine` calls `begin` once, then `round` for each round."""

    def __init__(self, model, prompts, judge, search, seed, num_steps, suffix):
        self.model, self.prompts, self.judge, self.search = model, prompts, judge, search
        self.seed, self.steps, self.suffix = seed, model.eval_steps(num_steps), suffix
        self.sampler = model.eval_sampler()
        sigmas = self.sampler.sigmas(self.steps)
        self.grid = Grid(sigmas, model.config.sde().coefficients(sigmas))
        self.denoise = Denoise(
            self.sampler,
            model.policy.denoiser(),
            model.embeddings.each(prompts),
            {n: n for n in range(len(prompts))},
        )
        self.best = Incumbents(len(prompts))
        self.drawn, self.forwards = np.zeros(len(prompts), dtype=np.int64), 0

    def begin(self, first: Callable) -> Round:
        """Round 0: candidates from initial noise, seed by seed. While the workers score one seed's
        images, the next seed's are sampled."""
        submitted: list[tuple] = []
        for j in range(self.search.children):
            submitted, before = list(self._sampled(self.seed + j)), submitted
            self._take(before)
            # Candidate 0 is waited for at once: it is reported before a better one replaces it.
            if j == 0:
                self._take(submitted)
                first(list(self.best.images), self.best.rewards.copy())
                submitted = []
        self._take(submitted)
        return self._round(0, None)

    def _sampled(self, seed: int) -> Iterator[tuple]:
        """One candidate of every prompt, from a seed's noise."""
        everyone = list(range(len(self.prompts)))
        for part, latents in evaluation.final_latents(
            self.model, self.prompts, everyone, num_steps=self.steps, seed=seed
        ):
            self.forwards += len(part) * self.steps
            yield part, latents, self.judge(part, latents)

    def open(self) -> list[int]:
        """Prompts that are still searched."""
        target = self.search.target
        return [
            n
            for n, reward in enumerate(self.best.rewards)
            if target is None or not reward >= target  # "not >=" is true for NaN, "<" is not
        ]

    def round(self, number: int) -> Round:
        k, noise = self.search.step(number), Noise(self.seed, FIRST_ROUND - number)
        rows = self._rows(self.open(), k)
        given = {i: self._noised(row, k, noise) for i, row in enumerate(rows) if row.parent is None}
        self._take(self._candidates(rows, given, noise))
        return self._round(number, k)

    def _rows(self, prompts: list[int], k: int) -> list[Row]:
        """The candidates of a round, those without a parent first."""
        units, count = [Unit(n, n, n, 0) for n in prompts], self.search.children
        if not self.search.branch:
            return [Row(unit, k, path=(j,)) for unit in units for j in range(count)]
        trunks = [Row(unit, k) for unit in units]
        return trunks + [
            # parent: the place of the trunk in the list, so the trunks have to come first.
            Row(unit, k, frozenset([k]), parent=n, path=(j,))
            for n, unit in enumerate(units)
            for j in range(count - 1)
        ]

    def _noised(self, row: Row, k: int, noise: Noise) -> torch.Tensor:
        """The incumbent noised to sigma_k."""
        incumbent, sigma = self.best.latents[row.unit.prompt], self.grid.sigmas[k].item()
        assert incumbent is not None  # the first round gave every prompt one
        eps = noise.sample(
            [noise.key(row.unit, AFTERWARDS, row.path)], self.sampler.latent_shape, incumbent.device
        )[0]
        return (1 - sigma) * incumbent + sigma * eps

    def _candidates(
        self, rows: list[Row], given: dict[int, torch.Tensor], noise: Noise
    ) -> list[tuple]:
        """Integrate the candidates of a round. Finished ones are submitted to the judge, in batches
        of `rollout.decode_batch`, while others are still integrated."""
        r, submitted = self.model.config.rollout, []
        waiting: list[tuple[int, torch.Tensor]] = []
        forest, before = Forest(rows, list(range(len(rows))), {}), self.forwards
        for arrived in integrate(
            forest,
            self.denoise,
            self.grid,
            noise,
            micro_batch=r.rows,
            suffix=self.suffix,
            given=given,
        ):
            self.forwards = before + arrived.stats.forwards
            if arrived.latents is not None:
                waiting += zip(arrived.rows, arrived.latents, strict=True)
            while len(waiting) >= r.decode_batch:
                submitted.append(self._submit(rows, waiting[: r.decode_batch]))
                waiting = waiting[r.decode_batch :]
        if waiting:
            submitted.append(self._submit(rows, waiting))
        return submitted

    def _submit(self, rows: list[Row], some: list[tuple[int, torch.Tensor]]) -> tuple:
        places, latents = (
            [rows[n].unit.prompt for n, _ in some],
            torch.stack([latent for _, latent in some]),
        )
        return places, latents, self.judge(places, latents)

    def _take(self, submitted: list[tuple]) -> None:
        """Wait for candidates, and let the best of them replace the incumbents."""
        for places, latents, judged in submitted:
            images, rewards = judged()
            for prompt, image, latent, reward in zip(places, images, latents, rewards, strict=True):
                self.best.consider(prompt, image, latent, float(reward))
            np.add.at(self.drawn, places, 1)  # += would count a place that occurs twice only once

    def _round(self, number: int, step: int | None) -> Round:
        return Round(
            number,
            step,
            # The candidates of round 0 gave every prompt an incumbent.
            cast(list[np.ndarray], list(self.best.images)),
            self.best.rewards.copy(),  # copies: both go on changing while the caller keeps rounds
            self.drawn.copy(),
            self.forwards,
        )
