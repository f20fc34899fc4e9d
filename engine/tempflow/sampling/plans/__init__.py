"""Plans: which latents an iteration integrates, where each starts, and at which steps it takes noise."""

from tempflow.sampling.plans.rows import Row, RowPlan, Unit, build_plan, iteration_units, split_plan

__all__ = ["Row", "RowPlan", "Unit", "build_plan", "iteration_units", "split_plan"]
