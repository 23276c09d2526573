"""Mixtures with more than experts and shared experts: experts that return their input."""

from dataclasses import replace
from typing import Any

from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families.family import Family, Mixture
from jax_moe.porting.families.fields import Contract, activation, sizes
from jax_moe.porting.families.mixtures.layouts import FUSED, both, each_expert, router
from jax_moe.porting.families.mixtures.sigmoid import scale
from jax_moe.porting.families.settings import Settings

LONGCAT = Contract(
    (*sizes("n_routed_experts num_local_experts", "expert_ffn_hidden_size moe_intermediate_size",
            "moe_topk num_experts_per_tok"), activation(), scale(default=6.0)),
    {"router.correction_bias": True}, {"router_bias": False, "zero_expert_type": "identity"},
)


def read_longcat(settings: Settings) -> MoEConfig:
    """LongCat's contract: its zero experts, counted apart, return their input."""
    moe, same = LONGCAT.read(settings), settings.integer("zero_expert_num", 256, null=0, least=0)
    return replace(moe, num_experts=moe.num_experts + same, identity_experts=same)


def write_longcat(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    return LONGCAT.write(replace(moe, num_experts=moe.num_networks, identity_experts=0)) | {
        "zero_expert_num": moe.identity_experts
    }


CLASSIFIER = router("router.classifier.weight", "router.e_score_correction_bias")
LONGCAT_NAMES = both("hf_longcat", (*CLASSIFIER, *each_expert()), (*CLASSIFIER, *FUSED))

AROUND = (
    # transformers 5.24 writes a gate and an up of zero experts too, which nothing reads
    Family("longcat_flash", Mixture(read_longcat, write_longcat, *LONGCAT_NAMES, beside=("experts.{e}.",))),
)
