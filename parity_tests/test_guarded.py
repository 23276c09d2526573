"""The readers of what comes from outside: small files that once passed a parser's own exception to the user."""

from pathlib import Path

import pytest

from jax_moe import guarded


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1' + "0" * 400 + "}", "is beyond the range of numbers"),
        ('{"a": 1' + "0" * 5000 + "}", "integer string"),
        (b"\xff\xfe{}", "can't decode byte"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
    ],
)
def test_json_that_cannot_be_read_is_one_line(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        guarded.parse_json(text, "here")
    assert str(caught.value).startswith("here: must be JSON (") and "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_numbers_that_tokenizers_really_write_are_read() -> None:
    assert guarded.parse_json('{"model_max_length": 1000000000000000019884624838656}', "") == {"model_max_length": int(1e30)}


def test_a_file_that_is_large_or_no_object_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"must be a JSON object, is \[1, 2\]"):
        guarded.read_object(file)
    with pytest.raises(ValueError, match="of at most 5 bytes, has 6"):
        guarded.read_json(file, max_bytes=5)
    with pytest.raises(FileNotFoundError):
        guarded.read_json(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be read"):
        guarded.read_json(tmp_path)


def test_a_request_beyond_the_machine_says_how_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "available_memory", lambda: 1000)
    guarded.require_memory(1000, "x")
    with pytest.raises(ValueError, match="x needs about 12,000 bytes of memory: must be at most 1,000"):
        guarded.require_memory(12_000, "x")
