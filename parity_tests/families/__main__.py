"""Measures the cells of docs/families.md: `python -m parity_tests.families [--update] [model types; all if none]`.

`--render` writes the document anew from the numbers in it.
"""

import sys
import tempfile
import time
from pathlib import Path

import transformers

from parity_tests.families.cases import CASES
from parity_tests.families.checks import COLUMNS, Runs
from parity_tests.families.page import PAGE, page, stored, version


def measure(name: str, room: Path) -> dict[str, float]:
    """{column: error} of one model type. Raises MismatchError if one is beyond its limit."""
    runs = Runs(CASES[name], room)
    return {column.name: column(runs) for column in COLUMNS if not column.lacks(runs.case)}


def main(words: list[str]) -> None:
    """Prints the cells; with --update writes the document; with --render only writes it."""
    if words == ["--render"]:
        PAGE.write_text(page(stored(), version()), encoding="utf-8")
        return
    transformers.utils.logging.disable_progress_bar()
    names, measured = [word for word in words if word != "--update"] or list(CASES), {}
    with tempfile.TemporaryDirectory() as room:
        for name in names:
            began = time.process_time()
            measured[name] = measure(name, Path(room))
            cells = " ".join(f"{error:.0e}" for error in measured[name].values())
            print(f"{name:20} {time.process_time() - began:5.1f} s  {cells}", flush=True)
    if "--update" in words:
        PAGE.write_text(page({**stored(), **measured}, transformers.__version__), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
