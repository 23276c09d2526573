"""The rows of the parity table: contracts, sizes and inputs. `inputs.py` draws numbers, seeded by the row's name."""

import dataclasses
import functools
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

from jax_moe import presets
from jax_moe.config.attention import AttentionConfig
from jax_moe.config.models import BlockConfig, MakeMoEConfig
from jax_moe.config.moe import AroundConfig, BalanceConfig, ExpertConfig, MoEConfig, RouterConfig, SoftMoEConfig

Config = MoEConfig | SoftMoEConfig | AttentionConfig | BlockConfig | MakeMoEConfig
Draw = Literal["noise", "jitter", "keep", "mask", "replay", "tokens"]
Logits = Literal["free", "equal", "bfloat16", "unchosen", "one", "two"]
Mask = Literal["ragged", "row", "all"]


@dataclass(frozen=True)
class Case:
    """A row: a contract, the input's sizes, and the arrays that both sides are given."""

    name: str
    config: Config
    batch_size: int = 2
    num_positions: int = 6
    draws: tuple[Draw, ...] = ()
    mask: Mask = "ragged"  # with draw "mask": some padding at the ends, one row of nothing but padding, or all of it
    # other than "free", the router's kernel is zero and the logits are given: all equal (ties), bf16-rounded (ties),
    # expert 0 never chosen, everybody's first choice is expert 0, or only two experts ever chosen
    logits: Logits = "free"
    # the least gap between a token's neighbouring scores, and from a unit to its kink: bf16 rounding cannot close it
    margin: float = 0.02

    @property
    def moe(self) -> MoEConfig | None:
        """The contract of the sparse layer in it, if any."""
        config = self.config.block if isinstance(self.config, MakeMoEConfig) else self.config
        config = config.moe if isinstance(config, BlockConfig) else config
        return config if isinstance(config, MoEConfig) else None


SIZES = {"model_dim": 8, "expert_dim": 12, "num_experts": 4, "top_k": 2}


def sized(preset: str, **settings: object) -> MoEConfig:
    """A preset at the table's sizes."""
    return getattr(presets, preset)(**{**SIZES, **settings})


def plain(**settings: object) -> MoEConfig:
    """A dropless softmax layer with SwiGLU experts, changed by `settings`."""
    return MoEConfig(**{**SIZES, **settings})  # type: ignore[arg-type]


def overflow(priority: str, **settings: object) -> MoEConfig:
    """A layer with half of the slots that the choices need."""
    return sized("makemoe", dropout=0.0, noise=False).with_capacity(0.5, priority=priority, **settings)


def via(config: MoEConfig, dispatcher: str) -> MoEConfig:
    """The same contract through another JAX dispatcher."""
    return dataclasses.replace(config, dispatcher=dispatcher)  # type: ignore[arg-type]


MAKEMOE = sized("makemoe", dropout=0.25)
DROPLESS = sized("makemoe", dropout=0.25, capacity_factor=None)
ON_INPUT = plain(
    top_k=1, router=RouterConfig(score="sigmoid"), expert=ExpertConfig(weight_on="input", activation="gelu"),
)
DEEPSEEK = sized("deepseek_v3", num_experts=6, num_clusters=3, top_clusters=2, shared_dim=10)
NORMED = plain(
    around=AroundConfig(latent_dim=5, latent_norm="rms_centered", output_norm="rms"),
    expert=ExpertConfig(answer_norm="rms_of_scaled", shared_dim=10),
)
PARTS_NORMED = plain(
    around=AroundConfig(
        input_norm="rms_wide", routed_norm="rms", shared_input_norm="rms_centered", shared_norm="rms_wide"
    ),
    router=RouterConfig(renormalise="sum", input_norm=True, expert_scale=True), expert=ExpertConfig(shared_dim=10),
)
# Without a learned scale: no loss depends on it, and the rounding of a gradient of 0 cannot be compared
WEIGHED = plain(
    router=RouterConfig(
        score="sigmoid", correction_bias=True, renormalise="sum", scale=1.5, shared_experts=2, weight_dtype="input",
    ),
    expert=ExpertConfig(shared_dim=5),
)

NETWORK = plain(
    num_experts=5, identity_experts=1, identity_answer="nothing",
    router=RouterConfig(network_dim=6, takes_state=True, weight_dtype="input"),
)

ROUTERS = [
    Case("plain top-k", sized("makemoe", noise=False, capacity_factor=None, dropout=0.0)),
    Case("noisy top-k", sized("makemoe", capacity_factor=None, dropout=0.0), draws=("noise",)),
    Case("makemoe", MAKEMOE, draws=("noise", "keep")),
    Case("makemoe, einsum", via(MAKEMOE, "einsum"), draws=("noise", "keep")),
    Case("makemoe dropless", DROPLESS, draws=("noise", "keep")),
    Case("makemoe dropless, einsum", via(DROPLESS, "einsum"), draws=("noise", "keep")),
    Case("mixtral", sized("mixtral")),
    Case("mixtral, einsum", via(sized("mixtral"), "einsum")),
    Case("mixtral, jitter", sized("mixtral", jitter_eps=0.1), draws=("jitter",)),
    Case("switch", sized("switch", top_k=1, jitter_eps=0.1), draws=("jitter",)),
    Case("vmoe", sized("vmoe"), draws=("noise",)),
    Case("qwen2_moe", sized("qwen2_moe", shared_dim=10)),
    Case("qwen3_moe", sized("qwen3_moe")),
    Case("olmoe", sized("olmoe")),
    Case("deepseek_v3", DEEPSEEK),
    Case("deepseek_v2 clusters", dataclasses.replace(
        DEEPSEEK,
        router=RouterConfig(num_clusters=3, top_clusters=2, cluster_score="max", cluster_fill="zero", scale=2.0),
    )),
    Case("glm4_moe", sized("glm4_moe", shared_dim=10)),
    Case("gpt_oss", sized("gpt_oss")),
    Case("granite_moe", sized("granite_moe")),
    Case("sqrt-softplus scores", plain(router=RouterConfig(score="sqrt_softplus", renormalise="sum", bias=True))),
    Case("choice by logits", plain(
        router=RouterConfig(score="sigmoid", selection="logit", correction_bias=True, renormalise="sum"),
    )),
    Case("a table of tokens", plain(
        num_experts=6, router=RouterConfig(score="sqrt_softplus", renormalise="eps", table_tokens=11),
    ), draws=("tokens", "mask")),
    Case("sparse mixer", plain(
        num_experts=6, router=RouterConfig(order="sparse_mixer", mixer_eps=0.3, bias=True, scale=1.5),
    )),
    Case("least sum of weights", plain(router=RouterConfig(
        renormalise="floor", renormalise_eps=0.7, correction_bias=True, weight_dtype="input",
    ))),
    Case("bias on the answer", plain(answer_bias=True, expert=ExpertConfig(shared_dim=10)), draws=("mask",)),
    Case("squared ReLU", plain(expert=ExpertConfig(activation="relu2", gated=False, shared_dim=10))),
    Case("clamped activation", plain(expert=ExpertConfig(
        clamp=0.7, clamp_on="activation", shared_dim=10, shared_clamp=None, shared_scale=0.5,
    ))),
    Case("balance loss of the logits", plain(
        router=RouterConfig(score="sigmoid", correction_bias=True, renormalise="sum"),
        balance=BalanceConfig(of="logits", f_sums_to="k", pooled="over_layers"),
    )),
    Case("deepseek_v3, balance loss of each sequence", sized(
        "deepseek_v3", num_experts=6, num_clusters=3, top_clusters=2, shared_dim=10, balance_per_sequence=True,
    ), draws=("mask",), batch_size=3),
    Case("weight on input", ON_INPUT),
    Case("weight on input, gather", ON_INPUT.with_capacity(1.0)),
    Case("weight on input, einsum", via(ON_INPUT.with_capacity(1.0), "einsum")),
    Case("identity experts", plain(num_experts=6, identity_experts=2)),
    Case("identity experts, einsum", via(plain(num_experts=6, identity_experts=2), "einsum")),
    Case("identity experts, capacity, padding", plain(
        num_experts=6, identity_experts=2, expert=ExpertConfig(weight_on="input"),
    ).with_capacity(0.5, priority="choice", renormalise_after_drop=True), draws=("mask", "replay")),
    Case("maps around the experts", plain(
        around=AroundConfig(latent_dim=5), router=RouterConfig(score="sigmoid", logit_scale=0.4),
        expert=ExpertConfig(activation="relu2", gated=False, shared_dim=10),
    )),
    Case("norm before the router, norms of parts", PARTS_NORMED),
    Case("norm before the router, norms of parts, capacity", PARTS_NORMED.with_capacity(0.5), draws=("mask",)),
    Case("maps and norms around the experts", NORMED),
    Case("maps and norms around the experts, einsum", via(NORMED, "einsum")),
    Case("maps and norms around the experts, capacity", NORMED.with_capacity(0.5), draws=("mask",)),
    Case("soft caps", plain(expert=ExpertConfig(gate_softcap=0.7, up_softcap=0.9, shared_dim=10))),
    Case("shared experts weighed", WEIGHED),
    Case("shared experts weighed, einsum", via(WEIGHED.with_capacity(0.5), "einsum"), draws=("mask", "replay")),
    Case("a network for a router, with a state", NETWORK),
    Case("a network for a router, without a state", plain(
        num_experts=5, identity_experts=1, router=RouterConfig(network_dim=6, dtype="input"),
    ).with_capacity(0.7), draws=("mask",)),
    Case("product keys", plain(
        num_experts=9, expert_dim=1, router=RouterConfig(order="select_then_softmax", product_keys="own"),
        expert=ExpertConfig(gated=False, shared_dim=10, shared_gated=True),
    )),
    Case("product keys, of all tokens in a row", plain(router=RouterConfig(product_keys="flat")), draws=("replay",)),
    Case("replayed choices", MAKEMOE, draws=("noise", "keep", "replay")),
]

EXTREMES = [
    Case("one expert", sized("mixtral", num_experts=1, top_k=1)),
    Case(
        "one expert, capacity", sized("makemoe", num_experts=1, top_k=1, noise=False, dropout=0.0).with_capacity("0.5")
    ),
    Case("K = E", sized("mixtral", top_k=4)),
    Case("K = E, capacity", dataclasses.replace(overflow("choice", clamp=False), top_k=4)),
    Case("unchosen expert", sized("mixtral"), logits="unchosen"),
    Case("unchosen expert, capacity", overflow("token"), logits="unchosen"),
    Case("everybody chooses one", sized("mixtral"), logits="one"),
    Case("everybody chooses one, capacity", sized("switch", top_k=1, jitter_eps=0.0), logits="one"),
    Case("everybody chooses two, capacity", overflow("choice"), logits="two"),
    Case("no slot at all", sized("makemoe", noise=False, dropout=0.0), batch_size=1, num_positions=1),
    Case("one token", sized("mixtral"), batch_size=1, num_positions=1),
    *(Case(f"overflow, {p} order", overflow(p)) for p in ("token", "choice", "probability", "batch")),
    *(
        Case(
            f"overflow, {p} order, renormalised", dataclasses.replace(overflow(p, renormalise_after_drop=True), top_k=3)
        )
        for p in ("token", "choice", "probability", "batch")
    ),
    Case("overflow, batch order, einsum", via(overflow("batch"), "einsum")),
    Case(
        "vmoe, batch order", sized("vmoe", batch_priority=True).with_capacity(0.5, multiple=1), draws=("noise",),
        batch_size=3,
    ),
    Case(
        "overflow, einsum",
        via(dataclasses.replace(overflow("probability", renormalise_after_drop=True), top_k=3), "einsum"),
    ),
    Case("fixed groups that do not divide", overflow("token", group="fixed", group_size=5)),
    Case("fixed groups, einsum", via(overflow("choice", group="fixed", group_size=5), "einsum")),
    Case("group larger than the batch", overflow("token", group="fixed", group_size=20)),
    Case("sequence groups", overflow("choice", group="sequence"), batch_size=3),
    Case("capacity rounded up", plain().with_capacity("0.29", rounding="ceil", multiple=3, minimum=4), num_positions=7),
    Case("equal logits", overflow("token"), logits="equal"),
    Case("equal logits, probability order", overflow("probability"), logits="equal"),
    Case("bf16-rounded logits", overflow("choice"), logits="bfloat16"),
    Case("bf16-rounded logits, clusters", DEEPSEEK, logits="bfloat16"),
    Case("padding", MAKEMOE, draws=("noise", "keep", "mask")),
    Case("padding, dropless", sized("qwen2_moe", shared_dim=10), draws=("mask",)),
    Case("padding, fixed groups", overflow("probability", group="fixed", group_size=5), draws=("mask",)),
    Case("every token padded", overflow("token"), draws=("mask",), mask="all"),
    Case("every token padded, dropless", sized("mixtral"), draws=("mask",), mask="all"),
]
SOFT = SoftMoEConfig(model_dim=8, num_experts=3, num_slots=2)
SOFT_NORMED = SoftMoEConfig(
    model_dim=8, num_experts=3, num_slots=2, output_activation="relu", output_layer_norm=True, residual=False
)
SOFT_DEEP = SoftMoEConfig(
    model_dim=8, num_experts=2, num_slots=3, hidden_dims=(12, 12, 8), hidden_activation="gelu", output_layer_norm=True
)
ATTENTION = AttentionConfig(model_dim=8, num_heads=2, scale="model_dim", dropout=0.25)
FUSED = AttentionConfig(model_dim=8, num_heads=4, projections="fused")
BOTH_WAYS = AttentionConfig(model_dim=8, num_heads=2, causal=False)
TINY = MakeMoEConfig(vocab_size=11, block_size=6, model_dim=8, num_heads=2, num_layers=2, num_experts=4, dropout=0.25)

LAYERS = [
    Case("soft moe, residual", SOFT),
    Case("soft moe, output norm", SOFT_NORMED),
    Case("soft moe, deep", SOFT_DEEP),
    Case(
        "soft moe, no hidden layer",
        SoftMoEConfig(model_dim=8, num_experts=3, num_slots=2, hidden_dims=(), layer_norm=False),
    ),
    Case("soft moe, padding", SOFT, draws=("mask",)),
    Case("soft moe, normalised", dataclasses.replace(SOFT_NORMED, normalise=True)),
    Case("soft moe, padded row", SOFT_NORMED, draws=("mask",), mask="row"),
    Case("attention, makemoe", ATTENTION, draws=("keep",)),
    Case("attention, no dropout", ATTENTION),
    Case("attention, fused", FUSED),
    Case("attention, both ways, padding", BOTH_WAYS, draws=("mask",)),
    Case("attention, padded row", FUSED, draws=("mask",), mask="row"),
    Case("block, makemoe", BlockConfig(attention=ATTENTION, moe=MAKEMOE), draws=("noise", "keep")),
    Case("block, mixtral", BlockConfig(attention=FUSED, moe=sized("mixtral")), draws=("noise", "mask")),
    Case("block, soft moe", BlockConfig(attention=BOTH_WAYS, moe=SOFT), draws=("mask",)),
    Case("makemoe model", TINY, draws=("noise", "keep")),
    Case(
        "makemoe model, dropless", dataclasses.replace(TINY, capacity_factor=None, noise=False, dropout=0.0),
        draws=("noise",),
    ),
    Case("makemoe model, padding", TINY, draws=("noise", "keep", "mask")),
]

CASES = [*ROUTERS, *EXTREMES, *LAYERS]
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "case names must be unique: they seed the numbers"

SHARED = [field.name for field in dataclasses.fields(ExpertConfig) if field.name.startswith("shared_")]
EVERY_CELL = "PARITY_TABLE_EVERY_CELL"  # set while the table is measured: no cell is left to another row


def kind_of_program(case: Case) -> Hashable:
    """What decides how a row's program is built: its module, its dispatcher and whether choices can be dropped."""
    return type(case.config), case.moe and (case.moe.dispatcher, case.moe.capacity is None)


def kind_of_dispatch(case: Case) -> Hashable:
    """What a dispatcher sees of a row: its experts, its groups, which places are filled, and the draws it applies.

    Routers, the order in which choices take their places, norms, maps and shared experts are outside of it.
    """
    moe = case.moe
    if moe is None or case.config is not moe:
        return case
    experts = dataclasses.replace(moe.expert, **{name: getattr(ExpertConfig(), name) for name in SHARED})
    tokens = case.batch_size * case.num_positions
    groups = moe.capacity and moe.group_size(case.batch_size, case.num_positions) < tokens
    load = case.logits if case.logits in ("unchosen", "one", "two") else "free"
    draws = tuple(draw for draw in case.draws if draw in ("keep", "mask"))
    sizes = moe.num_experts, moe.top_k, moe.identity_experts, moe.identity_answer, case.batch_size, case.num_positions
    return experts, groups, load, draws, case.mask, sizes


def kind_of_layer(case: Case) -> Hashable:
    """What a row computes and holds, whoever gets which place: sizes, loads, groups, order and draws are outside."""
    moe = case.moe
    if moe is None or case.config is not moe:
        return case.config
    return moe.router, moe.expert, moe.around, moe.answer_bias, moe.identity_answer, moe.capacity is None


@functools.cache
def _firsts(kind: Callable[[Case], Hashable]) -> frozenset[str]:
    first: dict[Hashable, str] = {}
    for case in CASES:
        first.setdefault(kind(case), case.name)
    return frozenset(first.values())


def every_cell() -> bool:
    """Whether no cell is left to another row."""
    return bool(os.environ.get(EVERY_CELL))


def stands_for(case: Case, kind: Callable[[Case], Hashable]) -> bool:
    """Whether a check that depends on the kind alone runs on this row: the kind's first, and drawn rows."""
    return every_cell() or case.name not in BY_NAME or case.name in _firsts(kind)
