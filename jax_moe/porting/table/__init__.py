"""The mapping language: rows, the plan that they give for a model, and arrays converted by the plan."""

from jax_moe.porting.table import arrays, plan, rows

__all__ = ["arrays", "plan", "rows"]
