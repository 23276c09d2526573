"""Switch Transformers' sparse layer (Hugging Face's SwitchTransformersSparseMLP): wi goes up, wo down, no gate."""

from dataclasses import replace
from typing import Any

from jax_moe import presets
from jax_moe.config.moe import MoEConfig
from jax_moe.moe import MoE
from jax_moe.porting.families.choices import StateDict, size_in
from jax_moe.porting.families.family import Family
from jax_moe.porting.table.plan import Shapes
from jax_moe.porting.table.rows import Row, Table, linear

SLOTS = 64  # of an expert in a sequence: transformers' own

ROWS = (
    *linear("router.classifier", "router.", "D E"),
    Row("experts.expert_{e}.wi.weight", "F D", "experts.up", "e D F"),
    Row("experts.expert_{e}.wo.weight", "D F", "experts.down", "e F D"),
)


def read(shapes: Shapes, chosen: dict[str, Any]) -> MoEConfig:
    """The contract as transformers has it: a constant capacity, and the balance loss of each sequence."""
    if "expert_capacity" not in chosen and "capacity_factor" not in chosen:
        chosen["expert_capacity"] = SLOTS
    elif len(chosen) > 1:
        raise ValueError("capacity_factor, expert_capacity: must be one of the two")
    router, up = r"router\.classifier\.weight", r"experts\.expert_\d+\.wi\.weight"
    D, F, E = size_in(shapes, router, 1), size_in(shapes, up, 0), size_in(shapes, router, 0)
    config = presets.switch(D, F, E, balance_per_sequence=True, **chosen)
    return replace(config, router=replace(config.router, bias="router.classifier.bias" in shapes))


SWITCH = Family("switch", state=StateDict(
    MoE, MoEConfig, Table("switch", ROWS), r"router\.classifier\.weight", read, ("expert_capacity", "capacity_factor"),
))
