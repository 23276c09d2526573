"""docs/families.md: a row a model type, a column a check, the measured error or the reason in words."""

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

from jax_moe.porting.families import decoder_names
from parity_tests.families.cases import CASES
from parity_tests.families.checks import COLUMNS
from parity_tests.families.gaps import FINDINGS, GAPS, IN_PART

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
NUMBER = re.compile(r"0|\d(\.\d)?e-\d\d")
VERSION = re.compile(r"(?<=`transformers` )\d+\.\d+\.\d+")
INTRODUCTION = """# Model types

The table says which model types port, and how exactly. Its rows are the model types of `transformers` {version} with
routed experts. `jax_moe.load_moe(directory, layer)` reads the mixture of one layer from a checkpoint folder, and
`jax_moe.save_moe` puts it back; where the last column says yes, `jax_moe.load_pretrained` reads the whole model too
([how](huggingface.md)).

Each mixture is compared with the module in `transformers` itself, on tiny random weights of two odd shapes. A number is
the largest relative error; 0 is bit for bit. `make families` measures anew.

| column | what is compared |
|---|---|
| choices | the chosen experts of every token, in fp64 and fp32, exactly |
| output, gradients | the answer; the gradient of the input, and of every parameter by its name on disk |
| torch_ref | the answer of `torch_ref` with the same weights, by the same rows |
| balance loss | that of one layer, as `transformers` counts it |
| round trip | the contract through config.json, the weights through their names on disk |
| own folder | a folder written by the model's own `save_pretrained`, read by `load_moe`, put back by `save_moe` |
| decoder | whether the whole model ports; [the parity table](parity.md#hugging-face-families) has its measured rows |

"""


def header() -> list[str]:
    """The table's head, with the limits."""
    names = [f"{one.name} (at most {one.limit:.0e})" if one.limit else one.name for one in COLUMNS]
    words = ["model type", *names, "decoder"]
    return [f"| {' | '.join(words)} |", f"|{'---|' * len(words)}"]


def row(name: str, measured: Mapping[str, float]) -> str:
    """One model type."""
    cells = [column.lacks(CASES[name]) or number(measured[column.name]) for column in COLUMNS]
    return f"| `{name}` | {' | '.join(cells)} | {'yes' if name in decoder_names() else 'the mixture alone'} |"


def number(error: float) -> str:
    """As it stands in a cell."""
    return "0" if error == 0 else f"{error:.1e}"


def bullet(name: str, words: str) -> str:
    """A line of a list, wrapped."""
    return textwrap.fill(
        f"- `{name}`: {words}", 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def page(measured: Mapping[str, Mapping[str, float]], version: str) -> str:
    """The whole document."""
    lines = [INTRODUCTION.format(version=version) + "\n".join(header())]
    lines += [row(name, measured[name]) for name in sorted(CASES)]
    lines += ["", "## Known in part", "", *(bullet(name, words) for name, words in sorted(IN_PART.items()))]
    lines += ["", "## Found in the reference", "", *(bullet(name, words) for name, words in sorted(FINDINGS.items()))]
    lines += ["", "## Not compared", "", "| model type | why |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in sorted(GAPS.items())]
    return "\n".join(lines) + "\n"


def stored() -> dict[str, dict[str, float]]:
    """What the document says of the model types that are not measured anew."""
    found: dict[str, dict[str, float]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else ():
        name, *cells = (word.strip(" `") for word in line.strip("|").split("|"))
        if name in CASES and len(cells) == len(COLUMNS) + 1:
            pairs = zip(COLUMNS, cells, strict=False)
            found[name] = {column.name: float(cell) for column, cell in pairs if NUMBER.fullmatch(cell)}
    return found


def version() -> str:
    """The version of transformers that the document names. Raises ValueError if it names none."""
    found = VERSION.search(PAGE.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{PAGE.name}: must name the version of `transformers`")
    return found[0]


def without_numbers(text: str) -> str:
    """The document with every number in a cell replaced, and the version: what must be fresh."""
    text = VERSION.sub("VERSION", text)
    return re.sub(rf"(?<=\| )({NUMBER.pattern})(?= \|)", "N", text)
