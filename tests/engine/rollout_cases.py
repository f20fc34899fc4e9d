"""A finished integration of a plan's rows, on a toy velocity or a real one."""

from types import SimpleNamespace

import torch

from tempflow.sampling.denoise import Denoise
from tempflow.sampling.layout import Layout
from tempflow.sampling.noise import Noise
from tempflow.sampling.scheduler import Stats, integrate
from tempflow.sampling.steps import Grid

GRID = torch.linspace(1, 0, 11)
SHAPE = (5, 3)


def toy_velocity(x, sigma, units):
    """Depends on the latent, the step and the prompt, by sums and products only, so that batches
    cannot differ by a bit."""
    place = torch.tensor([0.1 * unit.prompt_id for unit in units])
    return place.reshape(-1, 1, 1) * x.clamp(-1, 1) + sigma.reshape(-1, 1, 1) * x


def layout_of(plan, units, iteration=0, endpoints=False):
    """The layout of some units, whatever their index."""
    return Layout(units, [plan.rows(unit, iteration) for unit in units], endpoints)


class Units(Denoise):
    """A velocity(x, sigma, units) in the place of a model: the conditioning of a unit is its
    index."""

    def __init__(self, velocity, units, shape, coarse=None):
        by_index = {unit.index: unit for unit in units}

        def at(transformer, x, sigma, conditioning):
            return transformer(x, sigma, [by_index[i] for i in conditioning["place"].tolist()])

        policy = SimpleNamespace(
            device=torch.device("cpu"),
            expert=lambda sigma: 0,
            only=lambda transformer, expert: transformer,
        )
        sampler = SimpleNamespace(latent_shape=shape, policy=policy, velocity=at)
        super().__init__(sampler, velocity, {}, {}, coarse)

    def within(self, unit):
        return unit.index

    def conditions(self, shape, within):
        return {"place": within}

    def shape(self, unit):
        return None


class Rollout:
    """A finished integration. finished: final latents by (unit index, step where the row branched
    off or None, child); states: by (unit index, step)."""

    def __init__(
        self,
        config,
        units,
        *,
        velocity=toy_velocity,
        sigmas=GRID,
        shape=SHAPE,
        micro_batch=7,
        iteration=0,
        coarse=None,
        **more,
    ):
        self.layout = layout_of(config.plan(), units, iteration)
        self.forest = self.layout.forest(list(range(len(units))))
        self.finished, self.states, self.stats, self.told = {}, {}, Stats(), 0
        grid = Grid(sigmas, config.sde().coefficients(sigmas))
        more = {"suffix": config.rollout.suffix} | more
        for arrived in integrate(
            self.forest,
            Units(velocity, units, shape, coarse),
            grid,
            Noise(config.training.seed, iteration),
            micro_batch=micro_batch,
            **more,
        ):
            self._keep(arrived)
            self.told += arrived.forwards
            self.stats = arrived.stats
            self.states |= {(s.unit.index, s.step): s for s in arrived.states}

    def _keep(self, arrived):
        for n, latent in zip(arrived.rows, arrived.latents if arrived.rows else [], strict=True):
            row = self.forest.rows[n]
            place = (
                row.unit.index,
                row.start if row.parent is not None else None,
                row.path[0] if row.path else 0,
            )
            assert place not in self.finished, "a row finished twice"
            self.finished[place] = latent
