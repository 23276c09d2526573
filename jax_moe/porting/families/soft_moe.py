"""Soft MoE: `phi` [D, E, slots], `scale` [], and one MLP an expert (`fcs`, `layer_norms`, `last_fc`, `last_ln`)."""

from typing import Any

from jax_moe.config.moe import SoftMoEConfig
from jax_moe.porting.families.choices import StateDict, count_in, size_in
from jax_moe.porting.families.family import Family
from jax_moe.porting.table.plan import Shapes
from jax_moe.porting.table.rows import Row, Table, layer_norm, linear, stacked
from jax_moe.soft_moe import SoftMoE

_EXPERT = (
    *linear("fcs.{i}", "fcs.{i}.", "I O"),
    *layer_norm("layer_norms.{i}", "layer_norms.{i}", "O"),
    *linear("last_fc", "last_fc.", "I O"),
    *layer_norm("last_ln", "last_ln", "O"),
)
ROWS = (
    Row("phi", "D E C", "phi", "D E C"), Row("scale", "", "scale", ""),
    *stacked(_EXPERT, "experts.{e}.", "experts.", "e"),
)


def read(shapes: Shapes, chosen: dict[str, Any]) -> SoftMoEConfig:
    """The contract."""
    D, E, C = (size_in(shapes, "phi", axis) for axis in range(3))
    depth = count_in(shapes, r"experts\.\d+\.fcs\.(\d+)\..*", least=0)
    return SoftMoEConfig(
        model_dim=D, num_experts=E, num_slots=C,
        hidden_dims=tuple(size_in(shapes, rf"experts\.\d+\.fcs\.{i}\.weight", 0) for i in range(depth)),
        layer_norm=depth == 0 or any(".layer_norms." in name for name in shapes),
        output_layer_norm=any(".last_ln." in name for name in shapes),
        normalise="scale" in shapes,
        **chosen,
    )


SOFT_MOE = Family("soft_moe", state=StateDict(
    SoftMoE, SoftMoEConfig, Table("soft_moe", ROWS), "phi", read,
    ("hidden_activation", "output_activation", "residual"),
))
