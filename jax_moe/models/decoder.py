"""One decoder for the Hugging Face mixture-of-experts families; a family is a `DecoderConfig` and a table of names.

Layers are stacked and scanned. Where mixtures and dense layers alternate, the shortest repeated unit of layers is
the scan's step, so that compile time does not grow with depth.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.arrays import check_choices, check_vocabulary, checked, checked_input, dims_of_settings
from jax_moe.attention.grouped import GroupedAttention, Rotations
from jax_moe.attention.masks import visible_positions
from jax_moe.attention.rope import rotations
from jax_moe.config.models import DecoderConfig, Origin
from jax_moe.dims import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray
from jax_moe.dispatch import merge_groups
from jax_moe.dropout import fold
from jax_moe.experts import Experts, expert_ffn
from jax_moe.initializers import rounded
from jax_moe.losses import MoEStats
from jax_moe.moe import MoE
from jax_moe.norms import RMSNorm
from jax_moe.parameters import parameter, stacked
from jax_moe.remat import Remat, rematerialised
from jax_moe.shapes import Dim, dims_of


def repeated_units(kinds: str) -> list[tuple[str, int]]:
    """`kinds` as (unit, repeats) runs, each the one that covers most from where the last ended.

    >>> repeated_units("DMMDMDM")
    [('D', 1), ('M', 2), ('DM', 2)]
    """
    runs, start = [], 0
    while start < len(kinds):
        best = (kinds[start], 1)
        for size in range(1, (len(kinds) - start) // 2 + 1):
            unit, count = kinds[start : start + size], 1
            while kinds[start + count * size : start + (count + 1) * size] == unit:
                count += 1
            if count > 1 and size * count > len(best[0]) * best[1]:
                best = (unit, count)
        runs.append(best)
        start += len(best[0]) * best[1]
    return runs


def layer_units(config: DecoderConfig) -> list[tuple[str, int]]:
    """The layers as runs of a repeated unit of dense layers (D) and mixtures (M)."""
    return repeated_units("".join("D" if i in config.dense_layers else "M" for i in range(config.num_layers)))


def after_units(start: dict[str, int], unit: str, count: int) -> dict[str, int]:
    """How many layers (A), mixtures (M) and dense layers (D) lie before what follows the run."""
    return {letter: n + count * (len(unit) if letter == "A" else unit.count(letter)) for letter, n in start.items()}


def layer_windows(config: DecoderConfig) -> Int[Array, " L"] | None:
    """How far back each layer sees; None where no layer has a window."""
    if config.sliding_window is None:
        return None
    windows = [config.sliding_window if i in config.sliding_layers else 2**30 for i in range(config.num_layers)]
    return jnp.asarray(windows, jnp.int32)


class DecoderOutput(NamedTuple):
    """What one call of a decoder computes; L counts the layers with a mixture."""

    logits_BTV: Float[Array, "B T V"]  # in the weights' dtype
    stats: MoEStats  # each field with a leading L
    expert_LBTK: Int[Array, "L B T K"]  # the experts every token was sent to, best first


class Attend(nnx.Module):
    """What every layer has: two norms and attention between them."""

    def __init__(self, config: DecoderConfig, **kwargs: Any):
        norm = (config.model_dim, config.norm_eps, kwargs["param_dtype"])
        self.attention_norm = RMSNorm(*norm)
        self.attention = GroupedAttention(config, **kwargs)
        self.ffn_norm = RMSNorm(*norm)


class Decoder(nnx.Module):
    """Embedding, blocks, a final norm and a head.

    Parameters of `blocks` (norms, attention) have a leading L, those of `moe` and `dense` a leading count of such layers.
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
        self.blocks = stacked(lambda rngs: Attend(config, rngs=rngs, **kwargs), rngs, config.num_layers, "L")
        self.moe = stacked(lambda rngs: MoE(config.moe, rngs=rngs, **kwargs), rngs, len(config.moe_layers), "L")
        if config.dense_layers:
            dense = (1, config.model_dim, config.dense_dim, _dense(config))
            make = lambda rngs: Experts(*dense, role="shared", rngs=rngs, **kwargs)  # noqa: E731
            self.dense = stacked(make, rngs, len(config.dense_layers), "L")
        self.final_norm = RMSNorm(config.model_dim, config.norm_eps, param_dtype)
        if not config.tied_embeddings:
            self.head = parameter(init(rngs.params(), shape[::-1], param_dtype), "D V", "head")

    def __call__(self, tokens_BT: Int[Array, "B T"], **kwargs: Any) -> Float[Array, "B T V"]:
        """Logits; arguments as in `run`."""
        return self.run(tokens_BT, **kwargs).logits_BTV

    def logits_and_stats(self, tokens_BT: Int[Array, "B T"], **kwargs: Any) -> tuple[Float[Array, "B T V"], MoEStats]:
        """Logits and the statistics of every mixture; arguments as in `run`."""
        output = self.run(tokens_BT, **kwargs)
        return output.logits_BTV, output.stats

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
    ) -> DecoderOutput:
        """All that a call computes.

        Without a key deterministic; with one and `training` the contract's dropout and jitter. `mask_BT` is False at
        padding, left or right; logits there mean nothing. Positions count from 0 with the padding, unless given.
        `expert_LBTK` replays choices, as another run's `DecoderOutput` has them. `remat`: what each repeated unit of layers
        keeps for a gradient.
        Raises ValueError for a token outside the vocabulary, an expert that is not there, or an array of another kind or shape.
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
        turns = rotations(position_BT, config.rope, config.head_dim, x_BTD.dtype)
        x_BTD, (stats, expert_LBTK), _ = self.layers(
            x_BTD, turns, mask_BT, key=key, training=training, expert_LBTK=expert_LBTK, remat=remat
        )
        return DecoderOutput(self.logits(x_BTD), stats, expert_LBTK)

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What goes into the first layer."""
        x_BTD = jnp.take(self.embedding[...], tokens_BT, axis=0)
        multiplier = self.config.embedding_multiplier
        return x_BTD if multiplier == 1 else x_BTD * multiplier

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """What comes out of the last layer, normed and compared with every token."""
        x_BTD = self.final_norm(x_BTD)
        kernel_DV = self.embedding[...].T if self.config.tied_embeddings else self.head[...]
        logits_BTV = x_BTD @ kernel_DV.astype(x_BTD.dtype)
        divisor = self.config.logits_divisor
        return logits_BTV if divisor == 1 else logits_BTV / divisor

    def layers(
        self, x_BTD: Float[Array, "B T D"], turns: Rotations, mask_BT: Bool[Array, "B T"] | None = None, *,
        key: PRNGKeyArray | None = None, training: bool = False, keep_heads: bool = False,
        expert_LBTK: Int[Array, "L B T K"] | None = None, remat: Remat = "none",
    ) -> tuple[Array, tuple[MoEStats, Array], tuple[Array, Array] | None]:
        """The last layer's output, statistics and choices, and with `keep_heads` keys and values [L, B, T, J, A].

        One scan for every run of a repeated unit of dense layers (D) and mixtures (M).
        """
        config = self.config
        stacks = {"A": self.blocks, "M": self.moe} | ({"D": self.dense} if config.dense_layers else {})
        position_T = jnp.arange(x_BTD.shape[1])
        graphs: dict[str, Any] = {}
        weights: dict[str, Any] = {}
        for letter, stack in stacks.items():
            graphs[letter], weights[letter] = nnx.split(stack)
        weights["M"] = (weights["M"], expert_LBTK)
        weights["W"] = layer_windows(config)
        weights["K"] = None if key is None else jax.random.split(key, config.num_layers)

        def step(unit: str, x_BTD: Array, scanned: list) -> tuple[Array, Any]:
            reports, heads = [], []
            for letter, (layer, ffn) in zip(unit, scanned, strict=True):
                block = nnx.merge(graphs["A"], layer["A"])
                visible = visible_positions(position_T, position_T.size, layer["W"], mask_BT)
                key = layer["K"]
                q, k, v = block.attention.project(block.attention_norm(x_BTD), turns)
                heads += [(k, v)] if keep_heads else []
                x_BTD = self.add(x_BTD, block.attention.attend(q, k, v, visible, fold(key, 0) if training else None))
                params, replay = ffn if letter == "M" else (ffn, None)
                module = nnx.merge(graphs[letter], params)
                y_BTD, report = self._ffn(block.ffn_norm(x_BTD), module, fold(key, 1), training, mask_BT, replay)
                x_BTD = self.add(x_BTD, y_BTD)
                reports += [] if report is None else [report]
            return x_BTD, [jax.tree.map(lambda *each: jnp.stack(each), *found) if found else None for found in (reports, heads)]

        start, collected = dict.fromkeys("ADM", 0), []
        for unit, count in layer_units(config):
            scanned = [_layer_weights(weights, unit, place, start, count) for place in range(len(unit))]
            x_BTD, found = jax.lax.scan(rematerialised(partial(step, unit), remat), x_BTD, scanned)
            start = after_units(start, unit, count)
            collected.append(jax.tree.map(lambda each: each.reshape(each.shape[0] * each.shape[1], *each.shape[2:]), found))
        reports, heads = ([each for each in one if each is not None] for one in zip(*collected, strict=True))
        kept = jax.tree.map(lambda *each: jnp.concatenate(each), *heads) if keep_heads else None
        return x_BTD, jax.tree.map(lambda *each: jnp.concatenate(each), *reports), kept

    def add(self, x_BTD: Array, y_BTD: Array) -> Array:
        """The residual stream with half a block's answer."""
        multiplier = self.config.residual_multiplier
        return x_BTD + (y_BTD if multiplier == 1 else y_BTD * multiplier)

    def _ffn(
        self, x_BTD: Array, ffn: MoE | Experts, key: Array | None, training: bool, mask_BT: Array | None,
        replay_BTK: Array | None,
    ) -> tuple[Array, tuple[MoEStats, Array] | None]:
        if isinstance(ffn, Experts):
            return self.dense_answer(x_BTD, ffn), None
        y_BTD, stats, routing = ffn.with_routing(x_BTD, key=key, training=training, mask_BT=mask_BT, expert_BTK=replay_BTK)
        expert_BTK = merge_groups(routing.expert_GSK, *x_BTD.shape[:2])
        return y_BTD, (stats, expert_BTK)

    def dense_answer(self, x_BTD: Array, ffn: Experts) -> Array:
        """A dense layer's FFN."""
        flat = x_BTD.reshape(1, -1, x_BTD.shape[-1])
        return expert_ffn(flat, ffn.weights(), _dense(self.config)).reshape(x_BTD.shape)

    def check_tokens(self, tokens_BT: Int[Array, "B T"] | Int[np.ndarray, "B T"]) -> None:
        """Raises ValueError for what is no array of integers [B, T], an empty text or, outside jit, a token that is not in the
        vocabulary."""
        checked_input("tokens_BT", tokens_BT)
        if tokens_BT.shape[1] < 1:
            raise ValueError("tokens_BT has 0 positions: must be at least 1")
        check_vocabulary(tokens_BT, self.config.vocab_size)


def _layer_weights(weights: dict[str, Any], unit: str, place: int, start: dict[str, int], count: int) -> tuple[dict, Any]:
    """What the scan's steps need for the unit's layer number `place`: every len(unit)-th block, and likewise its FFN."""
    letter = unit[place]
    places = {"A": (place, len(unit)), letter: (unit[:place].count(letter), unit.count(letter))}

    def rows(tree: Any, stack: str) -> Any:
        offset, stride = places[stack]
        first = start[stack] + offset
        whole = first == 0 and stride == 1
        return jax.tree.map(lambda w: w if whole and w.shape[0] == count else w[first : first + count * stride : stride], tree)

    return {name: rows(weights[name], "A") for name in "AWK"}, rows(weights[letter], letter)


def _dense(config: DecoderConfig) -> Any:
    """The FFN of a dense layer: an expert's, without shared experts and gates."""
    return dataclasses.replace(config.moe.expert, shared_dim=0, shared_gate=False, dropout=0.0)
