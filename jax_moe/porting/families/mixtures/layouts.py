"""Rows of one mixture in the words that many families share, and the layouts made of them."""

from dataclasses import replace

from jax_moe.porting.families.family import LAYER, Names, fused_experts, gated_ffn
from jax_moe.porting.table.rows import Row, under

MLP, SPARSE, FORWARD = (f"{LAYER}{name}." for name in ("mlp", "block_sparse_moe", "feed_forward"))


def router(weight: str = "gate.weight", correction: str = "gate.e_score_correction_bias") -> tuple[Row, ...]:
    """A router's matrix, and its selection-only bias where the contract has one."""
    return Row(weight, "E D", "router.kernel", "D E"), Row(correction, "E", "router.correction_bias", "E")


def each_expert(gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Row, ...]:
    """Three matrices an expert."""
    return (
        Row(f"experts.{{e}}.{gate}.weight", "F D", "experts.gate", "e D F"),
        Row(f"experts.{{e}}.{up}.weight", "F D", "experts.up", "e D F"),
        Row(f"experts.{{e}}.{down}.weight", "D F", "experts.down", "e F D"),
    )


def columns(
    gate_up: str = "experts.gate_up_proj", down: str = "experts.down_proj", halves: str = "0/2 F"
) -> tuple[Row, ...]:
    """All experts in two tensors that stand as they are multiplied: [E, D, 2F] and [E, F, D]; `halves` is "F 0/2" by
    turns.
    """
    return (
        Row(gate_up, f"E D ({halves})", "experts.gate", "E D F"),
        Row(gate_up, f"E D ({halves.replace('0/2', '1/2')})", "experts.up", "E D F"),
        Row(down, "E F D", "experts.down", "E F D"),
    )


FUSED = fused_experts("experts.gate_up_proj", "experts.down_proj")
W123 = each_expert("w1", "w3", "w2")
SHARED = (*gated_ffn("shared_expert.", "shared."), Row("shared_expert_gate.weight", "1 D", "shared_gate", "D 1"))
SHARED_EXPERTS = gated_ffn("shared_experts.", "shared.")


def renamed(rows: tuple[Row, ...], theirs: str, other: str) -> tuple[Row, ...]:
    """The same rows under names with another word in them."""
    return tuple(replace(row, theirs=row.theirs.replace(theirs, other)) for row in rows)


def both(
    layer: str, disk: tuple[Row, ...], memory: tuple[Row, ...], within: str = MLP, within_memory: str | None = None
) -> tuple[Names, Names]:
    """The names in files and in the reference's memory."""
    return Names(disk, layer, within=within), Names(memory, f"{layer}_in_memory", within=within_memory or within)


# What one row has too many for a contract (a bias, a shared expert) it leaves out.
QWEN = both("hf_qwen", (*router(), *each_expert(), *SHARED), (*router(), *FUSED, *SHARED))
DEEPSEEK = both("hf_deepseek", (*router(), *each_expert(), *SHARED_EXPERTS), (*router(), *FUSED, *SHARED_EXPERTS))
MIXTRAL = both("hf_mixtral_layer", (*router(), *W123), (*router(), *FUSED), SPARSE, MLP)
GRANITE_SHARED = (
    Row("shared_mlp.input_linear.weight", "(0/2 F) D", "shared.gate", "0/1 D F"),
    Row("shared_mlp.input_linear.weight", "(1/2 F) D", "shared.up", "0/1 D F"),
    Row("shared_mlp.output_linear.weight", "D F", "shared.down", "0/1 F D"),
)
GRANITE = both(
    "hf_granite_shared",
    (
        *under((
            Row("router.layer.weight", "E D", "router.kernel", "D E"),
            *fused_experts("input_linear.weight", "output_linear.weight"),
        ), "block_sparse_moe.", ""),
        *GRANITE_SHARED,
    ),
    (*under((Row("router.weight", "E D", "router.kernel", "D E"), *FUSED), "block_sparse_moe.", ""), *GRANITE_SHARED),
    LAYER,
)
