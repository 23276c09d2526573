"""The table of docs/families.md: `python -m parity_tests.families [--update] [model types]`."""

import sys
import tempfile
import time
from pathlib import Path

from parity_tests.families.cases import CASES
from parity_tests.families.checks import COLUMNS, Runs


def main() -> None:
    """Measures and prints every cell."""
    asked = [word for word in sys.argv[1:] if not word.startswith("-")] or list(CASES)
    with tempfile.TemporaryDirectory() as room:
        for name in asked:
            runs, cells, began = Runs(CASES[name], Path(room)), [], time.process_time()
            for column in COLUMNS:
                if column.lacks(runs.case):
                    cells.append("-")
                    continue
                try:
                    cells.append(f"{column(runs):.0e}")
                except Exception as error:
                    cells.append("FAIL")
                    print(f"   {name} / {column.name}: {type(error).__name__}: {str(error)[:600]}")
            print(f"{name:18} {time.process_time() - began:5.1f}s  {' '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
