"""Advantages: from the rewards of all ranks to what each child of a state is worth against its
group."""

from tempflow.advantages.base import Advantage, rank_correlation

__all__ = ["Advantage", "rank_correlation"]
