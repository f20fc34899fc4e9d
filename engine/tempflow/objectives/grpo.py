"""The clipped objective of GRPO."""

from __future__ import annotations

from typing import Literal

from tempflow.errors import check_range
from tempflow.objectives.base import Objective


class Grpo(Objective):
    """The clipped policy-gradient loss of GRPO, mean over the children of all states.

    Args:
        clip_low: the ratio is clipped below at 1 - this.
        clip_high: and above at 1 + this.
        ratio: "plain", or "guard" for the normalized ratio of GRPO-Guard (arXiv 2510.22319).
    """

    def __init__(self, clip_low: float = 1e-4, clip_high: float = 1e-4, ratio: Literal["plain", "guard"] = "plain"):
        check_range("clip_low", clip_low, above=0, below=1)
        check_range("clip_high", clip_high, above=0)
        self.clip_low, self.clip_high, self.ratio = clip_low, clip_high, ratio
