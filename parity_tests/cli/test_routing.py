"""`jax-moe routing`: its numbers against counts by hand and by numpy, what it reads, and its errors."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe.porting.checkpoint import load
from moe_cli.main import main
from moe_parity.pages.visible import visible
from moe_parity.routing.numbers import MOST_TAKEN, Taken, least_occurrences, numbers
from moe_parity.routing.observe import observe
from parity_tests.cli.commands import fails
from parity_tests.cli.routing_cases import (
    BLOCK,
    CHARACTERS,
    HOSTILE,
    Shown,
    character_model,
    observed,
    save_makemoe,
    written,
)
from parity_tests.porting.decoder_cases import decoder
from parity_tests.porting.porting_cases import STATES

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def makemoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests do not change it."""
    return save_makemoe(tmp_path_factory.mktemp("makemoe") / "model")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE folder with a tokenizer, whose layers 0 and 2 are dense. Tests do not change it."""
    pytest.importorskip("tokenizers", reason="needs the extra 'text': tokenizers")
    from parity_tests.cli.test_decoder_generation_cli import make_tokenizer

    path, tokenizer = tmp_path_factory.mktemp("decoder") / "model", make_tokenizer()
    model = decoder("qwen3_moe", vocab_size=tokenizer.get_vocab_size())
    jax_moe.save_pretrained(model, path, model_type="qwen3_moe")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What --json prints."""
    assert main(["routing", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_count_by_hand() -> None:
    """Tokens 7 7 9 9 9 5 over three experts."""
    choices = [[0, 1], [0, 2], [1, 0], [1, 2], [1, 2], [2, 1]]
    (layer,) = numbers(observed([7, 7, 9, 9, 9, 5], choices, [[0, 0], [0, 1], [0, 0], [1, 1], [0, 0], [0, 0]]), (4,), 3)
    assert layer.layer == 4
    assert layer.choices_E.tolist() == [3, 5, 4] and layer.load_E.tolist() == [3 / 12, 5 / 12, 4 / 12]
    assert layer.dropped_E.tolist() == [0, 1, 2] and layer.dropped_fraction == 3 / 12 and layer.lost_tokens == 1
    assert layer.together_EE.tolist() == [[3, 2, 1], [2, 5, 3], [1, 3, 4]]
    assert layer.with_EE[0].tolist() == [0, 2 / 3, 1 / 3] and layer.with_EE.sum(axis=1) == pytest.approx([1, 1, 1])
    assert layer.pairs(2) == [(1, 2, 3), (0, 1, 2)] and len(layer.pairs(9)) == 3
    assert layer.entropy_share == 0.5 / math.log(3)
    # expert 0 has 3 of 6 tokens, both 7s and a 9; expert 1 all but one 7; expert 2 a 7, two 9s and the 5
    assert layer.taken[0] == (Taken(7, 2, 2, 1 / (3 / 6)),)
    assert layer.taken[1] == (Taken(9, 3, 3, 1 / (5 / 6)), Taken(5, 1, 1, 1 / (5 / 6)))
    assert layer.taken[2] == (Taken(5, 1, 1, 1 / (4 / 6)),)  # 9 has the lift 1: as often as any token
    assert layer.taken[0][0].share == 1


def test_rare_tokens_are_not_listed() -> None:
    """Among 512 tokens one must occur three times; an unused expert takes none; a single expert has no entropy."""
    tokens = [*range(100), *[500] * 412]
    (layer,) = numbers(observed(tokens, [[e % 2] for e in range(100)] + [[0]] * 412), (0,), 3)
    assert least_occurrences(512) == 3 and [least_occurrences(n) for n in (1, 255, 10**6)] == [1, 1, 5]
    assert [[each.token for each in of] for of in layer.taken] == [[500], [], []]
    (single,) = numbers(observed([1, 2], [[0], [0]]), (0,), 1)
    assert single.entropy_share == 0 and single.taken == ((),) and single.load_E.tolist() == [1]


def drops(expert_TK: np.ndarray, capacity: int) -> np.ndarray:
    """The choices beyond an expert's capacity, in token order."""
    queue, dropped = Counter[int](), np.zeros(expert_TK.shape, bool)
    for place in np.ndindex(expert_TK.shape):
        dropped[place] = queue[expert_TK[place]] >= capacity
        queue[expert_TK[place]] += 1
    return dropped


def test_makemoe_is_recounted(makemoe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each window alone: choices of the model's own run, drops in token order, statistics of the layers."""
    text = (HOSTILE * 3)[: 3 * BLOCK + 5]
    json_said = said(capsys, makemoe, "--text", written(tmp_path, text))
    model: Any = load(makemoe).module
    parts = [text[start : start + BLOCK] for start in range(0, len(text), BLOCK)]
    run_on = jax.jit(lambda token_BT: model.run(token_BT, training=False)[1:3])
    runs = [run_on(jnp.asarray([[CHARACTERS.index(c) for c in part]])) for part in parts]
    lengths = np.asarray([len(part) for part in parts])
    assert lengths.tolist() == [8, 8, 8, 5] and json_said["tokens"] == 29 and json_said["window"] == BLOCK
    assert (json_said["model"], json_said["num_experts"], json_said["top_k"]) == ("makemoe", 4, 2)
    for row, layer in enumerate(json_said["layers"]):
        chosen = [np.asarray(expert_LBTK[row, 0]) for _, expert_LBTK in runs]
        lost = [drops(each, len(each) * 2 // 4) for each in chosen]
        all_chosen, all_lost = np.concatenate(chosen), np.concatenate(lost)
        assert layer["layer"] == row and layer["choices"] == np.bincount(all_chosen.ravel(), minlength=4).tolist()
        assert layer["dropped"] == np.bincount(all_chosen[all_lost], minlength=4).tolist() and sum(layer["dropped"]) > 0
        assert layer["lost_tokens"] == int(all_lost.all(axis=1).sum())
        handed_out = {
            name: np.average([getattr(stats, field)[row] for stats, _ in runs], axis=0, weights=lengths)
            for name, field in (
                ("load", "expert_load_E"), ("dropped_fraction", "dropped_fraction"), ("entropy", "router_entropy")
            )
        }
        for name, value in handed_out.items():
            np.testing.assert_allclose(layer[name], value, rtol=1e-5, err_msg=name)
        pairs = Counter(frozenset(each) for each in all_chosen.tolist())
        assert all(layer["together"][e][f] == pairs[frozenset((e, f))] for e in range(4) for f in range(4) if e != f)
        for e, taken in enumerate(layer["taken"]):
            for each in taken:
                here = [e in row for row, c in zip(all_chosen.tolist(), text, strict=True) if c == each["text"]]
                assert (each["count"], each["occurrences"]) == (sum(here), len(here)), (e, each)
                assert each["lift"] > 1 and each["share"] == sum(here) / len(here)
            assert len(taken) <= MOST_TAKEN and sorted(taken, key=lambda each: -each["lift"]) == taken


def test_weights_are_those_before_drops() -> None:
    """Also where the contract renormalises afterwards; dropless, nothing is dropped."""
    model = character_model(capacity_factor=None)
    tight = character_model(capacity_factor=0.5)
    tokens = [np.arange(BLOCK) % len(CHARACTERS)]
    free, few = observe(model, tokens), observe(tight, tokens)
    assert not free.dropped_LNK.any() and few.dropped_LNK.any()
    np.testing.assert_allclose(free.weight_LNK.sum(axis=2), 1, rtol=1e-6)
    np.testing.assert_allclose(few.weight_LNK[0], free.weight_LNK[0], rtol=1e-6)  # the same input in the first layer
    assert np.array_equal(few.expert_LNK[0], free.expert_LNK[0])


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_decoders(family: str) -> None:
    """Each window of the longest text alone."""
    model = decoder(family, max_positions=4)
    token_T = np.random.default_rng(0).integers(0, 11, 8)
    found = observe(model, [token_T, token_T[4:]])
    assert found.start_N.tolist() == [n in (0, 4, 8) for n in range(12)] and not found.dropped_LNK.any()
    (both,) = jax.jit(lambda token_BT: (model.run(token_BT).expert_LBTK,))(jnp.asarray(token_T.reshape(2, 4)))
    assert np.array_equal(found.expert_LNK, np.asarray(both)[:, [0, 1, 1]].reshape(-1, 12, 2))
    assert (found.entropy_L > 0).all() and len(found.entropy_L) == len(model.config.moe_layers)
    assert [layer.layer for layer in numbers(found, model.config.moe_layers, 4)] == list(model.config.moe_layers)


def test_a_tokenizer_reads_the_text(mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its pieces are the text again; tokens in a file, and an Orbax checkpoint, give the same numbers."""
    text = "the king <script>gänse ☃</script> and the queen\n\N{ESCAPE}[31m"
    source, out = written(tmp_path, text), tmp_path / "out.html"
    first = said(capsys, mixtral, "--text", source, "--html", out)
    assert [layer["layer"] for layer in first["layers"]] == [1] and first["window"] == 2048
    shown, content = Shown.of(out.read_text(encoding="utf-8"))
    pieces = [piece for piece, kind in zip(shown.pieces, content["base"], strict=True) if " m" not in kind]
    assert "".join(pieces) == visible(text) and shown.pieces[0] == "<s>" and " m" in content["base"][0]
    assert "Dense, and left out: layers 0, 2." in shown.text and "windows" not in shown.text
    from jax_moe.generation.text import read_tokenizer

    tokens = read_tokenizer(mixtral).encode(text).ids
    np.save(tmp_path / "tokens.npy", np.asarray([tokens]))
    assert said(capsys, mixtral, "--text", tmp_path / "tokens.npy") == first
    assert main(["port", str(mixtral), str(tmp_path / "orbax")]) == 0
    capsys.readouterr()
    assert said(capsys, tmp_path / "orbax", "--text", source) == first


def test_cut_and_characters_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file that stores no characters they come from the training text; of several sequences the first are read."""
    from jax_moe.porting.formats.state_file import write_state

    model, alphabet = tmp_path / "model.safetensors", "abcdefghijk"
    write_state(model, STATES["makemoe"]())
    training = tmp_path / "training.txt"
    training.write_text(alphabet)
    text = written(tmp_path, "abcabcabc")
    words = ["--text", str(text), "--training-text", str(training), "--max-tokens", "4"]
    assert main(["routing", str(model), *words]) == 0
    streams = capsys.readouterr()
    assert streams.out.startswith("4 tokens, ") and "first 4 of 9 tokens; --max-tokens 9 reads all" in streams.err
    assert "assumed, as the file does not store them" in streams.err
    np.save(tmp_path / "two.npy", np.asarray([[0, 1, 2, 3], [3, 4, 5, 6]]))
    assert said(capsys, model, "--text", tmp_path / "two.npy", "--max-tokens", "4")["tokens"] == 4
    assert "does not store the characters" in fails(capsys, "routing", model, "--text", text)


def test_errors(makemoe: Path, mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, and nothing is written."""
    from jax_moe.porting.formats.state_file import write_state

    text, empty, out = written(tmp_path, "not known: Q"), tmp_path / "empty.txt", tmp_path / "out.html"
    empty.write_text("")
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    soft, layer, bare = tmp_path / "soft.safetensors", tmp_path / "layer.safetensors", tmp_path / "bare"
    write_state(soft, STATES["soft_moe"]())
    write_state(layer, STATES["mixtral"]())
    jax_moe.save_pretrained(decoder("mixtral"), bare, model_type="mixtral")
    np.save(tmp_path / "outside.npy", np.asarray([999]))
    np.save(tmp_path / "floats.npy", np.asarray([0.5]))
    known = tmp_path / "known.txt"
    known.write_text("able")
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in (
        ((makemoe, "--text", tmp_path / "no.txt"), "must be a readable text file (No such file or directory)"),
        ((makemoe, "--text", tmp_path / "no.npy"), "cannot be read (No such file or directory)"),
        ((makemoe, "--text", empty), "must be a text of at least one token, is empty"),
        ((makemoe, "--text", tmp_path / "latin.txt"), "must be UTF-8, byte 0 is not"),
        ((makemoe, "--text", text), "the model has no ':', 'Q', 'k', 'w'"),
        ((makemoe, "--text", tmp_path / "outside.npy"), "token 999"),
        ((makemoe, "--text", tmp_path / "floats.npy"), "must hold integers [sequences, positions]"),
        ((makemoe, "--text", known, "--max-tokens", "0"), "max_tokens=0: must be at least 1"),
        ((mixtral, "--text", tmp_path / "outside.npy"), "token 999"),
        ((mixtral, "--text", known, "--training-text", known), "only a makeMoE language model has characters"),
        ((bare, "--text", known), "has no tokenizer.json; give tokens in a .npy file by --text"),
        ((soft, "--text", known), "must be a language model with routed experts"),
        ((layer, "--text", known), "must be a language model with routed experts"),
        ((tmp_path / "nothing", "--text", known), "nothing"),
        ((makemoe, "--text", known, "--html", tmp_path), "must be the name of a file, is a folder"),
        ((makemoe, "--text", known, "--html", tmp_path / "no" / "a.html"), "in a folder that exists"),
        ((makemoe, "--text", known, "--html", known), "must be another file than --text"),
    ):
        line = fails(capsys, "routing", *arguments, *(() if "--html" in arguments else ("--html", out)))
        assert words in line, (arguments, line)
    assert sorted(tmp_path.rglob("*")) == before and known.read_text() == "able"


def test_a_wrong_option_is_not_said_to_be_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    """`--max-tokens` is an option here, and called otherwise by `generate`."""
    for words, count in ((["routing", "x", "--max-tokens", "3"], 0), (["generate", "x", "--max-tokens", "3"], 1)):
        with pytest.raises(SystemExit):
            main(words)
        assert capsys.readouterr().err.count("--max-tokens is called --max-new-tokens here") == count
