"""Mixtures whose router is not one linear map: a network that hands on a state (ZAYA1), product keys (Doge)."""

from dataclasses import replace
from typing import Any

from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families.family import Family, Mixture, gated_ffn
from jax_moe.porting.families.fields import Contract, Field, activation, sizes
from jax_moe.porting.families.mixtures.layouts import FUSED, both
from jax_moe.porting.families.mixtures.softmax import IN_INPUTS_DTYPE, family
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.table.rows import Row, linear

ZAYA = Contract(
    (*sizes("num_experts", "moe_intermediate_size"), activation(),
     Field("router_hidden_size", "router.network_dim", 256), Field("rms_norm_eps", "router.network_norm_eps", 1e-5)),
    {**IN_INPUTS_DTYPE, "router.correction_bias": True},
    {"num_experts_per_tok": 1},
)
LATER = "takes_router_state"  # of a layer; no setting in config.json: all layers but the first


def each_zaya_layer(values: dict[str, Any]) -> dict[str, Any]:
    """With the layers whose routers read the state of the layer before: all but the first."""
    count = values.get("num_hidden_layers")
    return {**values, LATER: [i > 0 for i in range(count)]} if isinstance(count, int) else values


def read_zaya(settings: Settings) -> MoEConfig:
    """ZAYA1's contract: beside its experts one that answers nothing."""
    moe = ZAYA.but(router__takes_state=bool(settings.values.get(LATER, True))).read(settings)
    return replace(moe, num_experts=moe.num_experts + 1, identity_experts=1, identity_answer="nothing")


def write_zaya(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    return ZAYA.write(replace(moe, num_experts=moe.num_networks, identity_experts=0, identity_answer="input"))


ZAYA_ROUTER = (
    *linear("gate.down_proj", "router.network.", "D I", "down", "down_bias"),
    *linear("gate.router_mlp.fc1", "router.network.", "I O", "first", "first_bias"),
    *linear("gate.router_mlp.fc2", "router.network.", "O I", "second", "second_bias"),
    Row("gate.router_mlp.out_proj.weight", "E I", "router.network.out", "I E"),
    Row("gate.router_mlp.norm.weight", "I", "router.network.norm", "I"),
    Row("gate.router_states_scale", "I", "router.network.state_scale", "I"),
    Row("gate.balancing_biases", "E", "router.correction_bias", "E"),
)
ZAYA_ROWS = (*ZAYA_ROUTER, *FUSED)

# An expert has one hidden unit: a row of each of two embeddings
DOGE = Contract(
    (Field("hidden_size", "model_dim"), Field("num_experts", "num_experts"), Field("num_experts_per_tok", "top_k"),
     activation(), Field("intermediate_size", "expert.shared_dim"),
     Field("norm_topk_prob", "router.renormalise", False, {True: "sum", False: "none"})),
    {**IN_INPUTS_DTYPE, "expert_dim": 1, "router.order": "select_then_softmax", "router.product_keys": "flat",
     "expert.gated": False, "expert.shared_gated": True, "balance.pooled": "over_layers"},
    {"mlp_bias": False},
)
DOGE_ROWS = (
    Row("router_gate.weight", "O D", "router.keys", "D O"),
    Row("down_embed.weight", "E (D F)", "experts.up", "E D F"),
    Row("up_embed.weight", "E (F D)", "experts.down", "E F D"),
    *gated_ffn("", "shared."),
)

ROUTERS = (
    Family("zaya", Mixture(
        read_zaya, write_zaya, *both("hf_zaya", ZAYA_ROWS, ZAYA_ROWS), by_layer=(LATER,), each_layer=each_zaya_layer,
    )),
    family("doge", DOGE, both("hf_doge", DOGE_ROWS, DOGE_ROWS)),
)
