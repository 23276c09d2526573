"""Which convention differs: the known ones tried on our module, one by one and in pairs, against the other side's answer.

A convention is a change of the contract or a rearrangement of the weights, under the name a user would look for.
Longer than most files: one place to read all that is tried.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.attention import Attention
from jax_moe.config import Activation, ClusterFill, ClusterScore, Order, Priority, Renormalise, Score
from jax_moe.dims import Array
from jax_moe.grouped_attention import GroupedAttention, RMSNorm
from jax_moe.losses import MoEStats, pool_balance_loss
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE
from jax_moe.moe import MoE
from moe_parity.stages import Place, Trace

# Explained: no farther apart than this share of the largest value, ten times what correct frameworks were measured apart.
EXPLAINED = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 0.05}
MOST_PAIRS = 400
QUICK = {"xla_backend_optimization_level": 0}  # each program runs once or twice: compiling takes the time

MOE_FIELDS: dict[str, tuple] = {
    "router.renormalise": get_args(Renormalise),
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


class Answer(NamedTuple):
    """What one side computes: its output and, if it is known, its (pooled) balance loss."""

    output: np.ndarray
    balance_loss: float | None = None


@dataclass(frozen=True)
class Explanation:
    """Our answer under these conventions against theirs; no conventions: as configured."""

    conventions: tuple[str, ...]
    error: float  # max |ours - theirs| / max |theirs|, of the output or of the balance loss, whichever is worse
    explained: float  # an error of at most this is rounding

    @property
    def matches(self) -> bool:
        """Whether this is what the other side does."""
        return self.error <= self.explained

    def __str__(self) -> str:
        return " and ".join(self.conventions) or "as configured"


@dataclass(frozen=True)
class Convention:
    """One change: `apply` makes it in place; `group` holds those of which only one can be made at a time."""

    name: str
    group: str
    apply: Callable[[nnx.Module], None]


def explain(
    layer: nnx.Module, theirs: Any, x: Any, *, tolerance: float | None = None, pairs: bool = True,
    candidates: Sequence[Convention] | None = None, **arrays: Any,
) -> list[Explanation]:
    """Every convention tried, the best first; a single one comes before pairs that are as good.

    `layer` is our MoE, Decoder, MakeMoE or any module with those inside, called with x (and `arrays`) and returning an
    output or (output, MoEStats). `theirs` is the other side's output, an `Answer`, or a function of x that returns one.
    Pairs are tried where no single convention is within `tolerance` (default: `EXPLAINED` by the output's dtype).
    `candidates`: what to try, of `conventions_of(layer)`; None: all of it.
    Raises ValueError where the outputs' shapes differ: no convention explains that.
    """
    answer = _answer_of(theirs(x) if callable(theirs) else theirs)
    x, arrays = jnp.asarray(x), {name: jnp.asarray(value) for name, value in arrays.items()}
    base = our_answer(layer, x, arrays)
    if base.output.shape != answer.output.shape:
        raise ValueError(f"their output has shape {answer.output.shape}: must be {base.output.shape}, as ours")
    limit = EXPLAINED[_dtype(base.output)] if tolerance is None else tolerance
    tried = [Explanation((), distance(base, answer), limit)]
    if tried[0].matches:
        return tried
    telling = []  # a convention that changes nothing on these inputs explains nothing, alone or with another
    for convention in conventions_of(layer) if candidates is None else candidates:
        ours = our_answer(changed(layer, convention), x, arrays)
        if distance(ours, base) > 0:
            tried.append(Explanation((convention.name,), distance(ours, answer), limit))
            telling.append((convention, tried[-1].error))
    if pairs and not any(one.matches for one in tried):
        for first, second in likely_pairs(telling):
            ours = our_answer(changed(layer, first, second), x, arrays)
            tried.append(Explanation((first.name, second.name), distance(ours, answer), limit))
            if tried[-1].matches:
                break
    return sorted(tried, key=lambda one: (not one.matches, len(one.conventions) if one.matches else 0, one.error))


def likely_pairs(telling: Sequence[tuple[Convention, float]]) -> list[tuple[Convention, Convention]]:
    """Pairs of different groups, those first whose members came nearest alone; at most MOST_PAIRS."""
    ranked = sorted(telling, key=lambda one: one[1])
    pairs = [(i + j, a, b) for (i, (a, _)), (j, (b, _)) in itertools.combinations(enumerate(ranked), 2) if a.group != b.group]
    return [(a, b) for _, a, b in sorted(pairs, key=lambda one: one[0])[:MOST_PAIRS]]


def in_words(tried: Sequence[Explanation]) -> str:
    """One line: "matches if router.renormalise='sum' (error 3.0e-07; as configured 0.41)", or what came nearest."""
    configured = next(one.error for one in tried if not one.conventions)
    found = [one for one in tried if one.matches]
    if found and not found[0].conventions:
        return f"matches as configured (error {configured:.2g})"
    if found:
        return f"matches if {' or if '.join(map(str, found))} (error {found[0].error:.2g}; as configured {configured:.2g})"
    nearest = next((one for one in tried if one.conventions), None)
    near = "" if nearest is None else f"; nearest: {nearest} (error {nearest.error:.2g})"
    return f"no known convention and no pair of them explains it{near}; as configured {configured:.2g}"


def explain_traces(module: nnx.Module, x: np.ndarray, theirs: Trace) -> str:
    """`in_words` for a run of the microscope: `theirs` holds their logits or combined answer and, perhaps, balance loss."""
    output = theirs[Place("logits")] if Place("logits") in theirs else theirs[Place("combined")]
    balance = theirs.get(Place("balance_loss"))
    return in_words(explain(module, Answer(output, None if balance is None else float(balance)), x))


def our_answer(module: nnx.Module, x: Array, arrays: Mapping[str, Array]) -> Answer:
    """Our side, deterministic."""
    graphdef, state = nnx.split(module)
    output, balance = _call(graphdef, state, x, dict(arrays))
    return Answer(np.asarray(output), None if balance is None else float(balance))


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _call(graphdef: Any, state: Any, x: Array, arrays: dict[str, Array]) -> tuple[Array, Array | None]:
    module: Any = nnx.merge(graphdef, state)
    if isinstance(module, Decoder | MakeMoE):
        kwargs: Any = arrays
        output, stats = module.logits_and_stats(x, training=False, **kwargs)
        return output, pool_balance_loss(stats, module.config.moe)
    answer = module(x, training=False, **arrays) if isinstance(module, MoE) else module(x, **arrays)
    output, stats = answer if isinstance(answer, tuple) else (answer, None)
    return output, stats.load_balance_loss.mean() if isinstance(stats, MoEStats) else None


def distance(ours: Answer, theirs: Answer) -> float:
    """The worst relative error; infinite where a value is not finite."""
    apart = [_relative(ours.output, theirs.output)]
    if ours.balance_loss is not None and theirs.balance_loss is not None:
        apart.append(_relative(np.asarray(ours.balance_loss), np.asarray(theirs.balance_loss)))
    return max(apart)


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    difference, scale = np.abs(ours - theirs).max(initial=0), np.abs(theirs).max(initial=0)
    return 0.0 if difference == 0 else float(difference / scale) if scale > 0 else float("inf")


def _answer_of(theirs: Any) -> Answer:
    output, balance = theirs if isinstance(theirs, tuple) else (theirs, None)
    output = np.asarray(output.detach() if hasattr(output, "detach") else output)
    return Answer(output, None if balance is None else float(balance))


def _dtype(output: np.ndarray) -> str:
    return str(output.dtype) if str(output.dtype) in EXPLAINED else "float32"


# --- the conventions


def changed(module: nnx.Module, *conventions: Convention) -> nnx.Module:
    """A copy under other conventions."""
    copy = nnx.clone(module)
    for convention in conventions:
        convention.apply(copy)
    return copy


def conventions_of(module: nnx.Module) -> list[Convention]:
    """Those that the module's contract allows."""
    kinds = {type(part) for _, part in nnx.iter_modules(module)}
    candidates: list[Convention] = []
    if MoE in kinds:
        candidates += [*moe_fields(module), *expert_weights()]
    if kinds & {RMSNorm, nnx.LayerNorm}:
        candidates += [Convention(f"norm_eps={eps:g}", "norm_eps", partial(_norm_eps, eps)) for eps in NORM_EPS]
    if GroupedAttention in kinds:
        candidates += [*rotary(), *_scores("attention_multiplier", GroupedAttention)]
    if Attention in kinds:
        candidates += [*_scores("scale", Attention)]
    return [one for one in candidates if _allowed(module, one)]


def _allowed(module: nnx.Module, convention: Convention) -> bool:
    try:
        changed(module, convention)
    except (ValueError, AttributeError):  # the contract refuses the value, or has no such part
        return False
    return True


def moe_fields(module: nnx.Module) -> Iterator[Convention]:
    """Other values of the contract's fields."""
    config = next(_parts(module, MoE)).config
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
    if isinstance(module, Decoder):  # its pooled balance loss reads the decoder's own
        module.config = dataclasses.replace(module.config, moe=replaced(module.config.moe))


def expert_weights() -> Iterator[Convention]:
    """Weights that lie otherwise than they were read; a transposed one is only possible where it is square."""
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
    """The same layer with its experts in reverse order: nothing changes but who wins a tie."""
    for layer in _parts(module, MoE):
        stacked = layer.router.kernel.ndim - 2
        for part, axis in ((layer.experts, stacked), (layer.router, -1)):
            for value in vars(part).values():
                if isinstance(value, nnx.Variable):
                    value[...] = jnp.flip(value[...], axis)


def _norm_eps(eps: float, module: nnx.Module) -> None:
    norms = [*_parts(module, RMSNorm), *_parts(module, nnx.LayerNorm)]
    for norm in norms:
        setattr(norm, "eps" if isinstance(norm, RMSNorm) else "epsilon", eps)


def _scores(name: str, kind: type) -> Iterator[Convention]:
    """What q.k is multiplied with."""

    def apply(power: str, module: nnx.Module) -> None:
        for attention in _parts(module, kind):
            config, width = attention.config, getattr(attention.config, power)
            value = power if name == "scale" else width**-0.5
            attention.config = dataclasses.replace(config, **{name: value})

    for power in ("head_dim", "model_dim"):
        yield Convention(f"attention scaled by {power}**-0.5", "attention scale", partial(apply, power))


def rotary() -> Iterator[Convention]:
    """Rotary embeddings: which entries form a pair, and the frequencies."""
    yield Convention("rope turns interleaved pairs, not halves", "rope pairs", partial(_repaired, False))
    yield Convention("rope turns halves of weights made for interleaved pairs", "rope pairs", partial(_repaired, True))
    yield Convention("rope.kind='default'", "rope kind", partial(_rope, {"kind": "default"}))
    for factor in ROPE_FACTORS:
        change = {"kind": "linear", "factor": factor}
        yield Convention(f"rope.kind='linear' with factor={factor:g}", "rope kind", partial(_rope, change))
    for theta in ROPE_THETAS:
        yield Convention(f"rope.theta={theta:g}", "rope theta", partial(_rope, {"theta": theta}))


def _rope(change: Mapping[str, Any], module: nnx.Module) -> None:
    assert isinstance(module, Decoder)
    module.config = dataclasses.replace(module.config, rope=dataclasses.replace(module.config.rope, **change))


def _repaired(inverse: bool, module: nnx.Module) -> None:
    """Turning pairs (2i, 2i + 1) is turning halves of a head whose entries were put even ones first."""
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


def _parts(module: nnx.Module, kind: type) -> Iterator[Any]:
    found = [part for _, part in nnx.iter_modules(module) if isinstance(part, kind)]
    if not found:
        raise AttributeError(f"{type(module).__name__} has no {kind.__name__}")
    return iter(found)
