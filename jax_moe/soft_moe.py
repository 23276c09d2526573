"""Soft MoE: every slot reads a mix of all tokens, every token reads a mix of all slots."""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_moe.activations import activate
from jax_moe.arrays import checked, checked_input
from jax_moe.config.moe import SoftMoEConfig
from jax_moe.dims import Array, Bool, DTypeLike, Float, PRNGKeyArray, wide
from jax_moe.initializers import rounded
from jax_moe.losses import MoEStats, masked_mean, router_entropy, router_probs, squared_cv
from jax_moe.norms import layer_norm
from jax_moe.parameters import declare, parameter, stacked
from jax_moe.sharding.explicit import auto_inside

UNIT_EPS = 1e-6  # added to a squared length under the root, as in V-MoE's soft router: a zero vector stays zero


def unit(x: Float[Array, "*any"], axis: int) -> Float[Array, "*any"]:
    """Vectors along `axis` scaled to length 1: x / sqrt(sum x^2 + 1e-6)."""
    return x * jax.lax.rsqrt((x * x).sum(axis=axis, keepdims=True) + UNIT_EPS)


def soft_logits(
    x_BTD: Float[Array, "B T D"], phi_DEC: Float[Array, "D E C"], mask_BT: Bool[Array, "B T"] | None = None,
    scale: Float[Array, ""] | None = None,
) -> Float[Array, "B T E C"]:
    """x phi in fp32 or wider.

    Logits at padding are the most negative finite number, not -inf, so that a sequence of only padding stays finite:
    its slots read the plain mean of the tokens. C counts slots per expert. With a `scale`, tokens and columns of phi
    are scaled to unit length for the logits, which are multiplied by it (section 2.3); the slots mix the unscaled
    tokens.
    """
    compute = wide(x_BTD.dtype)
    router_BTD, phi_DEC = x_BTD.astype(compute), phi_DEC.astype(compute)
    if scale is not None:
        router_BTD, phi_DEC = unit(router_BTD, axis=2), scale.astype(compute) * unit(phi_DEC, axis=0)
    logits_BTEC = jnp.einsum("BTD,DEC->BTEC", router_BTD, phi_DEC)
    if mask_BT is None:
        return logits_BTEC
    return jnp.where(mask_BT[..., None, None], logits_BTEC, -jnp.finfo(compute).max)


def soft_weights(logits_BTEC: Float[Array, "B T E C"]) -> tuple[Float[Array, "B T E C"], Float[Array, "B T E C"]]:
    """Dispatch weights (softmax over tokens) and combine weights (softmax over all slots)."""
    combine_BTEC = jax.nn.softmax(logits_BTEC, axis=(2, 3))
    return jax.nn.softmax(logits_BTEC, axis=1), combine_BTEC


def soft_stats(logits_BTEC: Float[Array, "B T E C"], mask_BT: Bool[Array, "B T"] | None = None) -> MoEStats:
    """Statistics of the real tokens' combine weights, which are summed over the slots of each expert.

    Where a sparse layer counts choices, `expert_load_E` is the mean of these weights and equals `router_prob_E`; both
    squared CVs are of it, and `router_entropy` is the weights'. Nothing is dropped and there is no loss: these are 0.
    """
    logits_BTE = jax.nn.logsumexp(logits_BTEC, axis=3)  # their softmax sums the combine weights of each expert
    load_E = masked_mean(router_probs(logits_BTE), mask_BT)
    none, cv2 = jnp.zeros((), load_E.dtype), squared_cv(load_E)
    return MoEStats(
        load_balance_loss=none, router_z_loss=none, dropped_fraction=none, expert_load_E=load_E,
        router_entropy=router_entropy(logits_BTE, mask_BT), router_prob_E=load_E, importance_cv2=cv2, load_cv2=cv2,
        balance_load_E=load_E,
    )


class SoftMoEOutput(NamedTuple):
    """What one call of a layer computes."""

    y_BTD: Float[Array, "B T D"]
    stats: MoEStats
    stages: dict[str, Array] | None = None  # every intermediate value by name, where asked for
    expert_BTK: None = None  # no choices: every token goes to every expert


orthogonal = rounded(jax.nn.initializers.orthogonal(scale=0.01))


class SoftExpert(nnx.Module):
    """An MLP of any depth: linear, [layer norm], activation; with a residual where input and output widths agree."""

    def __init__(self, config: SoftMoEConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32):
        self.config = config
        widths, init = config.widths, orthogonal
        linears = [
            declare(
                nnx.Linear(rows, columns, kernel_init=init, param_dtype=param_dtype, rngs=rngs),
                "soft_expert", kernel="I O", bias="O",
            )
            for rows, columns in pairwise(widths)
        ]
        self.fcs, self.last_fc = nnx.List(linears[:-1]), linears[-1]
        if config.layer_norm:
            self.layer_norms = nnx.List([layer_norm(width, rngs, param_dtype, dim="O") for width in widths[1:-1]])
        if config.output_layer_norm:
            self.last_ln = layer_norm(widths[-1], rngs, param_dtype, dim="O")

    def __call__(self, x: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
        """The MLP's answer, in the input's dtype."""
        config = self.config
        for i, fc in enumerate(self.fcs):
            h = fc(x)
            if config.layer_norm:
                h = self.layer_norms[i](h)
            h = activate(config.hidden_activation, h).astype(x.dtype)
            x = x + h if config.residual and x.shape == h.shape else h
        y = self.last_fc(x)
        if config.output_layer_norm:
            y = self.last_ln(y)
        y = activate(config.output_activation, y).astype(x.dtype)
        return x + y if config.residual and x.shape == y.shape else y


class SoftMoE(nnx.Module):
    """Soft MoE (arXiv 2308.00951, eq. 1-3): parameters `phi` [D, E, C] ~ N(0, 1), `experts`, stacked over E, and
    where the contract normalises `scale` [], 1 at first.

    The input is any sequence of vectors, not only images. It mixes positions: `BlockConfig` refuses it in a causal
    block.
    """

    def __init__(self, config: SoftMoEConfig, *, rngs: nnx.Rngs | None = None, param_dtype: DTypeLike = jnp.float32):
        self.config = config
        rngs = rngs or nnx.Rngs(0)
        shape = (config.model_dim, config.num_experts, config.num_slots)
        self.phi = parameter(rounded(jax.random.normal)(rngs.params(), shape, param_dtype), "D E C", "router")
        if config.normalise:
            self.scale = parameter(jnp.ones((), param_dtype), "", "gate")
        make = lambda rngs: SoftExpert(config, rngs=rngs, param_dtype=param_dtype)  # noqa: E731
        self.experts = stacked(make, rngs, config.num_experts, "E")

    def __call__(
        self, x_BTD: Float[Array, "B T D"], *, key: PRNGKeyArray | None = None, training: bool = True,
        mask_BT: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MoEStats]:
        """The layer's answer in the input's dtype, and its statistics (`soft_stats`). It draws nothing.

        Padding (mask_BT False) feeds no slot and counts in no statistic; its own answer is the plain mean of the slots
        and means nothing. Raises ValueError for an array of another kind or shape.
        """
        output = self.run(x_BTD, key=key, training=training, mask_BT=mask_BT)
        return output.y_BTD, output.stats

    @auto_inside("x_BTD", "y_BTD")
    def run(
        self, x_BTD: Float[Array, "B T D"], *, key: PRNGKeyArray | None = None, training: bool = True,
        mask_BT: Bool[Array, "B T"] | None = None, watch: bool = False,
    ) -> SoftMoEOutput:
        """All that a call computes. Arguments as in a call; `watch` also hands out every stage."""
        x_BTD, sizes = checked_input("x_BTD", x_BTD, self.config.model_dim)
        mask_BT = checked(sizes, mask_BT=mask_BT).get("mask_BT")
        if mask_BT is not None:  # 0 * NaN would still be NaN
            x_BTD = jnp.where(mask_BT[..., None], x_BTD, 0)
        scale = self.scale[...] if self.config.normalise else None
        logits_BTEC = soft_logits(x_BTD, self.phi[...], mask_BT, scale)
        dispatch_BTEC, combine_BTEC = soft_weights(logits_BTEC)
        compute = dispatch_BTEC.dtype
        x_EBCD = jnp.einsum("BTEC,BTD->EBCD", dispatch_BTEC, x_BTD.astype(compute)).astype(x_BTD.dtype)
        graphdef, weights = nnx.split(self.experts)
        y_EBCD = jax.vmap(lambda weights, x_BCD: nnx.merge(graphdef, weights)(x_BCD))(weights, x_EBCD)
        y_BTD = jnp.einsum("BTEC,EBCD->BTD", combine_BTEC, y_EBCD.astype(compute)).astype(x_BTD.dtype)
        stages = {
            "dispatch_weights": dispatch_BTEC, "combine_weights": combine_BTEC, "slot_inputs": x_EBCD,
            "expert_outputs": y_EBCD, "combined": y_BTD,
        }
        return SoftMoEOutput(y_BTD, soft_stats(logits_BTEC, mask_BT), stages if watch else None)
