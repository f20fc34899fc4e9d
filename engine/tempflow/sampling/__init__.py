"""Rollouts: plans of rows, the scheduler that integrates them, and the numbers of the SDE step."""
