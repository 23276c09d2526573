"""The parity table on an accelerator: JAX there, PyTorch on the CPU.

    python -m parity_tests.table.on_device [--seconds 150] [--workers 8] [--rows "mixtral;soft moe, deep"]

Measures choices, answers and gradients of every row in fp64, fp32 (full matrix precision) and bf16, and every
dispatcher, and writes `measured_<platform>.json` after each row; rows measured before on the same device with the same
versions are kept. Exit status 1 if a choice differs, an error is above the limit of its column, or rows are missing
when the seconds are over; 2 for a name that is no row.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

from parity_tests.table.__main__ import SHOWN, write_text
from parity_tests.table.cases import BY_NAME, CASES
from parity_tests.table.checks import COLUMN, Runs

FOLDER = Path(__file__).parent


def prepare() -> None:
    """As the tests set jax and PyTorch, and a share of the accelerator's memory for each process."""
    import jax
    import torch

    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_num_threads(1)


def measure(name: str) -> tuple[str, dict[str, float | str]]:
    """The row's errors; a dash's reason, or what went wrong, as text."""
    runs, row = Runs(BY_NAME[name]), {}
    for title in SHOWN:
        column = COLUMN[title]
        row[title] = column.inapplicable(BY_NAME[name])
        if row[title] is None:
            try:
                row[title] = column.measure(runs, column.limit)
            except Exception as error:  # every other cell is still measured
                row[title] = f"failed: {(str(error).splitlines() or [''])[0][:300]}"
    return name, row


def about() -> dict[str, object]:
    """The device, the day and the versions, asked in a process of their own."""
    import jax

    first = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "torch", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "platform": jax.default_backend(),
        "device": first.device_kind, "driver": " ".join(first.client.platform_version.split()),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests.table.on_device", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rows", help="names, separated by semicolons; all by default")
    asked = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    names = asked.rows.split(";") if asked.rows else [case.name for case in CASES]
    if unknown := [name for name in names if name not in BY_NAME]:
        print(f"rows={unknown[0]!r}: must be names of rows of docs/parity.md, separated by semicolons", file=sys.stderr)
        return 2
    end, rows = time.monotonic() + asked.seconds, {}
    with ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn"), prepare) as pool:
        found = pool.submit(about).result() | {"rows": rows}
        path = FOLDER / f"measured_{found['platform']}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        if all(before.get(name) == found[name] for name in ("device", "driver", "versions")):
            rows |= {name: row for name, row in before["rows"].items() if name not in names}
        waiting = [pool.submit(measure, name) for name in names]
        with contextlib.suppress(TimeoutError):
            for done in as_completed(waiting, timeout=max(end - time.monotonic(), 1)):
                keep(done, rows, names, end)
                write_text(path, json.dumps(found, indent=1) + "\n")
        pool.shutdown(cancel_futures=True)  # rows that have begun end first
    missing = [name for name in names if name not in rows]
    failed = [f"{name}, {title}: {cell}" for name, row in rows.items() for title, cell in row.items()
              if isinstance(cell, str) and cell.startswith("failed")]
    print(*failed, f"{len(rows)} rows in {path}, {len(failed)} cells failed, {len(missing)} rows missing", sep="\n")
    return int(bool(failed or missing))


def keep(done: Future, rows: dict, names: list[str], end: float) -> None:
    """Stores a row and prints it."""
    name, row = done.result()
    rows[name] = row
    cells = " ".join(f"{cell:.0e}" if isinstance(cell, float | int) else "-" for cell in row.values())
    print(f"{len(rows)}/{len(names)} {name}: {cells} ({end - time.monotonic():.0f} s left)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
