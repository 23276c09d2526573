"""The columns of the parity table. Each measures an error of a case and raises MismatchError if it is too large.

Tolerances: exact, or the smaller of the project's limit and ten times the worst error measured in that column
(`measured.json`). `FLOOR_ULPS` rounding errors are always allowed, as other machines sum in other orders.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

import jax_moe
from jax_moe import kernels
from jax_moe.config.attention import AttentionConfig
from jax_moe.config.models import BlockConfig, MakeMoEConfig
from jax_moe.config.moe import MoEConfig
from parity_tests.shared.compare import MismatchError, check_close, check_exact, check_names
from parity_tests.table.adamw_steps import STEPS, jax_trajectory, torch_trajectory
from parity_tests.table.cases import Case, kind_of_dispatch, kind_of_layer, kind_of_program, stands_for
from parity_tests.table.sides import Outcome, Pair, jax_module, make_pair, precision, torch_module

MEASURED = Path(__file__).with_name("measured.json")
FLOOR_ULPS = 16
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7}


class Runs:
    """The outcomes of a case, computed when a column first needs them."""

    def __init__(self, case: Case):
        self.case = case

    @functools.cached_property
    def float64(self) -> Pair:
        return make_pair(self.case, "float64")

    @functools.cached_property
    def float32(self) -> Pair:
        return make_pair(self.case, "float32")

    @functools.cached_property
    def bfloat16(self) -> Pair:
        return make_pair(self.case, "bfloat16", rounded=True)

    @functools.cached_property
    def truth(self) -> Outcome:
        """The outcome in fp64 on inputs and weights that bf16 can represent."""
        return make_pair(self.case, "float64", rounded=True).torch_outcome


@dataclass(frozen=True)
class Column:
    """A check. `measure` takes the runs and the tolerance, raises above it and returns the error.

    The tests check the rows that `stands` names; `make table` measures every row.
    """

    name: str
    dtype: str
    limit: float  # the project's limit; 0: exact
    measure: Callable[[Runs, float], float]
    inapplicable: Callable[[Case], str | None]  # why a case has no such cell
    stands: Callable[[Any], bool] = lambda case: True

    def is_run(self, case: Case) -> bool:
        """Whether tests run the cell of that row."""
        return self.stands(case) and self.inapplicable(case) is None

    @property
    def tolerance(self) -> float:
        """The smaller of the limit and ten times the worst measured error."""
        if self.limit == 0:
            return 0.0
        floor = FLOOR_ULPS * EPSILON[self.dtype]
        return min(self.limit, max(10 * worst_measured(self.name), floor))


@functools.cache
def measured() -> dict:
    """The errors last measured: {"cells", "families", "runs": {case: {column: error or reason}}, versions, date}."""
    return json.loads(MEASURED.read_text()) if MEASURED.exists() else {"cells": {}}


def worst_measured(column: str) -> float:
    """The column's worst error over all cases; infinite before the first measurement."""
    rows = [row for part in ("cells", "families", "runs") for row in measured().get(part, {}).values()]
    errors = [row[column] for row in rows if isinstance(row.get(column), float)]
    return max(errors, default=float("inf"))


def check_row(runs: Any, columns: Sequence[Column]) -> None:
    """Raises an error that names every failing column of the case."""
    red = []
    for column in columns:
        if column.is_run(runs.case):
            try:
                column.measure(runs, column.tolerance)
            except MismatchError as error:
                red.append(f"{column.name}: {error}")
    if red:
        raise MismatchError("\n".join(red))


def check_measured(part: str, names: Iterable[str], columns: Sequence[Column]) -> None:
    """Raises unless that part of `measured` has these rows with all these columns, none above its limit."""
    rows = measured()[part]
    check_names(rows, dict.fromkeys(names), f"{part} of measured.json")
    for name, row in rows.items():
        check_names(row, {column.name: column for column in columns}, f"columns of {name}")
        for column in columns:
            error = row[column.name]
            if not isinstance(error, str) and not error <= column.limit:
                raise MismatchError(f"{name}: {column.name} was measured as {error:.3g} (limit {column.limit:.3g})")


def always(case: Case) -> None:
    """None: every case has this cell."""


def needs_layer(case: Case) -> str | None:
    if isinstance(case.config, BlockConfig | MakeMoEConfig) and case.moe is not None:
        return "routed inside: see the load under statistics"
    return needs_mixture(case) or (None if case.moe is not None else "Soft MoE chooses no experts")


def needs_mixture(case: Case) -> str | None:
    return "attention routes nothing" if isinstance(case.config, AttentionConfig) else None


def needs_sparse_layer(case: Case) -> str | None:
    return None if isinstance(case.config, MoEConfig) else "dispatchers belong to the sparse layer"


def needs_vectors(case: Case) -> str | None:
    return "tokens are integers" if isinstance(case.config, MakeMoEConfig) else None


def compared(part: str, dtype: str, limit: float, what: str, inapplicable: Callable[[Case], str | None]) -> Column:
    """A column: a part of the outcome, JAX against PyTorch in a dtype."""

    def measure(runs: Runs, tolerance: float) -> float:
        pair: Pair = getattr(runs, dtype)
        ours, theirs = getattr(pair.jax_outcome, part), getattr(pair.torch_outcome, part)
        where = f"{runs.case.name}: {what}"
        return check_exact(ours, theirs, where) if limit == 0 else check_close(ours, theirs, tolerance, where)

    return Column(what, dtype, limit, measure, inapplicable)


def everything(outcome: Outcome) -> dict[str, np.ndarray]:
    """Outputs and gradients in a single collection."""
    gradients = outcome.parameter_gradients | {f"{name} (input)": x for name, x in outcome.input_gradient.items()}
    return gradients | {f"{name} (losses)": x for name, x in outcome.loss_gradients.items()}


def float32_forward(runs: Runs, tolerance: float) -> float:
    """Choices exact; outputs and statistics close."""
    pair, where = runs.float32, f"{runs.case.name}: fp32 forward"
    check_exact(pair.jax_outcome.choices, pair.torch_outcome.choices, where)
    error = check_close(pair.jax_outcome.forward, pair.torch_outcome.forward, tolerance, where)
    return max(error, check_close(pair.jax_outcome.statistics, pair.torch_outcome.statistics, tolerance, where))


def float32_gradients(runs: Runs, tolerance: float) -> float:
    """All gradients together."""
    pair = runs.float32
    ours, theirs = everything(pair.jax_outcome), everything(pair.torch_outcome)
    return check_close(ours, theirs, tolerance, f"{runs.case.name}: fp32 gradients")


def bfloat16_forward(runs: Runs, tolerance: float) -> float:
    """Both frameworks against the truth, with the same choices."""
    errors = []
    for side, outcome in (("jax", runs.bfloat16.jax_outcome), ("torch", runs.bfloat16.torch_outcome)):
        where = f"{runs.case.name}: bf16 forward, {side}"
        check_exact(outcome.choices, runs.truth.choices, where)
        errors.append(check_close(outcome.forward, runs.truth.forward, tolerance, where))
        errors.append(check_close(outcome.statistics, runs.truth.statistics, tolerance, where))
    return max(errors)


def bfloat16_gradients(runs: Runs, tolerance: float) -> float:
    """Both frameworks against the truth; errors of a tensor below a tenth of the largest are relative to that tenth."""
    errors = []
    for side, outcome in (("jax", runs.bfloat16.jax_outcome), ("torch", runs.bfloat16.torch_outcome)):
        where = f"{runs.case.name}: bf16 gradients, {side}"
        errors.append(check_close(everything(outcome), everything(runs.truth), tolerance, where, small=0.1))
    return max(errors)


def jit_equals_eager(runs: Runs, tolerance: float) -> float:
    """The compiled function against the same call without jit."""
    side, where = runs.float64.jax, f"{runs.case.name}: jit equals eager"
    eager, jitted = side.forward_eagerly(runs.float64.inputs), runs.float64.jax_outcome
    check_exact(jitted.choices, eager.choices, where)
    error = check_close(jitted.forward, eager.forward, tolerance, where)
    return max(error, check_close(jitted.statistics, eager.statistics, tolerance, where))


def round_trip(runs: Runs, tolerance: float) -> float:
    """jax -> torch -> jax into a module with other numbers: every weight bit for bit, in fp32 and bf16."""
    for dtype in ("float32", "bfloat16"):
        where = f"{runs.case.name}: round trip, {dtype}"
        source = getattr(runs, dtype).jax.module
        other = jax_module(dataclasses.replace(runs.case, name="other numbers"), dtype)
        with precision(dtype):
            weights = jax_moe.to_torch(source)
            jax_moe.from_torch(other, torch_module(runs.case, weights).state_dict())
            check_exact(_leaves(other), _leaves(source), where)
            check_exact(jax_moe.to_torch(other), weights, where)
    return 0.0


def other_dispatchers(config: MoEConfig) -> list[str]:
    """The dispatchers that can run the contract besides its own (for "auto": that of many tokens on a CPU)."""
    own = ("grouped" if config.capacity is None else "gather") if config.dispatcher == "auto" else config.dispatcher
    names = []
    for name in sorted(kernels.DISPATCHERS.keys() - {own}):
        try:
            dataclasses.replace(config, dispatcher=name)  # type: ignore[arg-type]
        except ValueError:
            continue
        names.append(name)
    return names


def every_dispatcher(runs: Runs, tolerance: float) -> float:
    """The case through every other dispatcher: choices and drops exact; answers, statistics and all gradients close."""
    config, expected, errors = runs.case.config, runs.float64.torch_outcome, []
    assert isinstance(config, MoEConfig)
    for name in other_dispatchers(config):
        case = dataclasses.replace(
            runs.case, config=dataclasses.replace(config, dispatcher=name)  # type: ignore[arg-type]
        )
        found, where = make_pair(case, "float64").jax_outcome, f"{case.name}: dispatcher {name}"
        check_exact(found.choices, expected.choices, where)
        errors.append(check_close(found.forward, expected.forward, tolerance, where))
        errors.append(check_close(found.statistics, expected.statistics, tolerance, where))
        errors.append(check_close(everything(found), everything(expected), tolerance, where))
    return max(errors)


def _leaves(module: nnx.Module) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(module))}


def ten_adamw_steps(runs: Runs, tolerance: float) -> float:
    """`adamw_as_torch` against torch.optim.AdamW: the parameters by name after ten steps in fp64."""
    ours, theirs = jax_trajectory(runs.float64), torch_trajectory(runs.float64)
    return check_close(ours, theirs, tolerance, f"{runs.case.name}: after {STEPS} AdamW steps")


by_dispatch = functools.partial(stands_for, kind=kind_of_dispatch)
by_layer = functools.partial(stands_for, kind=kind_of_layer)
by_program = functools.partial(stands_for, kind=kind_of_program)
COLUMNS = [
    compared("choices", "float64", 0, "experts and slots", needs_layer),
    compared("forward", "float64", 1e-12, "forward", always),
    compared("statistics", "float64", 1e-12, "statistics", needs_mixture),
    compared("input_gradient", "float64", 1e-10, "input gradient", needs_vectors),
    compared("parameter_gradients", "float64", 1e-10, "parameter gradients", always),
    compared("loss_gradients", "float64", 1e-10, "loss gradients", needs_mixture),
    Column("every dispatcher", "float64", 1e-10, every_dispatcher, needs_sparse_layer, by_dispatch),
    Column("jit equals eager", "float64", 1e-12, jit_equals_eager, always, by_program),
    Column("round trip", "float32", 0, round_trip, always, by_layer),
    Column("ten AdamW steps", "float64", 1e-10, ten_adamw_steps, always, by_layer),
    Column("fp32 forward", "float32", 1e-5, float32_forward, always, by_dispatch),
    Column("fp32 gradients", "float32", 1e-5, float32_gradients, always, by_dispatch),
    Column("bf16 forward", "bfloat16", 0.1, bfloat16_forward, always, by_layer),
    Column("bf16 gradients", "bfloat16", 0.2, bfloat16_gradients, always, by_layer),
]
COLUMN = {column.name: column for column in COLUMNS}
