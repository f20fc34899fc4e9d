"""FPO (arXiv 2507.21053): the clipped policy gradient on finished latents of any sampler, with a
likelihood that is a function of the matching error."""

from __future__ import annotations

from typing import Any

from tempflow.errors import check_range
from tempflow.objectives.base import Objective, kernel_loss
from tempflow.objectives.matching import Form, Pick, noised, picked


class Fpo(Objective):
    """The clipped loss of PPO on finished latents, whose ratio is exp(kappa (error of the old
    velocity - error of the new)) (FPO).

    A latent x0 is noised to x = (1 - s) x0 + s eps, and the error is mean |v - (eps - x0)|^2. Each
    draw of (s, eps) has its own ratio (FPO++, arXiv 2602.02481).

    Args:
        clip: the ratio is clipped to 1 +- this.
        draws: noise levels per latent; the sampling grid is cut into this many equal parts, and one
            level is drawn from each.
        form: "v", the error of the velocity; or "eps", the error of the predicted noise, which is
            (1 - s)^2 times the former.
        kappa: factor of the error in the log-likelihood.
        pick: "all" latents; or "extremes", only the best and the worst of each group, which takes
            fewer forwards.
    """

    wants = "endpoints"

    def __init__(
        self,
        clip: float = 0.05,
        draws: int = 4,
        form: Form = "v",
        kappa: float = 1.0,
        pick: Pick = "all",
    ):
        check_range("clip", clip, above=0, below=1)
        check_range("draws", draws, least=1, most=64)
        check_range("kappa", kappa, above=0)
        self.clip_low = self.clip_high = clip
        self.draws, self.form, self.kappa, self.pick = draws, form, kappa, pick

    def states(self, rollout, advantages):
        return noised(
            rollout, picked(rollout, advantages, self.pick), self.draws, self.form, self.kappa
        )

    def filler(self, rollout):
        return noised(rollout, rollout.endpoints[:1], 1, self.form, self.kappa)[0]

    def loss(self, velocity, batch, old, penalty, velocity_ref):
        # `noised` writes the likelihood as that of a step, so the kernel of GRPO's loss serves.
        clip: dict[str, Any] = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        return kernel_loss(velocity, batch, batch.advantage, old, penalty, velocity_ref, **clip)
