"""Advantages: how much better each child of a state is than its group, from the rewards of all
ranks."""

from tempflow.advantages.base import Advantage, rank_correlation

__all__ = ["Advantage", "rank_correlation"]
