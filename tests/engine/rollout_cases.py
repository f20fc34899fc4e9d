"""A finished run of the row scheduler, on a toy velocity or a real one."""

import torch

from tempflow.sampling.plans import build_plan
from tempflow.sampling.scheduler import RowScheduler

GRID = torch.linspace(1, 0, 11)
SHAPE = (5, 3)


def toy_velocity(x, sigma, units):
    """Depends on the latent, the step and the prompt, by sums and products only, so that batches cannot differ by a bit."""
    place = torch.tensor([0.1 * unit.prompt_id for unit in units])
    return place.reshape(-1, 1, 1) * x.clamp(-1, 1) + sigma.reshape(-1, 1, 1) * x


class Rollout:
    """A finished run of the scheduler."""

    def __init__(self, config, units, *, velocity=toy_velocity, sigmas=GRID, shape=SHAPE, micro_batch=7, iteration=0, **more):
        self.plan, self.finished, self.told = build_plan(config, units, iteration), {}, 0
        r, by_index = config.rollout, {unit.index: unit for unit in units}
        scheduler = RowScheduler(
            self.plan, lambda units: {"place": torch.tensor([unit.index for unit in units])},
            lambda x, sigma, place: velocity(x, sigma, [by_index[i] for i in place.tolist()]), sigmas,
            config.sde().coefficients(sigmas), micro_batch, config.training.seed, iteration,
            self._keep, self._tell, suffix=r.suffix, **more,
        )  # fmt: skip
        self.decisions = {(d.unit.index, d.step): d for d in scheduler.roll_out(shape)}
        self.stats = scheduler.stats

    def _keep(self, indices, latents):
        assert len(indices) == len(latents)
        for index, latent in zip(indices, latents):
            row = self.plan.rows[index]
            place = row.unit.index, row.start if row.parent is not None else None, row.child
            assert place not in self.finished, "a row finished twice"
            self.finished[place] = latent

    def _tell(self, n):
        self.told += n
