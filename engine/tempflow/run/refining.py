"""Refinement guided by a reward, without training: images are noised to a middle step, drawn again,
and the best is kept.

After reward-guided iterative refinement (arXiv 2502.14944), with the scheduler that training rolls
out with: in each round an incumbent x_0 becomes x_k = (1 - sigma_k) x_0 + sigma_k eps, from which
candidates go on to sigma 0. Zero rounds are best of n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator

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

# the noise of round r is that of iteration FIRST_ROUND - r, which no training has
FIRST_ROUND = evaluation.EVAL_ITERATION - 1

Judge = Callable[[list[int], torch.Tensor], Callable[[], tuple[np.ndarray, np.ndarray]]]
"""From places of prompts [n] and final latents [n, ...] to a call that waits for images [n, ...]
and rewards [n], NaN where one failed."""


@dataclass(frozen=True)
class Search:
    """How candidates are made."""

    rounds: int
    """0: only the first candidates, from initial noise."""
    children: int
    """Candidates of a prompt in each round, and at the beginning."""
    steps: tuple[int, int] = (0, 0)
    """k in the first round and in the last; those between lie evenly."""
    branch: bool = True
    """True: one noise for all candidates of a round, of which the first follows the ODE and the
    others leave it by one step of the SDE, as in training. False: each has a noise of its own and
    follows the ODE."""
    target: float | None = None
    """A prompt whose reward has reached it is left alone."""

    def step(self, number: int) -> int:
        """k of round `number`, from 1 on."""
        first, last = self.steps
        return round(first + (last - first) * (number - 1) / max(self.rounds - 1, 1))


class Incumbents:
    """The best of every prompt so far.

    rewards: float64 [prompts], NaN while every candidate has failed.
    """

    def __init__(self, count: int):
        self.images: list[np.ndarray | None] = [None] * count
        self.latents: list[torch.Tensor | None] = [None] * count
        self.rewards = np.full(count, np.nan)

    def consider(self, prompt: int, image: np.ndarray, latent: torch.Tensor, reward: float) -> None:
        """Take a candidate that is better than the incumbent; of equals the earlier stays."""
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
    """Where the search stands after a round."""

    number: int
    """0: the first candidates."""
    step: int | None
    """k; None in round 0."""
    images: list[np.ndarray]
    """The best of each prompt."""
    rewards: np.ndarray
    """float64 [prompts]: of these."""
    drawn: np.ndarray
    """int [prompts]: images of each prompt so far."""
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
    """Yield where the search stands after each round, the first candidates being round 0.

    Candidate j of round 0 is what `evaluation.draw` makes with seed `seed + j`, bit for bit.

    Args:
        model: with the weights to be used.
        prompts: n of them.
        judge: decodes and scores.
        search: how candidates are made.
        seed: of all noise.
        num_steps: of the grid; None: as in the run's evaluations.
        suffix: how candidates of later rounds go on after their noise; None is exact.
        first: is told of the images and rewards of candidate 0.
    """
    work = _Refinement(model, prompts, judge, search, seed, num_steps, suffix)
    yield work.begin(first)
    for number in range(1, search.rounds + 1):
        if not work.open():
            return
        yield work.round(number)


class _Refinement:
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
        """Round 0: candidates from initial noise, seed by seed; one seed is drawn while another is
        scored."""
        submitted: list[tuple] = []
        for j in range(self.search.children):
            submitted, before = list(self._sampled(self.seed + j)), submitted
            self._take(before)
            if j == 0:
                self._take(submitted)
                first(list(self.best.images), self.best.rewards.copy())
                submitted = []
        self._take(submitted)
        return self._round(0, None)

    def _sampled(self, seed: int) -> Iterator[tuple]:
        """Every prompt once from a seed's noise."""
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
            if target is None or not reward >= target
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
            Row(unit, k, frozenset([k]), parent=n, path=(j,))
            for n, unit in enumerate(units)
            for j in range(count - 1)
        ]

    def _noised(self, row: Row, k: int, noise: Noise) -> torch.Tensor:
        """The incumbent at sigma_k."""
        incumbent, sigma = self.best.latents[row.unit.prompt], self.grid.sigmas[k].item()
        assert incumbent is not None  # the first round gave every prompt one
        eps = noise.sample(
            [noise.key(row.unit, AFTERWARDS, row.path)], self.sampler.latent_shape, incumbent.device
        )[0]
        return (1 - sigma) * incumbent + sigma * eps

    def _candidates(
        self, rows: list[Row], given: dict[int, torch.Tensor], noise: Noise
    ) -> list[tuple]:
        """The finished candidates, submitted to the judge in batches of `rollout.decode_batch`
        while others go on."""
        r, waiting, submitted = self.model.config.rollout, [], []
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
            waiting += list(zip(arrived.rows, arrived.latents if arrived.rows else [], strict=True))  # type: ignore[arg-type]  # the first round has given every prompt an incumbent
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
            np.add.at(self.drawn, places, 1)

    def _round(self, number: int, step: int | None) -> Round:
        return Round(
            number,
            step,
            list(self.best.images),  # type: ignore[arg-type]  # the first round has given every prompt an incumbent
            self.best.rewards.copy(),
            self.drawn.copy(),
            self.forwards,
        )
