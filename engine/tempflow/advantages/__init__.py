"""Advantages: from the rewards of all ranks to what each child of a state is worth against its group."""

from tempflow.advantages.dense import Advantages, advantages, decoupled_advantages, rank_correlation

__all__ = ["Advantages", "advantages", "decoupled_advantages", "rank_correlation"]
