"""Measures the rows of the parity table, a process a core.

Not in `__main__`: a process that is spawned from `python -m` does not import that.
"""

import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import sys
import tempfile
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from parity_tests.table.cases import BY_NAME, CASES, EVERY_CELL
from parity_tests.table.checks import COLUMNS, Runs, measured
from parity_tests.table.family_cases import CASES as FAMILY_CASES
from parity_tests.table.family_checks import FAMILY_COLUMNS, FamilyRuns
from parity_tests.table.run_checks import RUN_CASES, measure_runs

PACKAGES = ("jax", "flax", "torch", "transformers", "optax", "numpy")


def measure(rows: Collection[str] = ()) -> dict:
    """Every cell's error or the reason for its dash; of these rows alone, if any are named, beside what was measured.

    Raises MismatchError for an error above the project's limit.
    """
    family_names = [case.name for case in FAMILY_CASES] if find_spec("transformers") else []
    names = [("cells", case.name) for case in CASES] + [("families", name) for name in family_names]
    runs = [case for case in RUN_CASES if family_names and (not rows or case.name in rows)]
    known = {name for _, name in names} | {case.name for case in RUN_CASES}
    if unknown := sorted(set(rows) - known):
        raise ValueError(f"rows={'; '.join(unknown)}: must be rows of the table")
    names = [(part, name) for part, name in names if not rows or name in rows]
    found = {part: dict(measured().get(part, {})) for part in ("cells", "families", "runs")}
    os.environ[EVERY_CELL] = "1"  # for the processes, which inherit it
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, ((part, name), row) in enumerate(zip(names, pool.map(measure_row, names), strict=True)):
            found[part][name] = row
            print(f"{number + 1}/{len(names)} {name}", file=sys.stderr, flush=True)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": platform.machine(),
        "versions": versions,
    }
    found["runs"] |= measure_runs(runs)
    order = {"cells": CASES, "families": FAMILY_CASES, "runs": RUN_CASES}
    kept = {part: {case.name: found[part][case.name] for case in cases if case.name in found[part]}
            for part, cases in order.items()}
    return measured() | (about if not rows else {}) | {part: held for part, held in kept.items() if held}


def measure_row(which: tuple[str, str]) -> dict[str, float | str]:
    """The cells of a row."""
    part, name = which
    if part == "cells":
        case = BY_NAME[name]
        runs = Runs(case)
        return {column.name: column.inapplicable(case) or column.measure(runs, column.limit) for column in COLUMNS}
    (family,) = (case for case in FAMILY_CASES if case.name == name)
    with tempfile.TemporaryDirectory() as folder:
        family_runs = FamilyRuns(family, Path(folder))
        return {c.name: c.measure(family_runs, c.limit) for c in FAMILY_COLUMNS}  # type: ignore[arg-type]
