"""One file of rows a family; here, which tables a module has, the first being the one written by default."""

from flax import nnx

from jax_moe.attention.multihead import Attention
from jax_moe.models.block import Block
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE
from jax_moe.moe import MoE
from jax_moe.porting.families import attention, block, makemoe, mixtral, soft_moe, switch
from jax_moe.porting.families import torch_ref as moe
from jax_moe.porting.families.hf import decoder_tables, layer_tables
from jax_moe.porting.table.rows import Table
from jax_moe.soft_moe import SoftMoE

TABLES: dict[type[nnx.Module], tuple[Table, ...]] = {
    MoE: (moe.TORCH_REF, mixtral.SPARSE_BLOCK, makemoe.SPARSE_MOE, switch.SPARSE_MLP, *layer_tables()),
    SoftMoE: (soft_moe.SOFT_MOE,),
    Attention: (attention.TORCH_REF,),
    Block: (block.TORCH_REF, block.TORCH_REF_SOFT),
    MakeMoE: (makemoe.LANGUAGE_MODEL,),
}


def tables_of(module: nnx.Module) -> tuple[Table, ...]:
    """The module's tables. Raises ValueError for a module that has none."""
    if isinstance(module, Decoder):
        return decoder_tables(module.config, None if module.origin is None else module.origin.model_type)
    for kind in type(module).__mro__:
        if kind in TABLES:
            return TABLES[kind]
    known = ", ".join([*(kind.__name__ for kind in TABLES), Decoder.__name__])
    raise ValueError(f"{type(module).__name__} has no porting table: must be one of {known}")
