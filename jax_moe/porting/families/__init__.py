"""Every family, each one record in one file; what a name, a state dict or a module is by them."""

import re
from collections.abc import Iterable

from flax import nnx

from jax_moe.config.checks import shorten
from jax_moe.models.decoder import Decoder
from jax_moe.moe import MoE
from jax_moe.porting.families.family import Family
from jax_moe.porting.families.granitemoe import GRANITEMOE
from jax_moe.porting.families.makemoe import MAKEMOE, MAKEMOE_LAYER
from jax_moe.porting.families.mixtral import MIXTRAL
from jax_moe.porting.families.mixtures.around import AROUND
from jax_moe.porting.families.mixtures.fused import FUSED_FAMILIES
from jax_moe.porting.families.mixtures.gemma import GEMMAS
from jax_moe.porting.families.mixtures.routers import ROUTERS
from jax_moe.porting.families.mixtures.sigmoid import SIGMOID
from jax_moe.porting.families.mixtures.softmax import SOFTMAX
from jax_moe.porting.families.mixtures.special import SPECIAL
from jax_moe.porting.families.olmoe import OLMOE
from jax_moe.porting.families.qwen2_moe import QWEN2_MOE
from jax_moe.porting.families.qwen3_moe import QWEN3_MOE
from jax_moe.porting.families.soft_moe import SOFT_MOE
from jax_moe.porting.families.switch import SWITCH, SWITCH_TRANSFORMERS
from jax_moe.porting.families.torch_ref import PARTS, TORCH_REF
from jax_moe.porting.table.rows import Table

# The first whose state dict is of a module is the one that any contract of the module is saved under.
FAMILIES: dict[str, Family] = {
    record.name: record for record in (
        TORCH_REF, MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GRANITEMOE, MAKEMOE, MAKEMOE_LAYER, SOFT_MOE, SWITCH,
        SWITCH_TRANSFORMERS,
        *SOFTMAX, *SIGMOID, *FUSED_FAMILIES, *SPECIAL, *AROUND, *GEMMAS, *ROUTERS,
    )
}


def decoder_names() -> list[str]:
    """The model types whose whole decoder is known."""
    return [name for name, record in FAMILIES.items() if record.decoder is not None]


def family_named(model_type: object) -> Family:
    """The family of a whole decoder. Raises ValueError for one that is not here, or is known by its mixture alone."""
    whole = decoder_names()
    for name in whole:
        mixture = FAMILIES[name].mixture
        if isinstance(model_type, str) and mixture is not None and mixture.types.get(model_type) == "":
            return FAMILIES[name]
    if not isinstance(model_type, str) or model_type not in whole:
        alone = "; of this type the mixture of a layer is known, not the whole decoder"
        hint = alone if has_mixture(model_type) else ""
        raise ValueError(f"model_type={shorten(repr(model_type))}: must be one of {', '.join(whole)}{hint}")
    return FAMILIES[model_type]


def mixture_types() -> dict[str, tuple[str, ...]]:
    """{family: the model types that have its mixture}, of every family with one."""
    known = [record for record in FAMILIES.values() if record.mixture is not None]
    return {record.name: (record.name, *record.mixture.types) for record in known}  # type: ignore[union-attr]


def has_mixture(model_type: object) -> bool:
    """Whether the mixture of that model type is known."""
    return any(model_type in types for types in mixture_types().values())


def mixture_of(model_type: object) -> Family:
    """The family whose mixture that model type has. Raises ValueError for one that is not here."""
    for name, types in mixture_types().items():
        if model_type in types:
            return FAMILIES[name]
    raise ValueError(f"model_type={shorten(repr(model_type))}: must be one of {', '.join(sorted(mixture_types()))}")


def recognise(names: Iterable[str]) -> Family | None:
    """The family that a state dict's names tell, or None."""
    names = list(names)
    for family in FAMILIES.values():
        if family.state is not None and any(re.fullmatch(family.state.sign, name) for name in names):
            return family
    return None


def families_of(module: nnx.Module) -> list[Family]:
    """Those whose state dicts are of such a module, the one that can hold every contract of it first."""
    stored = [record for record in FAMILIES.values() if record.state is not None]
    return [record for record in stored if isinstance(module, record.state.module)]  # type: ignore[union-attr]


def tables_of(module: nnx.Module) -> tuple[Table, ...]:
    """The module's tables, the first being the one written by default. Raises ValueError for a module that has none."""
    if isinstance(module, Decoder):
        types = decoder_names() if module.origin is None else [module.origin.model_type]
        decoders, config = [family_named(name) for name in types], module.config
        return tuple(table for record in decoders for table in (record.on_disk(config), record.in_memory(config)))
    stored = [record.state.table for record in families_of(module) if record.state is not None]
    found = [*PARTS.get(type(module), ()), *stored]
    if isinstance(module, MoE):
        found += layer_tables()
    if not found:
        kinds: list[type] = [record.state.module for record in FAMILIES.values() if record.state is not None]
        known = ", ".join(dict.fromkeys(kind.__name__ for kind in (*kinds, *PARTS, Decoder)))
        raise ValueError(f"{type(module).__name__} has no porting table: must be one of {known}")
    return tuple(found)


def default_table(module: nnx.Module) -> Table:
    """The names that the module is written under where nothing else is asked for."""
    return tables_of(module)[0]


def layer_tables() -> list[Table]:
    """A mixture by itself, named as in the reference's memory and as in files; equal tables appear once."""
    mixtures = [record.mixture for record in FAMILIES.values() if record.mixture is not None]
    names = [names for record in mixtures for names in (record.in_memory, record.on_disk)]
    own = {record.state.table.name for record in FAMILIES.values() if record.state is not None}
    return list({names.layer: names.table for names in names if names.layer not in own}.values())


def reference_table(module: nnx.Module) -> Table:
    """The names that the reference's module has in memory: transformers' of a decoder, torch_ref's of all else."""
    if isinstance(module, Decoder) and module.origin is not None:
        return family_named(module.origin.model_type).in_memory(module.config)
    return default_table(module)
