"""Blocks of README.md and docs/ run as written, in order, in one folder; blocks left out are marked and checked."""

import importlib.util
import itertools
import shutil
import warnings
from pathlib import Path

import pytest

from moe_train.data import text as data
from parity_tests.repository.documents import ALONE, DOCUMENTS, ROOT, SITE, Block, blocks, run

pytestmark = pytest.mark.usefixtures("quick")
TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "tokenizers"))
SMALL = (
    "--steps 2 --eval-batches 1 --batch-size 2 --model-dim 16 --num-heads 2 --num-layers 1 --sample-length 5 "
    "--warmup-steps 0"
)


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without PyTorch, blocks run up to the first that needs it, as later blocks build on it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinyshakespeare.txt").write_text(data.plays()[:60_000], encoding="utf-8")
    # The files that `make train` and the blocks marked as long would leave.
    run(Block("runs", 1, "shell", f"python train/train.py {SMALL}"), {}, tmp_path)
    shutil.copytree(tmp_path / "runs" / "001", tmp_path / "runs" / "torch")
    assert run_all(DOCUMENTS, tmp_path, capsys) >= (20 if TORCH else 4)


def run_all(documents: list[Path], folder: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """How many blocks ran, in one namespace."""
    names: dict = {"__name__": "readme"}
    done = 0
    found = (blocks(document.name, document.read_text(encoding="utf-8")) for document in documents)
    for block in itertools.chain.from_iterable(found):
        if block.heavy and not TORCH:
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings are no errors for users
            run(block, names, folder)
        capsys.readouterr()
        done += 1
    return done


@pytest.mark.usefixtures("small_programs", "unchecked")
@pytest.mark.parametrize("page", ALONE, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_page_runs_by_itself(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    if "tinyshakespeare.txt" in text:
        (tmp_path / "tinyshakespeare.txt").write_text(data.plays()[:60_000], encoding="utf-8")
    run_all([page], tmp_path, capsys)


def test_every_page_is_listed() -> None:
    """In the navigation of the site; those directly in docs/, but for the first page, also in README's table."""
    assert sorted(SITE) == sorted((ROOT / "docs").rglob("*.md"))
    assert sorted(DOCUMENTS) == sorted([ROOT / "README.md", *(ROOT / "docs").glob("[!i]*.md")])


def test_the_first_python_block_needs_no_torch() -> None:
    first = next(
        block for block in blocks("README.md", DOCUMENTS[0].read_text(encoding="utf-8")) if block.kind == "python"
    )
    assert not first.heavy and first.left_out is None


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
    (block,) = blocks("d.md", "```python\nprint('a', 1.5)\n```\n\n<!-- printed -->\n```text\na 2e-7\n```\n")
    run(block, {}, Path.cwd())
    with pytest.raises(ValueError, match="a block must follow"):
        blocks("d.md", "<!-- not run: why -->\nprose")
