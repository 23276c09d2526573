"""Which convention differs: known conventions are tried on our module, alone and in pairs, against another answer."""

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
from moe_parity.explanation.conventions import Convention, changed, conventions_of
from moe_parity.relative import relative_error
from moe_parity.sides.jax_moe import beside_vectors
from moe_parity.stages import Place, Trace

# An error of at most this is rounding, by dtype: ten times the error measured between correct frameworks.
EXPLAINED = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 0.05}
MOST_PAIRS = 400
QUICK = {"xla_backend_optimization_level": 0}  # each program runs once or twice: most of the time is compilation


class Answer(NamedTuple):
    """The output of a side and, if known, its (pooled) balance loss."""

    output: np.ndarray
    balance_loss: float | None = None


@dataclass(frozen=True)
class Explanation:
    """How far our answer under these conventions is from the other side's; no conventions means as configured."""

    conventions: tuple[str, ...]
    error: float  # max |ours - theirs| / max |theirs|: the larger of the output's and the balance loss's
    explained: float  # an error of at most this is rounding

    @property
    def matches(self) -> bool:
        """Whether the other side follows these conventions."""
        return self.error <= self.explained

    def __str__(self) -> str:
        return " and ".join(self.conventions) or "as configured"


def explain(
    layer: nnx.Module, theirs: Any, x: Any, *, tolerance: float | None = None, pairs: bool = True,
    candidates: Sequence[Convention] | None = None, **arrays: Any,
) -> list[Explanation]:
    """Every convention tried, the best first; among those that match, single conventions come before pairs.

    `layer` is our MoE, Decoder, MakeMoE or any module that contains one of them. It is called with x (and `arrays`) and
    returns an output or (output, MoEStats). `theirs` is the other side's output, an `Answer`, or a function of x that
    returns either. Pairs are tried if no single convention is within `tolerance` (default: `EXPLAINED` by the output's
    dtype). `candidates` are the conventions to try; None means `conventions_of(layer)`.
    Raises ValueError if the outputs differ in shape, which no convention explains.
    """
    answer = _answer_of(theirs(x) if callable(theirs) else theirs)
    x, arrays = jnp.asarray(x), {name: jnp.asarray(value) for name, value in arrays.items()}
    base = our_answer(layer, x, arrays)
    if base.output.shape != answer.output.shape:
        ours, theirs = base.output.shape, answer.output.shape
        raise ValueError(f"theirs: the output has shape {theirs}: must be {ours}, as our layer's")
    limit = EXPLAINED[_dtype(base.output)] if tolerance is None else tolerance
    tried = [Explanation((), distance(base, answer), limit)]
    if tried[0].matches:
        return tried
    telling = []  # the conventions that change the answer on these inputs: no other can explain a difference
    for convention in conventions_of(layer) if candidates is None else candidates:
        ours = our_answer(changed(layer, convention), x, arrays)
        if distance(ours, base) > 0:
            tried.append(Explanation((convention.name,), distance(ours, answer), limit))
            telling.append((convention, tried[-1].error))
    if pairs and not any(explanation.matches for explanation in tried):
        for first, second in likely_pairs(telling):
            ours = our_answer(changed(layer, first, second), x, arrays)
            tried.append(Explanation((first.name, second.name), distance(ours, answer), limit))
            if tried[-1].matches:
                break
    return sorted(tried, key=_rank)


def _rank(each: Explanation) -> tuple[bool, int, float]:
    """Errors that are surely rounding rank alike, in the order tried: which is smaller differs between machines."""
    return not each.matches, len(each.conventions) if each.matches else 0, max(each.error, each.explained / 10)


def likely_pairs(telling: Sequence[tuple[Convention, float]]) -> list[tuple[Convention, Convention]]:
    """At most MOST_PAIRS pairs of different groups; pairs whose members came nearest alone are first."""
    ranked = [convention for convention, _ in sorted(telling, key=lambda pair: pair[1])]
    pairs = [
        (i + j, a, b) for (i, a), (j, b) in itertools.combinations(enumerate(ranked), 2) if a.group != b.group
    ]
    return [(a, b) for _, a, b in sorted(pairs, key=lambda pair: pair[0])[:MOST_PAIRS]]


def in_words(tried: Sequence[Explanation]) -> str:
    """As "matches if router.renormalise='sum' (error 3.0e-07; as configured 0.41)", or with the nearest convention."""
    configured = next(each.error for each in tried if not each.conventions)
    found = [each for each in tried if each.matches]
    if found and not found[0].conventions:
        return f"matches as configured (error {configured:.2g})"
    if found:
        names = " or if ".join(map(str, found))
        return f"matches if {names} (error {found[0].error:.2g}; as configured {configured:.2g})"
    nearest = next((each for each in tried if each.conventions), None)
    near = "" if nearest is None else f"; nearest: {nearest} (error {nearest.error:.2g})"
    return f"no known convention and no pair of them explains it{near}; as configured {configured:.2g}"


def explain_traces(module: nnx.Module, x: np.ndarray, theirs: Trace) -> str:
    """`in_words` for a trace of the microscope, which holds logits or a combined output and perhaps a balance loss."""
    output = theirs[Place("logits")] if Place("logits") in theirs else theirs[Place("combined")]
    balance = theirs.get(Place("balance_loss"))
    config: Any = getattr(module, "config", None)
    arrays: dict[str, Any] = {**beside_vectors(config, jnp.asarray(x))}
    return in_words(explain(module, Answer(output, None if balance is None else float(balance)), x, **arrays))


def our_answer(module: nnx.Module, x: Array, arrays: Mapping[str, Array]) -> Answer:
    """The answer of our module, without noise and dropout."""
    graphdef, state = nnx.split(module)
    output, balance = _call(graphdef, state, x, dict(arrays))
    return Answer(np.asarray(output), None if balance is None else float(balance))


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _call(graphdef: Any, state: Any, x: Array, arrays: dict[str, Array]) -> tuple[Array, Array | None]:
    module: Any = nnx.merge(graphdef, state)
    if isinstance(module, Decoder | MakeMoE):
        kwargs: Any = arrays
        found = module.run(x, **kwargs)
        return found.logits_BTV, pool_balance_loss(found.stats, module.config.moe)
    answer = module(x, **arrays)
    output, stats = answer if isinstance(answer, tuple) else (answer, None)
    return output, stats.load_balance_loss.mean() if isinstance(stats, MoEStats) else None


def distance(ours: Answer, theirs: Answer) -> float:
    """The larger relative error of output and balance loss; infinite if a value is not finite."""
    pairs = [(ours.output, theirs.output)]
    if ours.balance_loss is not None and theirs.balance_loss is not None:
        pairs.append((np.asarray(ours.balance_loss), np.asarray(theirs.balance_loss)))
    return max(relative_error(a, b) for a, b in pairs)


def _answer_of(theirs: Any) -> Answer:
    output, balance = theirs if isinstance(theirs, tuple) else (theirs, None)
    output = np.asarray(output.detach() if hasattr(output, "detach") else output)
    return Answer(output, None if balance is None else float(balance))


def _dtype(output: np.ndarray) -> str:
    return str(output.dtype) if str(output.dtype) in EXPLAINED else "float32"
