"""An objective of your own: it learns from the children that are better than their group and
ignores the others."""

import torch

from tempflow.errors import check_range
from tempflow.objectives import Objective


class Imitate(Objective):
    """L = -A log ratio of the children whose advantage is above a threshold.

    Args:
        threshold: advantage above which a child is imitated.
    """

    def __init__(self, threshold: float = 0.0):
        check_range("threshold", threshold, least=0)
        self.threshold = threshold

    def pull(self, advantage, log_ratio, distance):
        return torch.where(advantage > self.threshold, advantage, 0.0)  # -dL/d(log ratio)
