"""The conventions on which implementations differ, each as a change of our module.

A convention changes the contract or rearranges the weights. Its name is what a user would look for.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.attention.grouped import GroupedAttention
from jax_moe.attention.multihead import Attention
from jax_moe.config.moe import Activation, ClusterFill, ClusterScore, Order, Priority, Renormalise, Score
from jax_moe.dims import Array
from jax_moe.models.decoder import Decoder
from jax_moe.moe import MoE
from jax_moe.norms import RMSNorm
from jax_moe.parameters import of_variable
from jax_moe.stored import stored_variables

MOE_FIELDS: dict[str, tuple] = {
    # not "floor": it is "sum" unless a sum is below its eps
    "router.renormalise": tuple(name for name in get_args(Renormalise) if name != "floor"),
    "router.order": get_args(Order),
    "router.score": get_args(Score),
    "router.scale": (1.0,),
    "router.cluster_score": get_args(ClusterScore),
    "router.cluster_fill": get_args(ClusterFill),
    "expert.activation": get_args(Activation),
    "expert.weight_on": ("output", "input"),
    "expert.up_offset": (0.0, 1.0),
    "capacity.rounding": ("floor", "ceil"),
    "capacity.priority": get_args(Priority),
    "capacity.renormalise_after_drop": (False, True),
    "capacity.counts_top_k": (False, True),
    "capacity.group": ("batch", "sequence"),
    "balance.f_sums_to": ("one", "k"),
    "balance.pooled": ("per_layer", "over_layers"),
    "balance.counted_in": ("batch", "group"),
}
NORM_EPS = (1e-5, 1e-6, 1e-8, 1e-12)
ROPE_THETAS = (1e4, 5e5, 1e6)
ROPE_FACTORS = (2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Convention:
    """A change that `apply` makes in place. Of the conventions of a `group`, only one can be applied at a time."""

    name: str
    group: str
    apply: Callable[[nnx.Module], None]


def changed(module: nnx.Module, *conventions: Convention) -> nnx.Module:
    """A copy of the module under other conventions."""
    copy = nnx.clone(module)
    for convention in conventions:
        convention.apply(copy)
    return copy


def conventions_of(module: nnx.Module) -> list[Convention]:
    """The conventions that the module's contract allows."""
    kinds = {type(part) for _, part in nnx.iter_modules(module)}
    candidates: list[Convention] = []
    if MoE in kinds:
        candidates += [*moe_fields(module), *expert_weights()]
    if kinds & {RMSNorm, nnx.LayerNorm}:
        candidates += [Convention(f"norm_eps={eps:g}", "norm_eps", partial(_norm_eps, eps)) for eps in NORM_EPS]
    if GroupedAttention in kinds:
        candidates += [*rotary(), *_scores(_multiplier)]
    if Attention in kinds:
        candidates += [*_scores(_scale)]
    return [convention for convention in candidates if _allowed(module, convention)]


def _allowed(module: nnx.Module, convention: Convention) -> bool:
    try:
        changed(module, convention)
    except (ValueError, AttributeError):  # the contract does not allow the value, or has no such part
        return False
    return True


def moe_fields(module: nnx.Module) -> Iterator[Convention]:
    """A convention for every other value of the contract's fields."""
    config = _parts(module, MoE)[0].config
    for path, values in MOE_FIELDS.items():
        part, name = path.split(".")
        holder = getattr(config, part)
        for value in values:
            if holder is not None and getattr(holder, name) != value:
                yield Convention(f"{path}={value!r}", path, partial(_moe_field, part, name, value))


def _moe_field(part: str, name: str, value: object, module: nnx.Module) -> None:
    def replaced(config: Any) -> Any:
        return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{name: value})})

    for layer in _parts(module, MoE):
        layer.config = replaced(layer.config)
    for decoder in _found(module, Decoder):  # its pooled balance loss reads the decoder's config
        decoder.config = decoder.config.with_moe(replaced(decoder.config.moe))


def expert_weights() -> Iterator[Convention]:
    """Other layouts of the stored weights; only a square weight can be transposed."""
    yield Convention("gate and up exchanged", "gate/up", partial(_gate_and_up, lambda gate, up: (up, gate)))
    yield Convention("gate and up interleaved, read as halves", "gate/up", partial(_gate_and_up, _deinterleaved))
    yield Convention("gate and up in halves, read as interleaved", "gate/up", partial(_gate_and_up, _interleaved))
    for names in (("up",), ("down",), ("gate",), ("up", "gate"), ("up", "down"), ("up", "down", "gate")):
        words = ", ".join(names)
        yield Convention(f"{words} of the experts transposed", "transposed", partial(_transposed, "experts", names))
    yield Convention("router kernel transposed", "router transposed", partial(_transposed, "router", ("kernel",)))
    yield Convention("ties to the higher expert index", "ties", _experts_reversed)


def _gate_and_up(rearranged: Callable, module: nnx.Module) -> None:
    for layer in _parts(module, MoE):
        experts = layer.experts
        experts.gate[...], experts.up[...] = rearranged(experts.gate[...], experts.up[...])
        if hasattr(experts, "gate_bias"):
            experts.gate_bias[...], experts.up_bias[...] = rearranged(experts.gate_bias[...], experts.up_bias[...])


def _deinterleaved(gate: Array, up: Array) -> tuple[Array, Array]:
    fused = jnp.concatenate([gate, up], axis=-1)
    return fused[..., ::2], fused[..., 1::2]


def _interleaved(gate: Array, up: Array) -> tuple[Array, Array]:
    first, second = jnp.split(jnp.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1), 2, axis=-1)
    return first, second


def _transposed(part: str, names: Sequence[str], module: nnx.Module) -> None:
    for layer in _parts(module, MoE):
        for name in names:
            weight = getattr(getattr(layer, part), name)
            if weight.shape[-1] != weight.shape[-2]:
                raise ValueError(f"{name} is not square")
            weight[...] = weight[...].swapaxes(-1, -2)


def _experts_reversed(module: nnx.Module) -> None:
    """Reverses the order of the experts, which changes nothing but the winner of a tie."""
    for layer in _parts(module, MoE):
        for value in (*stored_variables(layer.experts).values(), *stored_variables(layer.router).values()):
            value[...] = jnp.flip(value[...], of_variable(value).letters.index("E"))


def _norm_eps(eps: float, module: nnx.Module) -> None:
    for norm in _found(module, RMSNorm):
        norm.eps = eps
    for norm in _found(module, nnx.LayerNorm):
        norm.epsilon = eps


def _scores(apply: Callable[[str, nnx.Module], None]) -> Iterator[Convention]:
    """The factor that q.k is multiplied by."""
    for power in ("head_dim", "model_dim"):
        yield Convention(f"attention scaled by {power}**-0.5", "attention scale", partial(apply, power))


def _multiplier(power: str, module: nnx.Module) -> None:
    for decoder in _parts(module, Decoder):
        decoder.config = decoder.config.with_attention(multiplier=getattr(decoder.config.attention, power) ** -0.5)


def _scale(power: str, module: nnx.Module) -> None:
    for attention in _parts(module, Attention):
        attention.config = dataclasses.replace(attention.config, scale=power)


def rotary() -> Iterator[Convention]:
    """Rotary embeddings: which entries form a pair, and the frequencies."""
    for name, inverse in (
        ("rope rotates interleaved pairs, not halves", False),
        ("rope rotates halves of weights made for interleaved pairs", True),
    ):
        yield Convention(name, "rope pairs", partial(_paired_anew, inverse))
    yield Convention("rope.kind='default'", "rope kind", partial(_rope, {"kind": "default"}))
    for factor in ROPE_FACTORS:
        change = {"kind": "linear", "factor": factor}
        yield Convention(f"rope.kind='linear' with factor={factor:g}", "rope kind", partial(_rope, change))
    for theta in ROPE_THETAS:
        yield Convention(f"rope.theta={theta:g}", "rope theta", partial(_rope, {"theta": theta}))


def _rope(change: Mapping[str, Any], module: nnx.Module) -> None:
    for decoder in _parts(module, Decoder):
        decoder.config = decoder.config.with_attention(rope=dataclasses.replace(decoder.config.rope, **change))


def _paired_anew(inverse: bool, module: nnx.Module) -> None:
    """Rotating pairs (2i, 2i + 1) equals rotating halves of a head whose entries are reordered, even entries first."""
    for attention in _parts(module, GroupedAttention):
        width = attention.config.head_dim
        order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
        order = np.argsort(order) if inverse else order
        for name in ("query", "key", "query_bias", "key_bias"):
            if hasattr(attention, name):
                getattr(attention, name)[...] = getattr(attention, name)[...][..., order]
        for name in ("query_norm", "key_norm"):
            if hasattr(attention, name):
                scale = getattr(attention, name).scale
                heads = scale[...].reshape(*scale.shape[:-1], -1, width)
                scale[...] = heads[..., order].reshape(scale.shape)


def _found(module: nnx.Module, kind: type) -> list[Any]:
    return [part for _, part in nnx.iter_modules(module) if isinstance(part, kind)]


def _parts(module: nnx.Module, kind: type) -> list[Any]:
    """As `_found`. Raises AttributeError if there is none."""
    found = _found(module, kind)
    if not found:
        raise AttributeError(f"{type(module).__name__} has no {kind.__name__}")
    return found
