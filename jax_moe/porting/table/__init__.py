"""The mapping language: rows, the plan they make for a model, and the arrays that move by it."""

from jax_moe.porting.table import arrays, plan, rows

__all__ = ["arrays", "plan", "rows"]
