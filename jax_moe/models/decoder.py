"""One decoder for the Hugging Face mixture-of-experts families; a family is a `DecoderConfig` and a table of names.

Layers are stacked and scanned (`models.stack`): the shortest repeated unit of layers with equal contracts is the
scan's step, so that compile time does not grow with depth.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.arrays import check_choices, check_vocabulary, checked, checked_input, dims_of_settings
from jax_moe.attention import kind_of
from jax_moe.attention.positions import Positions, whole_call
from jax_moe.config.attention import LayerAttention
from jax_moe.config.decoder import DecoderConfig, DenseConfig, LayerConfig, NormPlace
from jax_moe.config.models import Origin
from jax_moe.config.moe import MoEConfig
from jax_moe.dims import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray
from jax_moe.dropout import fold
from jax_moe.experts import Experts, expert_ffn
from jax_moe.initializers import rounded
from jax_moe.models.stack import Layer, LayerPlan, ModelOutput, walk
from jax_moe.moe import MoE
from jax_moe.norms import RMSNorm, make_norm
from jax_moe.parameters import of_role, parameter, stacked
from jax_moe.remat import Remat
from jax_moe.routing import update_correction_bias
from jax_moe.shapes import Dim, dims_of
from jax_moe.sharding.explicit import auto_inside
from jax_moe.stored import Kept

# The norms of a layer, by where they stand
BEFORE, AFTER = ("attention_norm", "ffn_norm"), ("attention_out_norm", "ffn_out_norm")
NORMS: dict[NormPlace, tuple[str, ...]] = {
    "before": BEFORE, "after": AFTER, "around": (*BEFORE, *AFTER), "around_attention": (BEFORE[0], *AFTER),
}


class LayerScale(Kept):
    """What multiplies the stream after a layer: stored, but no gradient and no optimizer touches it."""


class Attend(nnx.Module):
    """What every layer has: attention of some kind, and the norms of both halves."""

    def __init__(self, contract: LayerAttention, config: DecoderConfig, **kwargs: Any):
        self.attention = kind_of(contract)(contract, **kwargs)
        for name in NORMS[config.norm_place]:
            setattr(self, name, _norm(config, kwargs["param_dtype"], kwargs["rngs"]))
        if config.layer_scale:
            self.layer_scale = parameter(jnp.ones((1,), kwargs["param_dtype"]), "1", "norm", LayerScale)

    def normed(self, name: str, x_BTD: Array) -> Array:
        """The input in its dtype, normed where the layer has that norm."""
        norm = getattr(self, name, None)
        return x_BTD if norm is None else norm(x_BTD).astype(x_BTD.dtype)


def _norm(config: DecoderConfig, param_dtype: DTypeLike, rngs: nnx.Rngs) -> RMSNorm | nnx.LayerNorm:
    return make_norm(config.norm, config.model_dim, config.norm_eps, param_dtype, rngs)


class Decoder(nnx.Module):
    """Embedding, blocks, a final norm and a head.

    Parameters of `blocks` (norms, attention), `moe` and `dense` are stacked: their leading dim counts the layers of
    `config.stacks`.
    `origin` is the checkpoint that it was loaded from, whose names and config.json `save_pretrained` writes again.
    """

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer | None = None, origin: Origin | None = None,
    ):
        self.config, self.origin = config, origin
        init = rounded(kernel_init or jax.nn.initializers.normal(0.02))
        param_dtype = jnp.dtype(param_dtype)
        kwargs: dict[str, Any] = {"param_dtype": param_dtype, "kernel_init": init}
        shape = (config.vocab_size, config.model_dim)
        self.embedding = parameter(init(rngs.params(), shape, param_dtype), "V D", "embedding")
        for name, stack in config.stacks.items():
            make = partial(_part, stack.contract, config, kwargs)
            setattr(self, name, stacked(make, rngs, len(stack.layers), "L"))
        self.final_norm = _norm(config, param_dtype, rngs)
        if not config.tied_embeddings:
            self.head = parameter(init(rngs.params(), shape[::-1], param_dtype), "D V", "head")
        if config.head_bias:
            self.head_bias = parameter(jnp.zeros(shape[:1], param_dtype), "V", "head")

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        key: PRNGKeyArray | None = None,
        training: bool = True,
        mask_BT: Bool[Array, "B T"] | None = None,
        position_BT: Int[Array, "B T"] | None = None,
        expert_LBTK: Int[Array, "L B T K"] | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "B T V"]:
        """Logits; arguments as in `run`."""
        return self.run(
            tokens_BT, key=key, training=training, mask_BT=mask_BT, position_BT=position_BT, expert_LBTK=expert_LBTK,
            remat=remat,
        ).logits_BTV

    @auto_inside("tokens_BT", "logits_BTV", "expert_LBTK")
    def run(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        key: PRNGKeyArray | None = None,
        training: bool = True,
        mask_BT: Bool[Array, "B T"] | None = None,
        position_BT: Int[Array, "B T"] | None = None,
        expert_LBTK: Int[Array, "L B T K"] | None = None,
        remat: Remat = "none",
        watch: bool = False,
    ) -> ModelOutput:
        """All that a call computes.

        Without a key deterministic; with one and `training` the contract's dropout and jitter. `mask_BT` is False at
        padding, left or right; logits there mean nothing. Positions count from 0 with the padding, unless given.
        `expert_LBTK` replays choices, as another run's `ModelOutput` has them. `remat`: what each repeated unit of
        layers keeps for a gradient. `watch` also hands out every intermediate stage.
        Raises ValueError for a token outside the vocabulary, an expert that is not there, or an array of another kind
        or shape.
        """
        self.check_tokens(tokens_BT)
        config = self.config
        if expert_LBTK is not None:
            check_choices("expert_LBTK", expert_LBTK, config.moe.num_experts, mask_BT)
        sizes = dims_of("tokens_BT", tokens_BT.shape) | dims_of_settings(config.moe, K="top_k")
        sizes |= {"L": Dim(len(config.moe_layers), "the number of mixtures")}
        given = checked(sizes, mask_BT=mask_BT, position_BT=position_BT, expert_LBTK=expert_LBTK)
        mask_BT, position_BT, expert_LBTK = map(given.get, ("mask_BT", "position_BT", "expert_LBTK"))
        x_BTD = self.embed(tokens_BT)
        if position_BT is None:
            position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        positions = whole_call(tokens_BT.shape[1], position_BT, mask_BT)
        y_BTD, _, found = self.layers(
            x_BTD, positions, key=key, training=training, expert_LBTK=expert_LBTK, remat=remat, watch=watch
        )
        normed_BTD = self.final_norm(y_BTD).astype(y_BTD.dtype)
        logits_BTV, stats, expert_LBTK = self.compare(normed_BTD), found.pop("stats"), found.pop("expert_LBTK")
        stages = {"embedding": x_BTD, **found, "final_norm": normed_BTD} if watch else None
        return ModelOutput(logits_BTV, stats, expert_LBTK, stages)

    def update_correction_biases(self, tokens_LE: Int[Array, "L E"], rate: float, recentre: bool = False) -> None:
        """`update_correction_bias` for every mixture that has a correction bias; `tokens_LE` are the loads of all
        mixtures, as `tokens_per_expert` counts the rows of a `ModelOutput`'s `expert_LBTK`.
        """
        for name, stack in self.config.stacks.items():
            if isinstance(stack.contract, MoEConfig) and stack.contract.router.correction_bias:
                bias = getattr(self, name).router.correction_bias
                rows = [self.config.moe_layers.index(layer) for layer in stack.layers]
                bias[...] = update_correction_bias(bias[...], tokens_LE[np.asarray(rows)], rate, recentre)

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What goes into the first layer."""
        x_BTD = jnp.take(self.embedding[...], tokens_BT, axis=0)
        multiplier = self.config.embedding_multiplier
        return x_BTD if multiplier == 1 else x_BTD * multiplier

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """What comes out of the last layer, normed and compared with every token."""
        return self.compare(self.final_norm(x_BTD).astype(x_BTD.dtype))

    def compare(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Normed vectors compared with every token."""
        kernel_DV = self.embedding[...].T if self.config.tied_embeddings else self.head[...]
        logits_BTV = x_BTD @ kernel_DV.astype(x_BTD.dtype)
        if self.config.head_bias:
            logits_BTV += self.head_bias[...].astype(x_BTD.dtype)
        divisor = self.config.logits_divisor
        logits_BTV = logits_BTV if divisor == 1 else logits_BTV / divisor
        cap = self.config.logits_softcap
        return logits_BTV if cap is None else jnp.tanh(logits_BTV / cap) * cap

    def layers(
        self, x_BTD: Float[Array, "B T D"], positions: Positions, memory: dict[str, Any] | None = None, *,
        key: PRNGKeyArray | None = None, training: bool = False, expert_LBTK: Int[Array, "L B T K"] | None = None,
        remat: Remat = "none", watch: bool = False, in_place: bool = False,
    ) -> tuple[Array, dict[str, Any] | None, dict[str, Any]]:
        """The last layer's output; `memory`, the caches by stack, with these positions in it; and by name what layers
        hand out.

        `in_place` reads weights where they lie, and of few tokens only the chosen experts': for a step of generation.
        """
        config = self.config
        parts = {name: nnx.split(getattr(self, name), of_role("expert"), ...) for name in config.stacks}
        stacks: dict[str, Any] = {name: (experts, others) for name, (_, experts, others) in parts.items()}
        through: dict[str, Any] = {}
        # slicing a layer out of the stacked experts would copy them: experts of all layers get one numbering
        if in_place:
            through = {
                name: jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), each[1]) for name, each in parts.items()
            }
            stacks = {name: (None, others) for name, (_, others) in stacks.items()}
        stacks |= {"key": None if key is None else jax.random.split(key, config.num_layers), "replay": expert_LBTK}
        step = _Step(
            model=self, graphs={name: graph for name, (graph, _, _) in parts.items()}, through=through,
            positions=positions,
            training=training, watch=watch, in_place=in_place, shared={
                contract: kind_of(contract).shared(contract, positions, x_BTD.dtype)
                for contract in dict.fromkeys(layer.attention for layer in config.layers)
            },
        )
        return walk(step, _plans(config), stacks, x_BTD, memory, remat=remat, in_place=in_place)

    def add(self, x_BTD: Array, y_BTD: Array) -> Array:
        """The residual stream with half a block's answer."""
        multiplier = self.config.residual_multiplier
        return x_BTD + (y_BTD if multiplier == 1 else y_BTD * multiplier)

    def check_tokens(self, tokens_BT: Int[Array, "B T"] | Int[np.ndarray, "B T"]) -> None:
        """Raises ValueError for what is no array of integers [B, T], an empty text or, outside jit, a token that is
        not in the vocabulary."""
        checked_input("tokens_BT", tokens_BT)
        if tokens_BT.shape[1] < 1:
            raise ValueError("tokens_BT has 0 positions: must be at least 1")
        check_vocabulary(tokens_BT, self.config.vocab_size)


def _part(contract: Any, config: DecoderConfig, kwargs: dict[str, Any], rngs: nnx.Rngs) -> nnx.Module:
    """What a layer has of that contract: a mixture, a dense network, or attention and the norms."""
    if isinstance(contract, MoEConfig):
        return MoE(contract, rngs=rngs, **kwargs)
    if isinstance(contract, DenseConfig):
        sizes = 1, contract.model_dim, contract.dim
        return Experts(*sizes, contract.expert, role="shared", leading="1", rngs=rngs, **kwargs)
    return Attend(contract, config, rngs=rngs, **kwargs)


class _Halves(NamedTuple):
    """A layer's contract, and the stacks with a row of its attention and of its feed-forward network."""

    contract: LayerConfig
    attention: str
    ffn: str


def _plans(config: DecoderConfig) -> list[LayerPlan]:
    """Every layer's contract, and the stacks it has a row in."""
    halves = [_Halves(layer, *config.stacks_of(i)) for i, layer in enumerate(config.layers)]
    replayed = dict.fromkeys(config.moe_layers, ("replay",))
    return [
        LayerPlan(each, (each.attention, each.ffn, "key", *replayed.get(i, ()))) for i, each in enumerate(halves)
    ]


@dataclass(frozen=True)
class _Step:
    """What is the same in every layer of a walk; called, one layer of it."""

    model: Decoder
    graphs: dict[str, nnx.GraphDef]
    through: dict[str, Any]  # experts of all layers by stack, where they are read in place
    positions: Positions
    shared: dict[LayerAttention, Any]
    training: bool
    watch: bool
    in_place: bool

    def __call__(self, x_BTD: Array, memory: Any, layer: Layer) -> tuple[Array, Any, dict[str, Any]]:
        """x += attention(x); x += ffn(x), each with its norms. Handed out besides: statistics, choices and stages."""
        halves: Any = layer.plan.contract
        contract, name = halves.contract, halves.attention
        key, block, ffn = layer.rows["key"], self._module(name, layer), self._module(halves.ffn, layer)
        block.attention.config = contract.attention  # a stack's layers may differ in what leaves parameters alone
        normed_BTD = block.normed("attention_norm", x_BTD)
        attended_BTD, cache = block.attention(
            normed_BTD, self.positions, self.shared[contract.attention], key=fold(key, 0), training=self.training,
            memory=None if memory is None else (memory[name], layer.numbers[name]),
        )
        x_BTD = self.model.add(x_BTD, block.normed("attention_out_norm", attended_BTD))
        ffn_BTD = block.normed("ffn_norm", x_BTD)
        if isinstance(ffn, MoE):
            first = layer.numbers[halves.ffn] * ffn.config.num_networks if self.in_place else None
            y_BTD, found = self._mixture(ffn, ffn_BTD, fold(key, 1), layer.rows["replay"], first)
        else:
            y_BTD = expert_ffn(ffn_BTD.reshape(1, -1, ffn_BTD.shape[-1]), ffn.weights(), contract.ffn.expert)
            y_BTD = y_BTD.reshape(ffn_BTD.shape)
            found = {"combined": y_BTD} if self.watch else {}
        x_BTD = self.model.add(x_BTD, block.normed("ffn_out_norm", y_BTD))
        if self.model.config.layer_scale:
            x_BTD *= block.layer_scale[...].astype(x_BTD.dtype)
        if self.watch:
            found |= {"attention_norm": normed_BTD, "attention": attended_BTD, "ffn_norm": ffn_BTD, "residual": x_BTD}
        return x_BTD, None if memory is None else {**memory, name: cache}, found

    def _module(self, name: str, layer: Layer) -> Any:
        """The layer's module of a stack."""
        experts, others = layer.rows[name]
        return nnx.merge(self.graphs[name], self.through.get(name, experts), others)

    def _mixture(
        self, ffn: MoE, x_BTD: Array, key: Array | None, replay_BTK: Array | None, first_expert: Array | None
    ) -> tuple[Array, dict[str, Any]]:
        """The answer of a layer's mixture, and what it hands out: nothing in a step of generation."""
        output = ffn.run(
            x_BTD, key=key, training=self.training, mask_BT=self.positions.mask_BT, expert_BTK=replay_BTK,
            watch=self.watch, first_expert=first_expert,
        )
        if self.in_place:
            return output.y_BTD, {}
        return output.y_BTD, {"stats": output.stats, "expert_LBTK": output.expert_BTK, **(output.stages or {})}
