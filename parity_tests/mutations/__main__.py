"""Small faults planted in copies of `jax_moe` and `torch_ref`, one at a time: a fast check must catch each.

`python -m parity_tests.mutations [--list] [--only NAME] [--update]`. Rows of the parity table run in fp64 (or by the
named columns), tests by pytest, a family against `transformers`. `--update` writes docs/mutations.md.
"""

import argparse
import ast
import contextlib
import datetime
import io
import os
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from parity_tests.mutations.mutation_table import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "docs" / "mutations.md"
COPIED = (
    "jax_moe", "torch_ref", "moe_parity", "moe_cli", "moe_train", "parity_tests", "train", "pyproject.toml",
    "README.md",
)
PRELOADED = ("numpy", "scipy", "jax", "flax.nnx", "optax", "torch", "pytest", "safetensors", "transformers")
CHECKED = ("experts and slots", "forward", "statistics", "input gradient", "parameter gradients", "loss gradients")
CAUGHT, SURVIVED = 1, 0
SECONDS = 600  # a mutation may loop for ever: that counts as caught


@dataclass(frozen=True)
class Verdict:
    """The result of a mutation."""

    mutation: Mutation
    caught: bool
    said: str  # the first line of the error that caught it
    seconds: float


def stale(root: Path = ROOT) -> list[str]:
    """Messages for mutations whose old text is not in the file exactly once, or whose result is equal or not Python."""
    found = []
    for mutation in MUTATIONS:
        text = (root / mutation.file).read_text()
        count = text.count(mutation.old)
        if count != 1 or mutation.old == mutation.new:
            stands = f"stands {count} times in {mutation.file}, must stand once and be changed"
            found.append(f"{mutation.name}: {mutation.old!r} {stands}")
            continue
        try:
            ast.parse(text.replace(mutation.old, mutation.new))
        except SyntaxError as error:
            found.append(f"{mutation.name}: {mutation.new!r} in {mutation.file} is a syntax error: {error.msg}")
    return found


def copied(root: Path, folder: Path) -> None:
    """Copies the present sources."""
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def controls(mutations: list[Mutation]) -> list[Mutation]:
    """The checks of all mutations, on unchanged sources: they must pass."""
    plain = {row: None for mutation in mutations if not mutation.columns for row in mutation.rows}
    some = {mutation.columns: mutation.rows for mutation in mutations if mutation.columns}
    families = {mutation.family: None for mutation in mutations if mutation.family}
    tests = {test: None for mutation in mutations for test in mutation.tests}
    nothing = {"file": mutations[0].file, "old": mutations[0].old, "new": mutations[0].old}
    found = [
        Mutation(f"control: {', '.join(columns)}", **nothing, rows=rows, columns=columns)
        for columns, rows in some.items()
    ]
    found += [Mutation(f"control: {family}", **nothing, family=family) for family in families]
    found += [Mutation("control: rows", **nothing, rows=tuple(plain))] if plain else []
    return found + ([Mutation("control: tests", **nothing, tests=tuple(tests))] if tests else [])


def run(mutation: Mutation, folder: Path) -> Verdict:
    """Applies a mutation to the copy, runs its checks in a child process, and reverts it."""
    start = time.monotonic()
    path = folder / mutation.file
    before = path.read_text()
    path.write_text(before.replace(mutation.old, mutation.new))
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    try:
        child = os.fork()
        if child == 0:
            _child(mutation, folder, log)
        _, status = os.waitpid(child, 0)
    finally:
        path.write_text(before)
    said = log.read_text().strip() if log.exists() else ""
    return Verdict(mutation, os.waitstatus_to_exitcode(status) != SURVIVED, said, time.monotonic() - start)


def _child(mutation: Mutation, folder: Path, log: Path) -> None:
    """Runs the checks and exits; never returns."""
    import signal

    signal.signal(signal.SIGALRM, lambda *_: (log.write_text("it did not come to an end"), os._exit(CAUGHT)))
    signal.alarm(SECONDS)
    os.chdir(folder)
    _forget()
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    sys.dont_write_bytecode = True
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            _check(mutation, folder)
    except BaseException as error:
        message = str(error).strip().splitlines() or [traceback.format_exc().strip().splitlines()[-1]]
        log.write_text(f"{type(error).__name__}: {message[0]}")
        os._exit(CAUGHT)
    os._exit(SURVIVED)


def _forget() -> None:
    """Removes our packages from sys.modules, so that they are imported from the copy, by pytest with shape checks."""
    for name in [name for name in sys.modules if name.split(".")[0] in COPIED]:
        del sys.modules[name]


def _check(mutation: Mutation, folder: Path) -> None:
    """Raises if a check catches the mutation."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    import torch

    torch.set_num_threads(1)
    if mutation.rows or mutation.family:
        _check_rows(mutation, folder)
    if mutation.tests:
        import pytest

        _forget()
        plugin = _FirstFailure()
        quiet = ("-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
        code = pytest.main([*quiet, "--rootdir", str(folder), *mutation.tests], plugins=[plugin])
        if code != 0:
            raise AssertionError(plugin.said or f"pytest ended with {code}")


class _FirstFailure:
    """Keeps the name of the first test that fails."""

    said = ""

    def pytest_runtest_logreport(self, report: object) -> None:
        if getattr(report, "failed", False) and not self.said:
            self.said = str(getattr(report, "nodeid", ""))


def _check_rows(mutation: Mutation, folder: Path) -> None:
    import jax_moe

    assert Path(jax_moe.__file__).is_relative_to(folder), "the copy must be what is checked"
    from parity_tests.table.cases import BY_NAME
    from parity_tests.table.checks import COLUMN, Runs

    for name in mutation.rows:
        runs = Runs(BY_NAME[name])
        for column in (COLUMN[name] for name in mutation.columns or CHECKED):
            if column.is_run(runs.case):
                column.measure(runs, column.tolerance)
    if mutation.family:
        from parity_tests.table.family_cases import CASES
        from parity_tests.table.family_checks import FAMILY_COLUMNS, FamilyRuns

        family = FamilyRuns(
            next(case for case in CASES if case.name == mutation.family), folder / f"family {mutation.name}"
        )
        for column in FAMILY_COLUMNS[:4]:
            column.measure(family, column.tolerance)  # type: ignore[arg-type]


def preload() -> None:
    """Imports what every child needs and no mutation changes."""
    import importlib

    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def render(verdicts: list[Verdict]) -> str:
    """docs/mutations.md."""
    import importlib.metadata

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "torch"))
    caught = sum(verdict.caught for verdict in verdicts)
    lines = [
        "# Mutations", "",
        "A mutation is a small mistake, planted alone in a copy of the sources: a sign, a bound, a factor left out. A",
        "test that misses it would miss the same mistake by a person. Fast checks must catch each: rows of",
        "[the parity table](parity.md) in fp64, answers worked by hand, or a family against `transformers`.", "",
        f"**{caught} of {len(verdicts)} are caught.** The last column is the first line of the error.",
        f"Written by `python -m parity_tests.mutations --update`, {datetime.date.today():%Y-%m-%d}, {versions}.", "",
    ]
    survivors = [verdict for verdict in verdicts if not verdict.caught]
    if survivors:
        told = [f"- {verdict.mutation.name}: {verdict.mutation.reason or 'no reason known'}" for verdict in survivors]
        lines += ["## Survivors", "", *told, ""]
    lines += ["| mutation | where | from | to | caught by |", "|---|---|---|---|---|"]
    for verdict in verdicts:
        old, new = (f"`{_cell(text)}`" for text in (verdict.mutation.old, verdict.mutation.new))
        by = _cell(verdict.said) if verdict.caught else "**survived**"
        lines.append(f"| {verdict.mutation.name} | {verdict.mutation.file} | {old} | {new} | {by} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    short = " ".join(text.split()).replace("|", "\\|")
    return short if len(short) <= 110 else short[:107] + "..."


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 if every mutation without a reason to survive was caught."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    parser.add_argument("--only", metavar="NAME", help="those whose name holds this")
    parser.add_argument("--update", action="store_true", help="write docs/mutations.md")
    chosen = parser.parse_args(arguments)
    mutations = [mutation for mutation in MUTATIONS if chosen.only is None or chosen.only in mutation.name]
    if not mutations:
        parser.error(f"--only {chosen.only}: no mutation has that in its name")
    if chosen.list:
        print("\n".join(f"{mutation.name:44} {mutation.file}" for mutation in mutations))
        return 0
    if chosen.update and chosen.only:
        parser.error("--update writes all of the table: leave --only out")
    if found := stale():
        print("\n".join(found), file=sys.stderr)
        return 2
    preload()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copied(ROOT, folder)
        for control in controls(mutations):
            verdict = run(control, folder)
            word = "RED" if verdict.caught else "green"
            print(f"{word:9}{verdict.seconds:6.1f} s  {control.name:44} {verdict.said[:120]}", flush=True)
            if verdict.caught:
                print("the checks fail on sources that nothing was done to", file=sys.stderr)
                return 2
        verdicts = []
        for mutation in mutations:
            outcome = run(mutation, folder)
            verdicts.append(outcome)
            word = "caught" if outcome.caught else "SURVIVED"
            print(f"{word:9}{outcome.seconds:6.1f} s  {mutation.name:44} {outcome.said[:120]}", flush=True)
    print(f"{sum(verdict.caught for verdict in verdicts)} of {len(verdicts)} caught")
    if chosen.update:
        RESULT.write_text(render(verdicts))
    return 0 if all(verdict.caught or verdict.mutation.reason for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
