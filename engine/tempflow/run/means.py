"""Means that say how sure they are and what they are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SURE = 2  # standard errors beyond which a change is called one


@dataclass(frozen=True)
class Mean:
    """Of the values that are finite. value: None without any. stderr: standard error of the mean
    over prompts, None of fewer than two.

    scored, failed: how many values it is made of, and how many are missing.
    """

    value: float | None
    stderr: float | None
    scored: int
    failed: int


def mean_of(values: np.ndarray, asked: np.ndarray | None = None) -> Mean:
    """The mean of values, [n], NaN where one failed. asked: bool [n], those that count at all;
    None: all."""
    values = np.asarray(values) if asked is None else np.asarray(values)[asked]
    finite = values[np.isfinite(values)]
    n = len(finite)
    stderr = float(finite.std(ddof=1, dtype=np.float64)) / math.sqrt(n) if n > 1 else None
    return Mean(float(finite.mean()) if n else None, stderr, n, len(values) - n)


def gain_of(base: np.ndarray, tuned: np.ndarray) -> Mean:
    """The mean change from base to tuned, [n] each for the same prompts and noise, over the prompts
    that have both.

    The standard error is that of the paired differences: what makes one prompt harder than another
    cancels out.
    """
    return mean_of(np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64))


def unpaired_gain(base: float, tuned: float, failed: int | None) -> float | None:
    """The difference of two means, for records that hold no paired gain. None where prompts of the
    second have failed: then the two may have no prompt in common."""
    return None if failed else tuned - base


def finite(value) -> float | None:
    """A value of a record as float; None for null, text, NaN and infinity."""
    if value is None or isinstance(value, str):
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def is_sure(change: float, stderr: float) -> bool:
    """Whether a change is larger than chance explains: beyond two standard errors."""
    return abs(change) > SURE * stderr


def with_error(value: float, stderr: float | None, sign: str = "") -> str:
    """0.561 ± 0.012, or 0.561 where no standard error is known; sign "+" writes one before positive
    values."""
    return f"{value:{sign}.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")


def gain_text(change: float, stderr: float | None) -> str:
    """+0.310 ± 0.021, with a word where that is no more than chance explains."""
    doubt = stderr is not None and not is_sure(change, stderr)
    return with_error(change, stderr, "+") + (
        ", within two standard errors: no difference shown" if doubt else ""
    )
