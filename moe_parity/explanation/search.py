"""Which convention differs: the known ones tried on our module, one by one and in pairs, against the other side's answer."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.dims import Array
from jax_moe.losses import MoEStats, pool_balance_loss
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE
from jax_moe.moe import MoE
from moe_parity.explanation.conventions import Convention, changed, conventions_of
from moe_parity.stages import Place, Trace

# Explained: no farther apart than this share of the largest value, ten times what correct frameworks were measured apart.
EXPLAINED = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 0.05}
MOST_PAIRS = 400
QUICK = {"xla_backend_optimization_level": 0}  # each program runs once or twice: compiling takes the time


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
