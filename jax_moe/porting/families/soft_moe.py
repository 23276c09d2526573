"""Soft MoE: `phi` [D, E, slots], `scale` [], and one MLP an expert (`fcs`, `layer_norms`, `last_fc`, `last_ln`)."""

from jax_moe.porting.table.rows import Row, Table, layer_norm, linear, stacked

_EXPERT = (
    *linear("fcs.{i}", "fcs.{i}."),
    *layer_norm("layer_norms.{i}", "layer_norms.{i}"),
    *linear("last_fc", "last_fc."),
    *layer_norm("last_ln", "last_ln"),
)
ROWS = (Row("phi", "D E C", "phi", "D E C"), Row("scale", "", "scale", ""), *stacked(_EXPERT, "experts.{e}.", "experts.", "e"))
SOFT_MOE = Table("soft_moe", ROWS)
