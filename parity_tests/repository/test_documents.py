"""Blocks of README.md and docs/ run as written, each page in a folder of its own; others are marked and checked."""

import importlib.util
import warnings
from pathlib import Path

import pytest

from jax_moe import kernels
from moe_train.data import text as data
from parity_tests.repository.documents import README, ROOT, SITE, blocks, run

pytestmark = pytest.mark.usefixtures("quick")
TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "tokenizers"))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("page", [README, *SITE], ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_every_block_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without PyTorch, blocks run up to the first that needs it, as later blocks build on it."""
    monkeypatch.chdir(tmp_path)
    if page.stem != "scaling":  # its figures of memory are those of the dispatcher that users have
        monkeypatch.setattr(kernels, "grouped_dispatch", kernels.einsum_dispatch)  # compiles in a third of the time
    text = page.read_text(encoding="utf-8")
    if "tinyshakespeare.txt" in text:
        (tmp_path / "tinyshakespeare.txt").write_text(data.plays()[:60_000], encoding="utf-8")
    names: dict = {"__name__": "page"}
    for block in blocks(page.name, text):
        if block.heavy and not TORCH:
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings are no errors for users
            run(block, names, tmp_path)
        capsys.readouterr()


def test_every_page_is_listed() -> None:
    assert sorted(SITE) == sorted((ROOT / "docs").rglob("*.md"))


def test_readme_is_short() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_blocks_are_found() -> None:
    found = [block for page in [README, *SITE] for block in blocks(page.name, page.read_text(encoding="utf-8"))]
    assert sum(block.left_out is None for block in found) > 40
    assert sum(block.printed is not None for block in found) > 15


def test_the_first_layer_needs_no_torch() -> None:
    text = (ROOT / "docs" / "start" / "first_run.md").read_text(encoding="utf-8")
    assert not any(block.heavy for block in blocks("first_run.md", text))


WRITES = "```python\nfrom pathlib import Path; Path('a').write_text('1')\n```\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\n\n1 / 0\n```", "d.md, line 1: ZeroDivisionError"),
        ("    jax-moe inspect nowhere", "ended with status 1"),
        ("<!-- not run: long -->\n\n    jax-moe inspect --nonsense x", "line 3: SystemExit"),
        ("<!-- not run: long -->\n    make nonsense", "make nonsense: must be one of train, test"),
        (f"{WRITES}```\n$ python train/plots.py --compare a b.png\n```", "status 2"),
        (WRITES + WRITES, "writes what an earlier block"),
        ("```python\nprint('a', 1.5)\n```\n\n<!-- printed -->\n```text\nb 2e-7\n```", "prints 'a 1.5.n', not 'b 2e-7'"),
        ("```python\nprint('a b')\n```\n\n<!-- printed -->\n```text\na ... c\n```", "prints 'a b.n', not 'a ... c'"),
    ],
)
def test_a_block_that_is_wrong_is_found(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with pytest.raises(RuntimeError, match=message):
        for block in blocks("d.md", text):
            run(block, names, tmp_path)


def test_marks_and_kinds() -> None:
    text = "tokens\n\n    tokens -> routing\n\n<!-- not run: why -->\n\n    make test  # all\n    make check\n\n"
    text += "```\nno\n```\n"
    (block,) = blocks("d.md", text)
    assert (block.kind, block.left_out, block.line) == ("shell", "why", 7)
    assert block.commands() == [["make", "test"], ["make", "check"]]
    for shown in ("a 2e-7, b", "a ... b", "... b"):
        (block,) = blocks("d.md", f"```python\nprint('a 1.5, b')\n```\n\n<!-- printed -->\n```text\n{shown}\n```\n")
        run(block, {}, Path.cwd())
    with pytest.raises(ValueError, match="a block must follow"):
        blocks("d.md", "<!-- not run: why -->\nprose")
