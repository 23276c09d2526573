"""Hugging Face families, one file each: a reader of config.json and rows of names."""

from dataclasses import replace

from jax_moe.config.decoder import DecoderConfig
from jax_moe.porting.families import granitemoe, qwen2_moe
from jax_moe.porting.families.family import Family
from jax_moe.porting.families.granitemoe import GRANITEMOE
from jax_moe.porting.families.hf import mixtral
from jax_moe.porting.families.hf.mixtral import MIXTRAL
from jax_moe.porting.families.olmoe import OLMOE
from jax_moe.porting.families.qwen2_moe import QWEN2_MOE
from jax_moe.porting.families.qwen3_moe import QWEN3_MOE
from jax_moe.porting.table.rows import Table

FAMILIES: dict[str, Family] = {one.model_type: one for one in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GRANITEMOE)}


def family_named(model_type: object) -> Family:
    """The family. Raises ValueError for one that is not here."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r}: must be one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def layer_tables() -> tuple[Table, ...]:
    """One mixture by itself, as the blocks of transformers 5 name it in memory and the files of the families on disk.

    Mixtral's, Qwen3-MoE's and OLMoE's blocks have the same names in memory.
    """
    rows = {
        "hf_fused": mixtral.FUSED, "hf_fused_shared": (*qwen2_moe.FUSED, *qwen2_moe.SHARED),
        "hf_experts": qwen2_moe.PER_EXPERT, "hf_experts_shared": (*qwen2_moe.PER_EXPERT, *qwen2_moe.SHARED),
        "hf_granitemoe_in_memory": granitemoe.IN_MEMORY, "hf_granitemoe": granitemoe.ON_DISK,
    }
    return tuple(Table(name, each) for name, each in rows.items())


def decoder_tables(config: DecoderConfig, model_type: str | None) -> tuple[Table, ...]:
    """The family's tables (all families' for None) with this decoder's layer numbers."""
    families = FAMILIES.values() if model_type is None else [family_named(model_type)]
    numbers = {"s": config.moe_layers, "d": config.dense_layers}
    return tuple(replace(table, numbers=numbers) for family in families for table in family.tables)
