"""Means of rewards with their standard errors and counts.

A change is called one only beyond two standard errors; console, report and summary use the same
rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SURE = 2  # standard errors; chance alone goes beyond them in about one of twenty comparisons


@dataclass(frozen=True)
class Mean:
    """The mean of the finite values among some."""

    value: float | None
    """None without a finite value."""
    stderr: float | None
    """Standard error of the mean over prompts; None for fewer than two values."""
    scored: int
    """Number of finite values."""
    failed: int
    """Number of the others."""


def mean_of(values: np.ndarray, asked: np.ndarray | None = None) -> Mean:
    """The mean of the finite values.

    Args:
        values: [n], NaN where a reward failed.
        asked: bool [n], the values that count at all, as scored or failed; None: all.
    """
    values = np.asarray(values) if asked is None else np.asarray(values)[asked]
    finite = values[np.isfinite(values)]
    n = len(finite)
    # ddof=1: the sample's own mean is used. float64: a variance of float32 loses its digits where
    # the rewards are large and close together.
    stderr = float(finite.std(ddof=1, dtype=np.float64)) / math.sqrt(n) if n > 1 else None
    return Mean(float(finite.mean()) if n else None, stderr, n, len(values) - n)


def gain_of(base: np.ndarray, tuned: np.ndarray) -> Mean:
    """The mean change from base to tuned, over the prompts that have both rewards.

    Args:
        base: rewards [n] before training, NaN where one failed.
        tuned: rewards [n] of the same prompts and noise.

    Returns:
        The mean with the standard error of the paired differences. It is smaller than the errors of
        the two means suggest, since the difficulty of a prompt cancels out.
    """
    # NaN on either side makes the difference NaN, which `mean_of` leaves out.
    return mean_of(np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64))


def unpaired_gain(base: float, tuned: float, failed: int | None) -> float | None:
    """The difference of two means, for records of earlier versions, which hold no paired gain.

    None where prompts of the second mean failed: the two means may then have no prompt in common.
    """
    return None if failed else tuned - base


def finite(value) -> float | None:
    """A value of a record as float; None for null, text, NaN and infinity."""
    if value is None or isinstance(value, str):
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def is_sure(change: float, stderr: float) -> bool:
    """Whether a change is beyond two standard errors, more than chance easily explains."""
    return abs(change) > SURE * stderr


def with_error(value: float, stderr: float | None, sign: str = "") -> str:
    """Text such as "0.561 ± 0.012", or "0.561" without a standard error. sign: "+" to write a plus
    before positive values."""
    return f"{value:{sign}.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")


def gain_text(change: float, stderr: float | None) -> str:
    """Text such as "+0.310 ± 0.021", with a remark where the change is within two standard
    errors."""
    doubt = stderr is not None and not is_sure(change, stderr)
    return with_error(change, stderr, "+") + (
        ", within two standard errors: no difference shown" if doubt else ""
    )
