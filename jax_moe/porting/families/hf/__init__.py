"""Hugging Face families, one file each: a reader of config.json and rows of names."""

from dataclasses import replace

from jax_moe.decoder_config import DecoderConfig
from jax_moe.porting.families.hf.family import Family
from jax_moe.porting.families.hf.granitemoe import GRANITEMOE
from jax_moe.porting.families.hf.mixtral import MIXTRAL
from jax_moe.porting.families.hf.olmoe import OLMOE
from jax_moe.porting.families.hf.qwen2_moe import QWEN2_MOE
from jax_moe.porting.families.hf.qwen3_moe import QWEN3_MOE
from jax_moe.porting.table import Table

FAMILIES: dict[str, Family] = {one.model_type: one for one in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GRANITEMOE)}


def family_named(model_type: object) -> Family:
    """The family. Raises ValueError for one that is not here."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r}: must be one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def decoder_tables(config: DecoderConfig, model_type: str | None) -> tuple[Table, ...]:
    """The family's tables (all families' for None) with this decoder's layer numbers."""
    families = FAMILIES.values() if model_type is None else [family_named(model_type)]
    numbers = {"s": config.moe_layers, "d": config.dense_layers}
    return tuple(replace(table, numbers=numbers) for family in families for table in family.tables)
