"""makeMoE (AviSoori1x/makeMoE): its SparseMoE layer, and the whole language model."""

from typing import Any

import numpy as np

from jax_moe import presets
from jax_moe.config.models import MakeMoEConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.guarded import require_memory
from jax_moe.models.makemoe import MakeMoE
from jax_moe.moe import MoE
from jax_moe.porting.families.choices import StateDict, count_in, size_in
from jax_moe.porting.families.family import Family
from jax_moe.porting.families.torch_ref import ATTENTION
from jax_moe.porting.table.plan import Shapes
from jax_moe.porting.table.rows import Constant, Row, Table, embedding, layer_norm, linear, stacked, under

ASKED = ("top_k", "capacity_factor", "dropout")


def lower_triangular(rows: int, columns: int) -> np.ndarray:
    """the lower triangular mask of ones"""
    require_memory(12 * rows * columns, f"a mask of {rows:,} by {columns:,}")
    return np.tril(np.ones((rows, columns), np.float32))


SPARSE_MOE_ROWS = (
    *linear("router.topkroute_linear", "router.", "D E"),
    *linear("router.noise_linear", "router.", "D E", "noise_kernel", "noise_bias"),
    Row("experts.{e}.net.0.weight", "F D", "experts.up", "e D F"),
    Row("experts.{e}.net.0.bias", "F", "experts.up_bias", "e F"),
    Row("experts.{e}.net.2.weight", "D F", "experts.down", "e F D"),
    Row("experts.{e}.net.2.bias", "D", "experts.down_bias", "e D"),
)
_BLOCK = (
    *under(ATTENTION, "sa.", "attention."),
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
        *linear("lm_head", "head.", "D V"),
    ),
    constants=(Constant("blocks.{l}.sa.heads.{h}.tril", "U U", lower_triangular),),
)


def read(shapes: Shapes, chosen: dict[str, Any]) -> MakeMoEConfig:
    """The contract of the language model."""
    D = size_in(shapes, r"token_embedding_table\.weight|lm_head\.weight", 1)
    return MakeMoEConfig(
        vocab_size=size_in(shapes, r"token_embedding_table\.weight|lm_head\.weight", 0),
        block_size=size_in(shapes, r"position_embedding_table\.weight|blocks\.\d+\.sa\.heads\.\d+\.tril", 0),
        model_dim=D,
        num_heads=max(1, D // size_in(shapes, r"blocks\.\d+\.sa\.heads\.\d+\.(key|query|value)\.weight", 0)),
        num_layers=count_in(shapes, r"blocks\.(\d+)\..*"),
        num_experts=size_in(shapes, r"blocks\.\d+\.smoe\.router\.topkroute_linear\.weight", 0),
        noise=any(".noise_linear." in name for name in shapes),
        **chosen,
    )


def read_layer(shapes: Shapes, chosen: dict[str, Any]) -> MoEConfig:
    """The contract of one layer."""
    router = r"router\.topkroute_linear\.weight"
    return presets.makemoe(
        size_in(shapes, router, 1), size_in(shapes, r"experts\.\d+\.net\.0\.weight", 0), size_in(shapes, router, 0),
        noise=any(".noise_linear." in name for name in shapes), **chosen,
    )


MAKEMOE = Family("makemoe", state=StateDict(
    MakeMoE, MakeMoEConfig, LANGUAGE_MODEL, r"(token_embedding_table\.weight|blocks\.\d+\.smoe\..*)", read, ASKED,
    "characters",
))
MAKEMOE_LAYER = Family("makemoe_layer", state=StateDict(
    MoE, MoEConfig, Table("makemoe", SPARSE_MOE_ROWS), r"router\.topkroute_linear\.weight", read_layer, ASKED,
))
