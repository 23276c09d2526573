"""makeMoE (AviSoori1x/makeMoE): its SparseMoE layer, and the whole language model."""

import numpy as np

from jax_moe.guarded import require_memory
from jax_moe.porting.families import attention
from jax_moe.porting.table.rows import Constant, Row, Table, embedding, layer_norm, linear, stacked, under


def lower_triangular(rows: int, columns: int) -> np.ndarray:
    """the lower triangular mask of ones"""
    require_memory(12 * rows * columns, f"a mask of {rows:,} by {columns:,}")
    return np.tril(np.ones((rows, columns), np.float32))


SPARSE_MOE_ROWS = (
    *linear("router.topkroute_linear", "router."),
    *linear("router.noise_linear", "router.", "noise_kernel", "noise_bias"),
    Row("experts.{e}.net.0.weight", "F D", "experts.up", "e D F"),
    Row("experts.{e}.net.0.bias", "F", "experts.up_bias", "e F"),
    Row("experts.{e}.net.2.weight", "D F", "experts.down", "e F D"),
    Row("experts.{e}.net.2.bias", "D", "experts.down_bias", "e D"),
)
SPARSE_MOE = Table("makemoe", SPARSE_MOE_ROWS)

_BLOCK = (
    *under(attention.ROWS, "sa.", "attention."),
    *under(SPARSE_MOE_ROWS, "smoe.", "moe."),
    *layer_norm("ln1", "attention_norm"),
    *layer_norm("ln2", "moe_norm"),
)
LANGUAGE_MODEL = Table(
    "makemoe",
    (
        embedding("token_embedding_table", "token_embedding", "V"),
        embedding("position_embedding_table", "position_embedding", "U"),
        *stacked(_BLOCK, "blocks.{l}.", "blocks.", "l"),
        *layer_norm("ln_f", "final_norm"),
        *linear("lm_head", "head."),
    ),
    constants=(Constant("blocks.{l}.sa.heads.{h}.tril", "U U", lower_triangular),),
)
