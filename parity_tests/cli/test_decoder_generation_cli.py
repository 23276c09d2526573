"""`jax-moe generate` on a Hugging Face folder: text with a tokenizer, tokens without, one line for each error."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'text': tokenizers")

import jax_moe  # noqa: E402
from jax_moe import guarded, presets  # noqa: E402
from jax_moe.generation.text import TextStream, end_tokens, read_tokenizer  # noqa: E402
from jax_moe.porting import checkpoint  # noqa: E402
from moe_cli.main import main  # noqa: E402
from parity_tests.cli.commands import fails  # noqa: E402
from parity_tests.layers.test_decoder import decoder  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick")
LINES = ["the king", "the queen and the king", "a gänse ☃ of the queen"]


def make_tokenizer() -> "tokenizers.Tokenizer":
    """Byte-level pairs with every byte, `<s>` (0) before a text and `</s>` (1)."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral folder with its tokenizer."""
    path = tmp_path_factory.mktemp("mixtral") / "model"
    tokenizer = make_tokenizer()
    moe = presets.mixtral(12, 6, 4, 2)
    model = decoder(vocab_size=tokenizer.get_vocab_size(), moe=moe, num_layers=2, norm_eps=1e-5)
    jax_moe.save_pretrained(model, path, model_type="mixtral")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """What a greedy text of eight tokens prints."""
    command = ["generate", str(folder), "--max-new-tokens", "8", "--temperature", "0", *arguments]
    assert main(command) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_text_numbers_and_stops(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = read_tokenizer(folder)
    prompt = [0, *tokenizer.encode("the queen", add_special_tokens=False).ids]
    assert tokenizer.encode("the queen").ids == prompt
    model = jax_moe.load_pretrained(folder)
    tokens = np.asarray(jax_moe.generate(model, np.asarray([prompt], np.int32), max_new_tokens=8, temperature=0))[
        0
    ].tolist()
    expected = tokenizer.decode(tokens)
    assert run(capsys, folder, "--prompt", "the queen") == expected + "\n"
    numbers = ",".join(map(str, prompt))
    assert run(capsys, folder, "--tokens", numbers) == ",".join(map(str, tokens)) + "\n"
    new = tokens[len(prompt) :]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, new[3]]}))
    end = new.index(new[3])
    assert run(capsys, folder, "--tokens", numbers) == ",".join(map(str, [*prompt, *new[:end]])) + "\n"
    (folder / "generation_config.json").unlink()


def test_an_orbax_folder_writes_the_same(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tokenizer came with it, and where a text ends is said by the config.json that it was made from."""
    tokenizer, source, orbax = read_tokenizer(folder), tmp_path / "model", tmp_path / "orbax"
    prompt = tokenizer.encode("the queen").ids
    numbers = ",".join(map(str, prompt))
    tokens = [int(one) for one in run(capsys, folder, "--tokens", numbers).split(",")]
    text = tokens[: tokens.index(tokens[-3], len(prompt))]
    shutil.copytree(folder, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": tokens[-3]}))
    assert main(["port", str(source), str(orbax)]) == 0
    capsys.readouterr()
    assert run(capsys, orbax, "--tokens", numbers) == ",".join(map(str, text)) + "\n"
    assert run(capsys, orbax, "--prompt", "the queen") == tokenizer.decode(text) + "\n"
    checkpoint.save(checkpoint.load(orbax), tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_pieces_of_a_text_are_the_text() -> None:
    tokenizer = make_tokenizer()
    for text in [*LINES, "zwölf ☃☃ 雪"]:
        prompt, new = tokenizer.encode("a ").ids, tokenizer.encode(text, add_special_tokens=False).ids
        stream = TextStream(tokenizer, prompt)
        pieces = [stream.add(token) for token in new]
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces) and "".join(pieces) == text
        assert stream.rest() == ""
    stream = TextStream(tokenizer, prompt)
    snow = tokenizer.encode("雪", add_special_tokens=False).ids
    assert [stream.add(token) for token in snow[:-1]] == [""] * (len(snow) - 1) and len(snow) > 1
    assert "\N{REPLACEMENT CHARACTER}" in stream.rest()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": {"eos_token_id": 3}}, (3,)),
        ({"config.json": {"eos_token_id": 3}, "generation_config.json": {"eos_token_id": [5, 6]}}, (5, 6)),
        ({"config.json": {"eos_token_id": 3}, "generation_config.json": {}}, (3,)),
        ({"config.json": {"eos_token_id": None}}, ()),
    ],
)
def test_end_tokens(files: dict, expected: tuple, tmp_path: Path) -> None:
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    assert end_tokens(tmp_path, json.dumps(files["config.json"])) == expected


def test_errors(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def line(*arguments: str) -> str:
        return fails(capsys, "generate", folder, "--temperature", "0", *arguments)

    vocab_size = read_tokenizer(folder).get_vocab_size()
    assert f"token 9999: must be 0 to {vocab_size - 1}" in line("--tokens", "1,9999")
    assert "tokens='1,x': must be whole numbers separated by commas" in line("--tokens", "1,x")
    assert "prompt=None: must be given, or --tokens instead" in line()
    assert "tokens='1': must be left out where there is a prompt" in line("--tokens", "1", "--prompt", "a")
    for wrong in ("x", 1.5, True, [1, None], [[1]]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        assert f"eos_token_id={wrong!r}: must be null, a token or a list of tokens" in line("--tokens", "1")
    for outside in (vocab_size, -1):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, outside]}))
        assert f"eos_token_id={outside}: must be 0 to {vocab_size - 1}, the model's vocabulary" in line("--tokens", "1")
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json: must be JSON" in line("--tokens", "1")
    (folder / "generation_config.json").unlink()
    text = (folder / "tokenizer.json").read_text()
    bare = json.loads(text) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(bare))
    assert "prompt='': must be a text of at least one token" in line("--prompt", "")
    (folder / "tokenizer.json").write_bytes(guarded.LFS_POINTER + b"v1\noid sha256:0\nsize 9\n")
    assert "tokenizer.json: is a Git LFS pointer" in line("--prompt", "a")
    (folder / "tokenizer.json").write_text("[]")
    assert "tokenizer.json: must be a tokenizer" in line("--prompt", "a")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)  # what import does where it is not installed
        assert "needs the package tokenizers: pip install 'jax-moe[text]'" in line("--prompt", "a")
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json; --tokens 1,2,3" in line("--prompt", "a")
    (folder / "tokenizer.json").write_text(text)
