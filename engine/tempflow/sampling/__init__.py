"""Sampling of rollouts: plans of rows, the scheduler that integrates them, and the coefficients of
SDE steps. Rewards and training are not known here."""
