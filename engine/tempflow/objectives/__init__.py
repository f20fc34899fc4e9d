"""Objectives: what an update minimizes, given states and the advantages of their children."""

from tempflow.objectives.base import Batch, GroupObjective, Objective, Old, Rollout, Seen

__all__ = ["Batch", "GroupObjective", "Objective", "Old", "Rollout", "Seen"]
