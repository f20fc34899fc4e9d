"""Objectives: what an update minimizes, given states and the advantages of their children."""

from tempflow.objectives.base import Batch, Objective, Old, Rollout

__all__ = ["Batch", "Objective", "Old", "Rollout"]
