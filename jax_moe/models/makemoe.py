"""The makeMoE character language model (AviSoori1x/makeMoE), its layers stacked and scanned."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.arrays import check_choices, check_vocabulary, checked, checked_input, dims_of_settings
from jax_moe.config.models import MakeMoEConfig
from jax_moe.dims import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray
from jax_moe.initializers import rounded, uniform
from jax_moe.models.block import Block
from jax_moe.models.stack import Layer, LayerPlan, ModelOutput, walk
from jax_moe.norms import layer_norm
from jax_moe.parameters import declare, stacked
from jax_moe.remat import Remat
from jax_moe.shapes import dims_of
from jax_moe.sharding.explicit import auto_inside


class Randomness(NamedTuple):
    """The draws of every layer, given as arrays in place of a key; None: not drawn."""

    noise_BTE: Float[Array, "L B T E"] | None = None  # unit Gaussians for the router
    jitter_BTD: Float[Array, "L B T D"] | None = None  # factors on the router's input
    keep_BTKD: Bool[Array, "L B T K D"] | None = None  # True where dropout lets an expert's answer through
    attention_keep_BHTU: Bool[Array, "L B H T U"] | None = None
    output_keep_BTD: Bool[Array, "L B T D"] | None = None  # of attention's answer


@rounded
def kaiming_normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """N(0, 2 / fan_in) with fan_in the second last dim, each expert on its own (torch's kaiming_normal_)."""
    return jax.random.normal(key, shape, dtype) * jnp.asarray((2 / shape[-2]) ** 0.5, dtype)


class MakeMoE(nnx.Module):
    """Token and position embeddings, blocks, a final norm and a head. Parameters of `blocks` have a leading L."""

    def __init__(
        self, config: MakeMoEConfig | None = None, *, rngs: nnx.Rngs | None = None, param_dtype: DTypeLike = jnp.float32
    ):
        self.config = config = MakeMoEConfig() if config is None else config
        rngs = rngs or nnx.Rngs(0)
        normal = rounded(jax.nn.initializers.normal(1.0))
        embed: dict[str, Any] = {"embedding_init": normal, "param_dtype": param_dtype, "rngs": rngs}
        D, V = config.model_dim, config.vocab_size
        self.token_embedding = declare(nnx.Embed(V, D, **embed), "embedding", embedding="V D")
        self.position_embedding = declare(nnx.Embed(config.block_size, D, **embed), "embedding", embedding="U D")
        make = lambda rngs: Block(  # noqa: E731
            config.block, rngs=rngs, param_dtype=param_dtype, kernel_init=kaiming_normal
        )
        self.blocks = stacked(make, rngs, config.num_layers, "L")
        self.final_norm = layer_norm(config.model_dim, rngs, param_dtype)
        head = nnx.Linear(
            D, V, kernel_init=kaiming_normal, bias_init=uniform(D**-0.5), param_dtype=param_dtype, rngs=rngs
        )
        self.head = declare(head, "head", kernel="D V", bias="V")

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        key: PRNGKeyArray | None = None,
        training: bool = True,
        mask_BT: Bool[Array, "B T"] | None = None,
        randomness: Randomness | None = None,
        expert_LBTK: Int[Array, "L B T K"] | None = None,
        capacity_limit: Int[Array, ""] | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "B T V"]:
        """Logits; arguments as in `run`."""
        return self.run(
            tokens_BT, key=key, training=training, mask_BT=mask_BT, randomness=randomness, expert_LBTK=expert_LBTK,
            capacity_limit=capacity_limit, remat=remat,
        ).logits_BTV

    @auto_inside("tokens_BT", "logits_BTV", "expert_LBTK")
    def run(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        key: PRNGKeyArray | None = None,
        training: bool = True,
        mask_BT: Bool[Array, "B T"] | None = None,
        randomness: Randomness | None = None,
        expert_LBTK: Int[Array, "L B T K"] | None = None,
        capacity_limit: Int[Array, ""] | None = None,
        remat: Remat = "none",
        watch: bool = False,
    ) -> ModelOutput:
        """All that a call computes: logits of the next character, and of every layer (leading L) statistics and
        choices.

        Without a key deterministic; with one the contract's noise and, when training, dropout. `randomness` gives the
        draws instead, each with a leading L; `expert_LBTK` replays choices. `remat`: what each layer keeps for a
        gradient. `watch` also hands out every intermediate stage. Raises ValueError for T above block_size, a token
        outside the vocabulary, an expert that is not there, or an array of another kind or shape.
        """
        self.check_tokens(tokens_BT)
        if expert_LBTK is not None:
            check_choices("expert_LBTK", expert_LBTK, self.config.num_experts, mask_BT)
        sizes = dims_of("tokens_BT", tokens_BT.shape)
        sizes |= {"U": sizes["T"], **dims_of_settings(
            self.config, L="num_layers", H="num_heads", D="model_dim", E="num_experts", K="top_k"
        )}
        given = checked(sizes, mask_BT=mask_BT, expert_LBTK=expert_LBTK)
        mask_BT = given.get("mask_BT")
        draws = {} if randomness is None else checked(sizes, "L", **randomness._asdict())
        # not by calling nnx.Embed: it answers in the dtype it was made in, whatever dtype its weights were cast to
        tokens_VD, positions_TD = self.token_embedding.embedding[...], self.position_embedding.embedding[...]
        x_BTD = jnp.take(tokens_VD, tokens_BT, axis=0) + jnp.take(positions_TD, jnp.arange(tokens_BT.shape[1]), axis=0)
        graphdef, weights = nnx.split(self.blocks)
        keys = None if key is None else jax.random.split(key, self.config.num_layers)
        stacks = {"blocks": weights, "key": keys, "draws": draws, "replay": given.get("expert_LBTK")}

        def step(x_BTD: Array, memory: None, layer: Layer) -> tuple[Array, None, dict[str, Any]]:
            rows, block = layer.rows, nnx.merge(graphdef, layer.rows["blocks"])
            output = block.run(
                x_BTD, key=rows["key"], training=training, mask_BT=mask_BT, expert_BTK=rows["replay"],
                capacity_limit=capacity_limit, watch=watch, **rows["draws"],
            )
            found = {"stats": output.stats, "expert_LBTK": output.expert_BTK, **(output.stages or {})}
            return output.y_BTD, None, found

        plans = [LayerPlan(self.config.block, tuple(stacks))] * self.config.num_layers
        y_BTD, _, found = walk(step, plans, stacks, x_BTD, remat=remat)
        stats, chosen_LBTK = found.pop("stats"), found.pop("expert_LBTK")
        normed_BTD = self.final_norm(y_BTD).astype(y_BTD.dtype)
        stages = {"embedding": x_BTD, **found, "final_norm": normed_BTD} if watch else None
        return ModelOutput(self.head(normed_BTD), stats, chosen_LBTK, stages)

    def check_tokens(self, tokens_BT: Int[Array, "B T"] | Int[np.ndarray, "B T"]) -> None:
        """Raises ValueError for what is no array of integers [B, T], a sequence that is too long or, outside jit, a
        token that is not in the vocabulary."""
        config = self.config
        checked_input("tokens_BT", tokens_BT)
        if not 1 <= tokens_BT.shape[1] <= config.block_size:
            raise ValueError(
                f"tokens_BT has {tokens_BT.shape[1]} positions: must be 1 to block_size={config.block_size}"
            )
        check_vocabulary(tokens_BT, config.vocab_size)
