"""The measured parity table: `python -m parity_tests.table` writes docs/parity.md, `--update` measures first."""

import argparse
import json
import os
import sys
import textwrap
from pathlib import Path

from parity_tests.table.cases import CASES
from parity_tests.table.checks import COLUMN, COLUMNS, MEASURED, Column, measured, worst_measured
from parity_tests.table.family_cases import CASES as FAMILY_CASES
from parity_tests.table.family_checks import FAMILY_COLUMNS
from parity_tests.table.measure import measure
from parity_tests.table.run_checks import RUN_CASES, RUN_COLUMNS

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
BEGIN, END = "<!-- parity table: begin -->", "<!-- parity table: end -->"


SHOWN = (  # of what is measured on an accelerator
    "experts and slots", "fp32 forward", "fp32 gradients", "bf16 forward", "bf16 gradients", "forward",
    "parameter gradients", "every dispatcher",
)


def write_text(path: Path, text: str) -> None:
    """Writes the file whole or not at all."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)


def wrapped(text: str) -> str:
    """The text in lines of at most 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def cell(column: Column, value: float | str) -> str:
    """The text of a cell: an error, "exact" or a dash."""
    if isinstance(value, str):
        return "-"
    return "exact" if column.limit == 0 else f"{value:.0e}"


def grid(columns: list[Column], rows: dict[str, dict[str, float | str]]) -> list[str]:
    """A markdown table: tolerances, worst errors, then every row."""
    return [
        "| | " + " | ".join(column.name for column in columns) + " |",
        "|---|" + "---|" * len(columns),
        "| *allowed* | " + " | ".join("exact" if c.limit == 0 else f"{c.tolerance:.0e}" for c in columns) + " |",
        "| *worst measured* | " + " | ".join(cell(c, worst_measured(c.name)) for c in columns) + " |",
        *(
            f"| {name} | " + " | ".join(cell(c, row.get(c.name, "?")) for c in columns) + " |"
            for name, row in rows.items()
        ),
    ]


def on_device() -> list[str]:
    """The worst errors on each accelerator that `parity_tests.table.on_device` has measured."""
    lines = []
    for path in sorted(MEASURED.parent.glob("measured_*.json")):
        found = json.loads(path.read_text())
        titles = [title for title in SHOWN if any(title in row for row in found["rows"].values())]
        numbers = {title: [row[title] for row in found["rows"].values() if isinstance(row[title], float | int)]
                   for title in titles}
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        missing = [case.name for case in CASES if case.name not in found["rows"]]
        cells = (cell(COLUMN[title], max(values)) for title, values in numbers.items())
        lines += [
            "", f"## {found['device']}", "",
            wrapped(f"`python -m parity_tests.table.on_device`: {found['driver']}, {found['date']}, {versions}."),
            "JAX runs on the device, PyTorch on the CPU.", "",
            "| | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles),
            f"| worst of {len(found['rows'])} rows | " + " | ".join(cells) + " |",
            *(["", wrapped("Not measured there yet: " + "; ".join(missing) + ".")] if missing else []),
        ]
    return lines


def render() -> str:
    """The table as markdown, from measured.json alone."""
    found = measured()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    reasons = sorted({value for row in found["cells"].values() for value in row.values() if isinstance(value, str)})
    lines = [
        wrapped(f"Measured {found['date']} on {found['machine']} with {versions}."),
        "",
        "## Layers and models",
        "",
        "Numbers are worst relative errors, JAX against `torch_ref` (bf16: both against fp64). The first eight columns",
        "and the AdamW steps are in fp64.",
        "",
        *grid(COLUMNS, {case.name: found["cells"].get(case.name, {}) for case in CASES}),
        "",
        wrapped("A dash: " + "; ".join(reasons) + "."),
        "",
        "## Hugging Face families",
        "",
        "Tiny random models: our `Decoder` against `transformers`. The first four columns are in fp64 (the reference",
        "with every float32 that it names widened); loss and gradients include the balance loss.",
        "",
        *grid(FAMILY_COLUMNS, {case.name: found["families"].get(case.name, {}) for case in FAMILY_CASES}),
        "",
        "## Whole training runs",
        "",
        "Tiny models in fp64, JAX against PyTorch: the same weights, texts, noise and dropout masks, AdamW with",
        "clipping, warm-up, cosine decay and accumulated gradients. The run that crosses over makes 50 steps in",
        "PyTorch, 50 in JAX and 100 in PyTorch, with its optimizer state.",
        "",
        *grid(RUN_COLUMNS, {case.name: found.get("runs", {}).get(case.name, {}) for case in RUN_CASES}),
        *on_device(),
    ]
    return "\n".join(lines)


def between_markers(text: str) -> str | None:
    """The page's text between the markers; None without markers."""
    if BEGIN not in text or END not in text:
        return None
    return text.split(BEGIN, 1)[1].split(END, 1)[0].strip()


def main() -> None:
    """Measures if asked, then rewrites the page's table."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests.table", description=__doc__)
    parser.add_argument("--update", action="store_true", help="measure every cell again (minutes) and store it")
    parser.add_argument("--rows", default="", help="with --update: these rows alone, separated by semicolons")
    asked = parser.parse_args()
    if asked.update:
        rows = [row.strip() for row in asked.rows.split(";") if row.strip()]
        try:
            found = measure(rows)
        except ValueError as error:
            sys.exit(str(error))
        write_text(MEASURED, json.dumps(found, indent=1) + "\n")
        measured.cache_clear()
    text = PAGE.read_text()
    if between_markers(text) is None:
        sys.exit(f"docs/parity.md: must hold the lines {BEGIN} and {END}")
    head, tail = text.split(BEGIN, 1)[0], text.split(END, 1)[1]
    write_text(PAGE, f"{head}{BEGIN}\n{render()}\n{END}{tail}")


if __name__ == "__main__":
    main()
