"""One decoder for the Hugging Face mixture-of-experts families; a family is a `DecoderConfig` and a table of names.

Layers are stacked and scanned. Where mixtures and dense layers alternate, the shortest repeated unit of layers is
the scan's step, so that compile time does not grow with depth.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.decoder_config import DecoderConfig
from jax_moe.dims import Array, Bool, Float, Int, PRNGKeyArray
from jax_moe.dropout import fold
from jax_moe.experts import Experts, expert_ffn
from jax_moe.grouped_attention import GroupedAttention, RMSNorm, visible_positions
from jax_moe.losses import MoEStats
from jax_moe.moe import MoE
from jax_moe.rope import rotations


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
    """

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32,
        kernel_init: nnx.Initializer | None = None,
    ):
        self.config = config
        init = kernel_init or jax.nn.initializers.normal(0.02)
        kwargs: dict[str, Any] = {"param_dtype": param_dtype, "kernel_init": init}
        shape = (config.vocab_size, config.model_dim)
        self.embedding = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.blocks = nnx.vmap(lambda rngs: Attend(config, rngs=rngs, **kwargs))(rngs.split(config.num_layers))
        self.moe = nnx.vmap(lambda rngs: MoE(config.moe, rngs=rngs, **kwargs))(rngs.split(len(config.moe_layers)))
        if config.dense_layers:
            dense = (1, config.model_dim, config.dense_dim, _dense(config))
            make = nnx.vmap(lambda rngs: Experts(*dense, rngs=rngs, **kwargs))
            self.dense = make(rngs.split(len(config.dense_layers)))
        self.final_norm = RMSNorm(config.model_dim, config.norm_eps, param_dtype)
        if not config.tied_embeddings:
            self.head = nnx.Param(init(rngs.params(), shape[::-1], param_dtype))

    def __call__(self, tokens_BT: Int[Array, "B T"], **kwargs: object) -> Float[Array, "B T V"]:
        """Logits; arguments as in `logits_and_stats`."""
        return self.logits_and_stats(tokens_BT, **kwargs)[0]  # type: ignore[arg-type]

    def logits_and_stats(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        key: PRNGKeyArray | None = None,
        training: bool = True,
        mask_BT: Bool[Array, "B T"] | None = None,
        position_BT: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], MoEStats]:
        """Logits in the weights' dtype, and the statistics of the mixtures (leading count of those layers).

        Without a key deterministic; with one and `training` the contract's dropout and jitter. `mask_BT` is False at
        padding, left or right; logits there mean nothing. Positions count from 0 with the padding, unless given.
        Raises ValueError for a token outside the vocabulary.
        """
        logits_BTV, (stats, _) = self._run(tokens_BT, key, training, mask_BT, position_BT)
        return logits_BTV, stats

    def chosen_experts(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        mask_BT: Bool[Array, "B T"] | None = None,
        position_BT: Int[Array, "B T"] | None = None,
    ) -> Int[Array, "L B T K"]:
        """The experts every mixture sends every token to, best first, as in a call without a key."""
        return self._run(tokens_BT, None, False, mask_BT, position_BT)[1][1]

    def _run(
        self, tokens_BT: Array, key: Array | None, training: bool, mask_BT: Array | None, position_BT: Array | None
    ) -> tuple[Array, tuple[MoEStats, Array]]:
        self.check_tokens(tokens_BT)
        config = self.config
        x_BTD = jnp.take(self.embedding[...], tokens_BT, axis=0)
        if config.embedding_multiplier != 1:
            x_BTD = x_BTD * config.embedding_multiplier
        if position_BT is None:
            position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        turns = rotations(position_BT, config.rope, config.head_dim, x_BTD.dtype)
        x_BTD, reports = self._layers(x_BTD, key, training, mask_BT, turns)
        x_BTD = self.final_norm(x_BTD)
        if config.tied_embeddings:
            logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, self.embedding[...].astype(x_BTD.dtype))
        else:
            logits_BTV = x_BTD @ self.head[...].astype(x_BTD.dtype)
        return logits_BTV / config.logits_divisor if config.logits_divisor != 1 else logits_BTV, reports

    def _layers(
        self, x_BTD: Array, key: Array | None, training: bool, mask_BT: Array | None, turns: tuple[Array, Array]
    ) -> tuple[Array, tuple[MoEStats, Array]]:
        """All layers: one scan for every run of a repeated unit of dense layers (D) and mixtures (M)."""
        config = self.config
        stacks = {"A": self.blocks, "M": self.moe} | ({"D": self.dense} if config.dense_layers else {})
        graphs, weights = {}, {}
        for letter, stack in stacks.items():
            graphs[letter], weights[letter] = nnx.split(stack)
        windows = [config.sliding_window if i in config.sliding_layers else 2**30 for i in range(config.num_layers)]
        weights["W"] = None if config.sliding_window is None else jnp.asarray(windows, jnp.int32)  # type: ignore[assignment]
        weights["K"] = None if key is None else jax.random.split(key, config.num_layers)

        def step(x_BTD: Array, scanned: tuple) -> tuple[Array, Any]:
            reports = []
            for letter, layer, ffn in scanned[1:]:
                block = nnx.merge(graphs["A"], layer["A"])
                visible = visible_positions(x_BTD.shape[1], layer["W"], mask_BT)
                keys = [None, None] if layer["K"] is None else [fold(layer["K"], 0), fold(layer["K"], 1)]
                y_BTD = block.attention(block.attention_norm(x_BTD), turns, visible, keys[0] if training else None)
                x_BTD = self._add(x_BTD, y_BTD)
                x_BTD, report = self._ffn(x_BTD, block.ffn_norm, nnx.merge(graphs[letter], ffn), keys[1], training, mask_BT)
                reports += [] if report is None else [report]
            return x_BTD, jax.tree.map(lambda *each: jnp.stack(each), *reports) if reports else None

        kinds = "".join("D" if i in config.dense_layers else "M" for i in range(config.num_layers))
        start = dict.fromkeys("ADM", 0)
        collected = []
        for unit, count in repeated_units(kinds):
            x_BTD, reports = self._scan_run(step, x_BTD, unit, count, weights, start)
            if reports is not None:
                collected.append(jax.tree.map(lambda each: each.reshape(-1, *each.shape[2:]), reports))
        return x_BTD, jax.tree.map(lambda *each: jnp.concatenate(each), *collected)

    def _scan_run(self, step: Any, x_BTD: Array, unit: str, count: int, weights: dict, start: dict) -> tuple[Array, Any]:
        """`count` times the layers of `unit`, from the layers that `start` (advanced) says on."""
        parts = []
        for letter in unit:
            at = dict(start)
            strides = {"A": len(unit), letter: unit.count(letter)}

            def rows(tree: Any, name: str, at: dict = at, strides: dict = strides) -> Any:
                first, stride = at[name], strides[name]
                return jax.tree.map(lambda w: w if _whole(w, first, stride, count) else w[first : first + count * stride : stride], tree)

            layer = {"A": rows(weights["A"], "A"), "W": rows(weights["W"], "A"), "K": rows(weights["K"], "A")}
            parts.append((layer, rows(weights[letter], letter)))
            start["A"] += 1
            start[letter] += 1

        def body(x_BTD: Array, scanned: list) -> tuple[Array, Any]:
            return step(x_BTD, (None, *((letter, *part) for letter, part in zip(unit, scanned, strict=True))))

        for letter in "ADM":
            used = len(unit) if letter == "A" else unit.count(letter)
            start[letter] += (count - 1) * used
        return jax.lax.scan(body, x_BTD, parts)

    def _add(self, x_BTD: Array, y_BTD: Array) -> Array:
        multiplier = self.config.residual_multiplier
        return x_BTD + (y_BTD if multiplier == 1 else y_BTD * multiplier)

    def _ffn(
        self, x_BTD: Array, norm: RMSNorm, ffn: MoE | Experts, key: Array | None, training: bool, mask_BT: Array | None
    ) -> tuple[Array, tuple[MoEStats, Array] | None]:
        normed_BTD = norm(x_BTD)
        if isinstance(ffn, Experts):
            flat = normed_BTD.reshape(1, -1, normed_BTD.shape[-1])
            return self._add(x_BTD, expert_ffn(flat, ffn.weights(), _dense(self.config)).reshape(x_BTD.shape)), None
        y_BTD, stats = ffn(normed_BTD, key=key, training=training, mask_BT=mask_BT)
        # the same computation as inside the call; compiled, it is done once, and not at all where nobody asks
        expert_BTK = ffn.routing(normed_BTD, mask_BT=mask_BT)[1].expert_GSK.reshape(*x_BTD.shape[:2], -1)
        return self._add(x_BTD, y_BTD), (stats, expert_BTK)

    def check_tokens(self, tokens_BT: Int[Array, "B T"]) -> None:
        """Raises ValueError for an empty text or, outside jit, a token that is not in the vocabulary."""
        if tokens_BT.shape[1] < 1:
            raise ValueError("tokens_BT has 0 positions: must be at least 1")
        if not isinstance(tokens_BT, jax.core.Tracer) and tokens_BT.size:
            values, vocab_size = np.asarray(tokens_BT), self.config.vocab_size
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"token {bad}: must be 0 to {vocab_size - 1} (vocab_size={vocab_size})")


def _whole(weight: Array, first: int, stride: int, count: int) -> bool:
    return first == 0 and stride == 1 and weight.shape[0] == count


def _dense(config: DecoderConfig) -> Any:
    """The FFN of a dense layer: an expert's, without shared experts and gates."""
    return dataclasses.replace(config.moe.expert, shared_dim=0, shared_gate=False, dropout=0.0)
