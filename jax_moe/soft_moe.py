"""Soft MoE: every slot reads a mix of all tokens, every token reads a mix of all slots."""

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from jax_moe.activations import activate
from jax_moe.arrays import checked, checked_input
from jax_moe.config.moe import SoftMoEConfig
from jax_moe.dims import Array, Bool, DTypeLike, Float, wide
from jax_moe.initializers import rounded
from jax_moe.norms import layer_norm
from jax_moe.parameters import declare, parameter, stacked

UNIT_EPS = 1e-6  # added to a squared length under the root, as in V-MoE's soft router: a zero vector stays zero


def unit(x: Float[Array, "*any"], axis: int) -> Float[Array, "*any"]:
    """Vectors along `axis` scaled to length 1: x / sqrt(sum x^2 + 1e-6)."""
    return x * jax.lax.rsqrt((x * x).sum(axis=axis, keepdims=True) + UNIT_EPS)


def soft_weights(
    x_BTD: Float[Array, "B T D"], phi_DEC: Float[Array, "D E C"], mask_BT: Bool[Array, "B T"] | None = None,
    scale: Float[Array, ""] | None = None,
) -> tuple[Float[Array, "B T E C"], Float[Array, "B T E C"]]:
    """Dispatch weights (softmax over tokens) and combine weights (softmax over all slots) of x phi, fp32 or wider.

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
    if mask_BT is not None:
        logits_BTEC = jnp.where(mask_BT[..., None, None], logits_BTEC, -jnp.finfo(compute).max)
    combine_BTEC = jax.nn.softmax(logits_BTEC, axis=(2, 3))
    return jax.nn.softmax(logits_BTEC, axis=1), combine_BTEC


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
        self, x_BTD: Float[Array, "B T D"], mask_BT: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """The layer's answer in the input's dtype. Padding (mask_BT False) feeds no slot; its own answer is the plain
        mean of the slots and means nothing. Raises ValueError for an array of another kind or shape."""
        x_BTD, sizes = checked_input("x_BTD", x_BTD, self.config.model_dim)
        mask_BT = checked(sizes, mask_BT=mask_BT).get("mask_BT")
        scale = self.scale[...] if self.config.normalise else None
        dispatch_BTEC, combine_BTEC = soft_weights(x_BTD, self.phi[...], mask_BT, scale)
        compute = dispatch_BTEC.dtype
        x_EBCD = jnp.einsum("BTEC,BTD->EBCD", dispatch_BTEC, x_BTD.astype(compute)).astype(x_BTD.dtype)
        graphdef, weights = nnx.split(self.experts)
        y_EBCD = jax.vmap(lambda weights, x_BCD: nnx.merge(graphdef, weights)(x_BCD))(weights, x_EBCD)
        return jnp.einsum("BTEC,EBCD->BTD", combine_BTEC, y_EBCD.astype(compute)).astype(x_BTD.dtype)
