"""The protocol of advantages."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from tempflow.advantages.dense import Advantages


class Advantage(ABC):
    """From rewards to advantages."""

    over: str
    """Whose rewards are normalised together: "seed", the children of one state, or "prompt", all of a prompt at a step."""

    @abstractmethod
    def __call__(self, rewards: np.ndarray, parts: dict[str, np.ndarray], weights: dict[str, float], fitting: np.ndarray) -> Advantages:
        """The advantages of an iteration.

        Args:
            rewards: [P, S, K, B], the weighted sum; NaN where scoring failed.
            parts: each reward alone, unweighted, in the same shape.
            weights: theirs.
            fitting: bool [P, R], which rewards of `parts` each prompt has.
        """
