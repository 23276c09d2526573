"""Switch Transformers' sparse layer (Hugging Face's SwitchTransformersSparseMLP): wi goes up, wo down, no gate."""

from dataclasses import replace
from typing import Any

from jax_moe import presets
from jax_moe.config.moe import MoEConfig
from jax_moe.moe import MoE
from jax_moe.porting.families.choices import StateDict, size_in
from jax_moe.porting.families.family import Family, Mixture, Names, Stack
from jax_moe.porting.families.settings import ACTIVATIONS, Settings
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


def read_mixture(settings: Settings) -> MoEConfig:
    """The same from config.json."""
    settings.must_be("router_dtype", "float32", "the router computes in fp32")
    D, F, E = (settings.size(name) for name in ("d_model", "d_ff", "num_experts"))
    config = presets.switch(
        D, F, E, expert_capacity=settings.integer("expert_capacity", SLOTS, least=1),
        jitter_eps=settings.number("router_jitter_noise", 0.01), balance_per_sequence=True,
    )
    act = ACTIVATIONS[settings.choice("dense_act_fn", "relu", ACTIVATIONS)]
    return replace(
        config, router=replace(config.router, bias=settings.flag("router_bias", False)),
        expert=replace(config.expert, activation=act),
    )


def write_mixture(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    words = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "d_model": moe.model_dim, "d_ff": moe.expert_dim, "num_experts": moe.num_experts,
        "expert_capacity": None if moe.capacity is None else moe.capacity.slots,
        "router_jitter_noise": moe.router.jitter_eps, "router_bias": moe.router.bias,
        "dense_act_fn": words[moe.expert.activation],
    }


NAMES = Names(ROWS, "switch", within="encoder.block.{l}.layer.1.mlp.")
STACKS = (
    Stack("encoder", ("num_layers",), NAMES.within),
    Stack("decoder", ("num_decoder_layers", "num_layers"), "decoder.block.{l}.layer.2.mlp."),
)
SWITCH_TRANSFORMERS = Family("switch_transformers", Mixture(read_mixture, write_mixture, NAMES, NAMES, stacks=STACKS))
SWITCH = Family("switch", state=StateDict(
    MoE, MoEConfig, Table("switch", ROWS), r"router\.classifier\.weight", read, ("expert_capacity", "capacity_factor"),
))
