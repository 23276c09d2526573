"""The code blocks of README.md and docs/, and how a test runs them: by page, in order, in one folder and namespace.

Fenced Python and lines of shell commands (indented, or after `$ ` in a fence) are run. `<!-- not run: WHY -->` before a
block leaves it out, but its options are checked; `<!-- run with: OPTIONS -->` adds options that shorten it.
`<!-- printed -->` before a fence says that it holds what the block above printed: the words are compared, and of
numbers how many there are; `...` stands for any words.
"""

import contextlib
import io
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moe_cli import arguments as cli
from moe_cli import main as moe_main
from moe_train import loop, plots

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
# The pages of the site in the order of mkdocs.yml.
SITE = [ROOT / "docs" / page for page in re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)]
STARTS = ("make ", "jax-moe ", "python ", ".venv/bin/")  # of a line that is a command
HEAVY = r"\b(import .*torch|torch_ref|transformers|moe_parity|jax-moe parity|model\.pt)\b"  # needs optional packages


@dataclass(frozen=True)
class Block:
    """A code block of a document."""

    document: str
    line: int
    kind: Literal["python", "shell"]
    text: str
    left_out: str | None = None  # why it is not run
    added: str = ""
    printed: str | None = None  # what it prints, where the document shows that

    @property
    def heavy(self) -> bool:
        """Whether running it needs PyTorch or transformers."""
        return self.left_out is None and re.search(HEAVY, self.text) is not None

    def commands(self) -> list[list[str]]:
        """The words of each command, comments left out."""
        return [shlex.split(f"{line} {self.added}", comments=True) for line in self.text.splitlines()]


def blocks(document: str, text: str) -> list[Block]:
    """All blocks of a document, in order. Raises ValueError for a mark that no block follows."""
    found: list[Block] = []
    lines, mark, i = text.splitlines(), {}, 0
    while i < len(lines):
        begin, line = i, lines[i]
        note = re.fullmatch(r"<!-- (not run|run with): (.*) -->", line)
        if line == "<!-- printed -->":
            begin = lines.index("```text", i + 1)
            i = lines.index("```", begin + 1)
            found[-1] = replace(found[-1], printed="\n".join(lines[begin + 1 : i]))
            i += 1
            continue
        if note:
            mark = {note[1]: note[2]}
        fenced = re.fullmatch(r"```(\w*)", line)
        if fenced:
            end = lines.index("```", i + 1)
            inside = lines[i + 1 : end]
            commands = [line[2:] for line in inside if line.startswith("$ ")]
            body = inside if fenced[1] == "python" else commands
            i = end
        else:
            while i < len(lines) and lines[i].startswith("    ") and lines[i].strip().startswith(STARTS):
                i += 1
            body = [line.strip() for line in lines[begin:i]]
            i = max(begin, i - 1)
        if body:
            kind: Literal["python", "shell"] = "python" if fenced and fenced[1] == "python" else "shell"
            found.append(
                Block(document, begin + 1, kind, "\n".join(body), mark.get("not run"), mark.get("run with", ""))
            )
            mark = {}
        elif mark and line.strip() and not note:
            raise ValueError(f"{document}, line {begin + 1}: a block must follow {mark}")
        i += 1
    return found


def run(block: Block, names: dict[str, Any], folder: Path) -> None:
    """Runs the block or checks its options. Raises RuntimeError with the line for errors and files written twice."""
    before, printed = _files(folder), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            if block.kind == "python":
                code = compile("\n" * block.line + block.text, block.document, "exec")
                if block.left_out is None:
                    exec(code, names)
            for words in block.commands() if block.kind == "shell" else ():
                (_run if block.left_out is None else _check)(words)
        if block.printed is not None and not _same_words(block.printed, printed.getvalue()):
            raise ValueError(f"prints {printed.getvalue()!r}, not {block.printed!r}")
    except (Exception, SystemExit) as error:
        raise RuntimeError(f"{block.document}, line {block.line}: {type(error).__name__}: {error}") from error
    after = _files(folder)
    twice = sorted(name for name, time in before.items() if after.get(name) != time)
    if twice:
        raise RuntimeError(
            f"{block.document}, line {block.line}: writes what an earlier block wrote: {', '.join(twice[:5])}"
        )


def _same_words(shown: str, printed: str) -> bool:
    """Whether the words are the same, with a mark in place of each number."""
    words = [" ".join(re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", text).split()) for text in (shown, printed)]
    return re.fullmatch(re.escape(words[0]).replace(re.escape("..."), ".*"), words[1]) is not None


def _files(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def _run(words: list[str]) -> None:
    name = Path(words[0]).name
    if name == "jax-moe":
        status = moe_main.main(words[1:])
    else:
        main = {"train/train.py": loop.main, "train/plots.py": plots.main}[words[1]]
        before, sys.argv = sys.argv, words[1:]
        try:
            status = main()
        except SystemExit as stopped:  # of --help
            status = 0 if stopped.code in (0, None) else 1
        finally:
            sys.argv = before
    if status != 0:
        raise ValueError(f"{' '.join(words)} ended with status {status}")


def _check(words: list[str]) -> None:
    name = Path(words[0]).name
    if name == "make":
        known = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if words[1] not in known:
            raise ValueError(f"make {words[1]}: must be one of {', '.join(known)}")
    elif name == "jax-moe":
        cli.parse(words[1:])
    elif words[1] == "train/train.py":
        loop.read_settings(words[2:])
    elif words[1] == "-m" and words[2].startswith("benchmarks."):
        pass  # their options are read by test_benchmarks
    elif words[1].startswith("examples/") and (ROOT / words[1]).exists():
        pass
    else:
        raise ValueError(f"{' '.join(words)}: must be a command that can be checked")
