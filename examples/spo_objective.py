"""An objective of your own: instead of a clip, a pull that falls as the ratio leaves 1 (SPO, arXiv 2401.16025)."""

import torch

from tempflow.errors import check_range
from tempflow.objectives import Objective


class Spo(Objective):
    """L = -(A ratio - |A| (ratio - 1)^2 / (2 epsilon)).

    Args:
        epsilon: how far from 1 the ratio's pull has fallen to nothing.
    """

    def __init__(self, epsilon: float = 1e-3):
        check_range("epsilon", epsilon, above=0)
        self.epsilon = epsilon

    def pull(self, advantage, log_ratio, distance):
        ratio = torch.exp(log_ratio)
        return ratio * (advantage - advantage.abs() * (ratio - 1) / self.epsilon)  # -dL/d(log ratio)
