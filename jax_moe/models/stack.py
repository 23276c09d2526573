"""The one walk through a model's layers: repeated units are scanned, caches handed along, and values handed out.

Training, prefill, decode and the microscope differ only in what they ask of it.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_moe.dims import Array, Float, Int
from jax_moe.losses import MoEStats
from jax_moe.remat import Remat, rematerialised
from jax_moe.sharding.inside import as_batch, together


class ModelOutput(NamedTuple):
    """What one call of a model computes; L counts the layers with a mixture."""

    logits_BTV: Float[Array, "B T V"]  # in the weights' dtype
    stats: MoEStats  # each field with a leading L
    expert_LBTK: Int[Array, "L B T K"]  # the experts every token was sent to, best first
    # every intermediate value by name, if asked for; a layer's with a leading dim
    stages: dict[str, Array] | None = None


class LayerPlan(NamedTuple):
    """What a layer is and which stacks it has a row in. Equal neighbours are scanned together."""

    contract: Hashable
    stacks: tuple[str, ...]


class Layer(NamedTuple):
    """A layer as its step sees it: its rows of the stacks, and which rows these are."""

    plan: LayerPlan
    rows: Mapping[str, Any]
    numbers: Mapping[str, Array]


Step = Callable[[Array, Any, Layer], tuple[Array, Any, dict[str, Any]]]


def repeated_units(kinds: Sequence[Hashable]) -> list[tuple[Sequence[Hashable], int]]:
    """`kinds` as (unit, repeats) runs, each the one that covers most from where the last ended.

    >>> repeated_units("DMMDMDM")
    [('D', 1), ('M', 2), ('DM', 2)]
    """
    runs, start = [], 0
    while start < len(kinds):
        best = (kinds[start : start + 1], 1)
        for size in range(1, (len(kinds) - start) // 2 + 1):
            unit, count = kinds[start : start + size], 1
            while kinds[start + count * size : start + (count + 1) * size] == unit:
                count += 1
            if count > 1 and size * count > len(best[0]) * best[1]:
                best = (unit, count)
        runs.append(best)
        start += len(best[0]) * best[1]
    return runs


def walk(
    step: Step, plans: Sequence[LayerPlan], stacks: Mapping[str, Any], x: Array, memory: Any = None, *,
    remat: Remat = "none",
    in_place: bool = False,
) -> tuple[Array, Any, dict[str, Any]]:
    """The last layer's x, the memory after it, and what the steps handed out by name: each with a leading dim, in
    layer order.

    `step(x, memory, layer)` is traced once for every layer of a repeated unit. `stacks` are trees whose leading dim
    counts the layers that have a row there. Rows are slices that a gradient flows through; `in_place` they are read
    from the whole stack when they are needed, which copies nothing but has no fast gradient. `remat`: what each unit
    keeps for a gradient.
    """
    x = as_batch(x)
    kinds = {plan: number for number, plan in enumerate(dict.fromkeys(plans))}
    first, start = 0, Counter[str]()
    handed_out: dict[str, list] = {}
    for unit, count in repeated_units([kinds[plan] for plan in plans]):
        layers = plans[first : first + len(unit)]
        body = _unit_step(step, layers, None if not in_place else stacks, Counter(start))
        per_unit = _rows_in(layers)
        rows = None if in_place else {name: _rows(stacks[name], start[name], count, n) for name, n in per_unit.items()}
        (x, memory), found = jax.lax.scan(rematerialised(body, remat), (x, memory), (jnp.arange(count), rows))
        for name, value in found.items():
            flat = jax.tree.map(lambda each: each.reshape(each.shape[0] * each.shape[1], *each.shape[2:]), value)
            handed_out.setdefault(name, []).append(flat)
        first += len(unit) * count
        start.update({name: n * count for name, n in per_unit.items()})
    return x, memory, {
        name: jax.tree.map(lambda *each: jnp.concatenate(each), *parts) for name, parts in handed_out.items()
    }


def _unit_step(
    step: Step, layers: Sequence[LayerPlan], whole: Mapping[str, Any] | None, start: Counter[str]
) -> Callable:
    """The scan's step over one unit; `whole` are the stacks to read from where no rows come with the scan."""
    per_unit = _rows_in(layers)

    def run(carry: tuple[Array, Any], scanned: tuple[Array, Any]) -> tuple[tuple[Array, Any], dict[str, Any]]:
        (x, memory), (i, rows) = carry, scanned
        before = Counter[str]()
        handed_out: dict[str, list] = {}
        for plan in layers:
            numbers = {name: start[name] + i * per_unit[name] + before[name] for name in plan.stacks}
            if whole is None:
                own = {name: _row(rows[name], before[name], per_unit[name]) for name in plan.stacks}
            else:
                own = {name: row_at(whole[name], numbers[name]) for name in plan.stacks}
            x, memory, found = step(x, memory, Layer(plan, together(own), numbers))
            x = as_batch(x)
            for name, value in found.items():
                handed_out.setdefault(name, []).append(value)
            before.update(plan.stacks)
        return (x, memory), {
            name: jax.tree.map(lambda *each: jnp.stack(each), *found) for name, found in handed_out.items()
        }

    return run


def row_at(stack: Any, number: Array) -> Any:
    """One layer's row of a stack."""
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, number, keepdims=False), stack)


def _rows_in(layers: Sequence[LayerPlan]) -> Counter[str]:
    return Counter(name for plan in layers for name in plan.stacks)


def _rows(stack: Any, first: int, count: int, per_unit: int) -> Any:
    """What a scan of `count` units reads: [count, ...], or [count, per_unit, ...] where a unit has several rows."""
    def of(w: Array) -> Array:
        w = w if first == 0 and w.shape[0] == count * per_unit else w[first : first + count * per_unit]
        return w if per_unit == 1 else w.reshape(count, per_unit, *w.shape[1:])

    return jax.tree.map(of, stack)


def _row(rows: Any, place: int, per_unit: int) -> Any:
    return rows if per_unit == 1 else jax.tree.map(lambda w: w[place], rows)
