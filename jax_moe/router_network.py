"""A router that is a network, and may read the state of the router of the mixture before it (ZAYA1)."""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_moe.config.moe import MoEConfig
from jax_moe.dims import Array, DTypeLike, Float, wide
from jax_moe.initializers import rounded, uniform
from jax_moe.norms import rms_norm
from jax_moe.parameters import parameter


class RouterNetwork(nnx.Module):
    """The maps of such a router, in turn: `down` [D, I], `first` [I, I] and `second` [I, I] with biases, `out` [I, E]
    without; `norm` [I] before `first`, and, where the router takes a state, `state_scale` [I]. I is `network_dim`.
    """

    def __init__(
        self, config: MoEConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer | None = None,
    ):
        init = rounded(kernel_init or jax.nn.initializers.lecun_normal())
        self.eps, self.in_fp32 = config.router.network_norm_eps, config.router.dtype == "float32"
        D, E, width = config.model_dim, config.num_experts, config.router.network_dim
        sizes = {"down": (D, width), "first": (width, width), "second": (width, width), "out": (width, E)}
        dims = {"down": "D I", "first": "I O", "second": "O I", "out": "I E"}
        for name, shape in sizes.items():
            setattr(self, name, parameter(init(rngs.params(), shape, param_dtype), dims[name], "router"))
            if name != "out":
                bias = uniform(shape[0] ** -0.5)(rngs.params(), (width,), param_dtype)
                setattr(self, f"{name}_bias", parameter(bias, dims[name].split()[1], "router"))
        self.norm = parameter(jnp.ones((width,), param_dtype), "I", "router")
        if config.router.takes_state:
            self.state_scale = parameter(jnp.ones((width,), param_dtype), "I", "router")

    def __call__(
        self, x_BTD: Float[Array, "B T D"], state_BTI: Float[Array, "B T I"] | None
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B T I"]]:
        """The logits, in fp32 or wider, and the state for the router of the next mixture, in the input's dtype.

        Computed in fp32 or wider, or in the input's dtype, as the contract says. Without a state nothing is added to
        what `down` answers.
        """
        compute = wide(x_BTD.dtype) if self.in_fp32 else x_BTD.dtype

        def mapped(name: str, h: Array) -> Array:
            h = jnp.einsum("BTI,IO->BTO", h, getattr(self, name)[...].astype(compute))
            return h if name == "out" else h + getattr(self, f"{name}_bias")[...].astype(compute)

        h_BTI = mapped("down", x_BTD.astype(compute))
        if state_BTI is not None:
            h_BTI += state_BTI.astype(compute) * self.state_scale[...].astype(compute)
        state_BTI, h_BTI = h_BTI.astype(x_BTD.dtype), rms_norm(h_BTI, self.norm[...], self.eps)
        for name in ("first", "second"):
            h_BTI = jax.nn.gelu(mapped(name, h_BTI), approximate=False)
        return mapped("out", h_BTI).astype(wide(x_BTD.dtype)), state_BTI
