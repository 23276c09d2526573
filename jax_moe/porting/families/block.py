"""`torch_ref.Block`: norm, attention, norm, and a sparse or soft mixture."""

from jax_moe.porting.families import attention, soft_moe
from jax_moe.porting.families import torch_ref as moe
from jax_moe.porting.table.rows import Table, layer_norm, under

_OUTER = (
    *layer_norm("attention_norm", "attention_norm"),
    *under(attention.ROWS, "attention.", "attention."),
    *layer_norm("moe_norm", "moe_norm"),
)
TORCH_REF = Table("torch_ref", (*_OUTER, *under(moe.ROWS, "moe.", "moe.")))
TORCH_REF_SOFT = Table("torch_ref_soft", (*_OUTER, *under(soft_moe.ROWS, "moe.", "moe.")))
