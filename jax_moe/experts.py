"""The feed-forward network over all experts at once: weights stacked as [E, D, F] and [E, F, D]."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jax_moe.activations import activate, clamp_above, soft_cap
from jax_moe.config.moe import ExpertConfig, MoEConfig
from jax_moe.config.parameters import Role
from jax_moe.dims import Array, DTypeLike, Float, Int, wide
from jax_moe.initializers import rounded, uniform
from jax_moe.norms import mixture_norm
from jax_moe.parameters import parameter

Weights = Mapping[str, Array]
DIMS = {"up": "D F", "gate": "D F", "down": "F D"}  # of an expert's matrices; a bias has the last of them


def hidden_units(
    up_ECF: Float[Array, "E C F"], gate_ECF: Float[Array, "E C F"] | None, config: ExpertConfig
) -> Float[Array, "E C F"]:
    """act(up), or act(gate) * (up + offset), up and gate (or its activation) clamped where the contract says so."""
    if gate_ECF is None:
        return activate(config.activation, up_ECF)
    if config.gate_softcap is not None or config.up_softcap is not None:
        return _soft_units(up_ECF, gate_ECF, config)
    if config.clamp is not None:
        up_ECF = -clamp_above(-clamp_above(up_ECF, config.clamp), config.clamp)
    if config.clamp is not None and config.clamp_on == "gate":
        gate_ECF = clamp_above(gate_ECF, config.clamp)
    gate_ECF = activate(config.activation, gate_ECF)
    if config.clamp is not None and config.clamp_on == "activation":
        gate_ECF = clamp_above(gate_ECF, config.clamp)
    return gate_ECF * (up_ECF + config.up_offset)


def _soft_units(up_ECF: Array, gate_ECF: Array, config: ExpertConfig) -> Array:
    """The same with soft bounds, in fp32 or wider: the sigmoid sees the gate as it is."""
    up, gate = up_ECF.astype(wide(up_ECF.dtype)), gate_ECF.astype(wide(up_ECF.dtype))
    if config.up_softcap is not None:
        up = soft_cap(up, config.up_softcap)
    if config.gate_softcap is None:
        open_ECF = activate(config.activation, gate)
    else:
        open_ECF = soft_cap(gate, config.gate_softcap) * jax.nn.sigmoid(gate)
    return (open_ECF * (up + config.up_offset)).astype(up_ECF.dtype)


def expert_ffn(x_ECD: Float[Array, "E C D"], weights: Weights, config: ExpertConfig) -> Float[Array, "E C D"]:
    """Every expert's answer. Weights: up, down, [gate], [up_bias, gate_bias, down_bias], [answer_scale], each with
    leading E.

    Barriers keep each product's input computed once: the TPU compiler would otherwise recompute the activation inside
    every tile of the products around it (docs/performance.md).
    """

    def linear(pattern: str, x: Array, name: str) -> Array:
        y = jnp.einsum(pattern, x, weights[name].astype(x.dtype))
        return y + weights[f"{name}_bias"].astype(x.dtype)[:, None, :] if config.bias else y

    up_ECF = linear("ECD,EDF->ECF", x_ECD, "up")
    gate_ECF = linear("ECD,EDF->ECF", x_ECD, "gate") if config.gated else None
    up_ECF, gate_ECF = jax.lax.optimization_barrier((up_ECF, gate_ECF))
    hidden_ECF = jax.lax.optimization_barrier(hidden_units(up_ECF, gate_ECF, config))
    return answer(linear("ECF,EFD->ECD", hidden_ECF, "down"), weights, config)


def answer(y: Float[Array, "*any D"], weights: Weights, config: ExpertConfig, at: Array | None = None) -> Array:
    """What an expert says, normed where the contract says so; y is [E, C, D], or `at` is the expert of each row."""
    if config.answer_norm == "none":
        return y
    scale = weights["answer_scale"]
    return mixture_norm(config.answer_norm, y, scale[:, None] if at is None else scale[at], config.answer_norm_eps)


def take_experts(weights: Weights, expert_E: Int[Array, " e"] | None) -> Weights:
    """The weights of these experts, in this order; None: of all experts."""
    return weights if expert_E is None else {name: value[expert_E] for name, value in weights.items()}


class Experts(nnx.Module):
    """E feed-forward networks. Parameters `up`, `gate` [E, D, F], `down` [E, F, D], with biases `*_bias`, and the
    scale [D] of the norm of all their answers.

    With the role `shared` no router chooses among them: `leading` is 1, or Y where it weighs them.
    """

    def __init__(
        self, num_experts: int, model_dim: int, expert_dim: int, config: ExpertConfig, *, rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32, kernel_init: nnx.Initializer | None = None, role: Role = "expert",
        leading: str = "E",
    ):
        # batch_axis: without it the initializer would count E as part of each expert's fan-in
        fan_in = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
        init = rounded(kernel_init or fan_in)
        shapes = {"up": (model_dim, expert_dim), "down": (expert_dim, model_dim)}
        if config.gated:
            shapes["gate"] = (model_dim, expert_dim)
        for name, (rows, columns) in sorted(shapes.items()):
            kernel = init(rngs.params(), (num_experts, rows, columns), param_dtype)
            setattr(self, name, parameter(kernel, f"{leading} {DIMS[name]}", role))
            if config.bias:
                # torch.nn.Linear's own: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
                bias = uniform(rows**-0.5)(rngs.params(), (num_experts, columns), param_dtype)
                setattr(self, f"{name}_bias", parameter(bias, f"{leading} {DIMS[name][-1]}", role))

        if config.answer_norm != "none":
            scale = jnp.full((model_dim,), float(config.answer_norm in ("rms", "rms_wide")), param_dtype)
            self.answer_scale = parameter(scale, "D", "norm")

    def weights(self) -> Weights:
        """The parameters as plain arrays, each with leading E."""
        found = {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Param)}
        if "answer_scale" in found:
            scale_D = found["answer_scale"]
            found["answer_scale"] = jnp.broadcast_to(scale_D, (found["up"].shape[0], *scale_D.shape))
        return found


def make_experts(config: MoEConfig, **kwargs: object) -> Experts:
    """The routed experts of a layer."""
    sizes = config.num_networks, config.inner_dim, config.expert_dim
    return Experts(*sizes, config.expert, **kwargs)  # type: ignore[arg-type]
