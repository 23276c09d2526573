"""`.pt` files of trainers: dictionaries opened and said so, optimizers that are none, tensors that are no arrays."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_moe
from jax_moe.porting.formats import wrapped
from jax_moe.porting.formats.judged import check_optimizer
from jax_moe.porting.formats.state_file import read_state, write_state
from moe_cli.main import main
from parity_tests.cli.commands import fails, run
from parity_tests.porting.porting_cases import makemoe_state

torch = pytest.importorskip("torch", reason="reads and writes .pt files")

SETTINGS = ("--top-k", "2", "--capacity-factor", "1", "--dropout", "0")


def state() -> dict[str, Any]:
    return {name: torch.tensor(value) for name, value in makemoe_state().items()}


def refused(path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> str:
    """What the commands say of a file, all the same."""
    lines = {fails(capsys, command, path) for command in ("inspect", "generate", "parity")}
    lines.add(fails(capsys, "port", path, tmp_path / "out"))
    assert len(lines) == 1, lines
    return lines.pop()


ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "phi is .*sparse_csr"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64).conj(), "phi is .*complex64"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "phi is .*qint8"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "phi is nested"),
    "jagged": (lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "jagged|refused, its pickle"),
    "float8": (lambda: torch.ones(3).to(torch.float8_e8m0fnu), "phi is float8_e8m0fnu"),
    "negative": (lambda: torch._neg_view(torch.ones(3)), "phi is stored as its negative"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ODD)
def test_tensors_that_are_no_arrays(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, said = ODD[name]
    torch.save({"phi": make(), "x": torch.ones(2)}, tmp_path / "a.pt")
    assert re.search(said, refused(tmp_path / "a.pt", capsys, tmp_path))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"phi": torch.zeros(1_000_000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert (tmp_path / "b.pt").stat().st_size < 20_000
    with pytest.raises(ValueError, match="they are compressed or overlap"):
        read_state(tmp_path / "b.pt")


def test_a_pickled_module_is_refused_with_the_cure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")  # as makeMoE's own notebook saves its model
    line = refused(tmp_path / "model.pt", capsys, tmp_path)
    assert "(torch.nn.modules.linear.Linear)" in line and "torch.save(model.state_dict(), FILE)" in line


WRAPPED: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "lightning": (
        lambda s: {"state_dict": {f"model.{n}": v for n, v in s.items()}, "epoch": 3, "optimizer_states": []},
        ('from "state_dict" of a dictionary (beside it: epoch, optimizer_states)', "names without model."),
    ),
    "the tutorial's": (
        lambda s: {"model_state_dict": s, "epoch": 3, "loss": 0.5}, ('from "model_state_dict"', "epoch, loss")
    ),
    "compiled": (
        lambda s: {"model": {f"_orig_mod.{n}": v for n, v in s.items()}}, ('from "model"', "names without _orig_mod.")
    ),
    "twice": (lambda s: {"model": {"module": s}}, ('from "model.module" of a dictionary',)),
    "the names alone": (lambda s: {f"module.{n}": v for n, v in s.items()}, ("names without module.",)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_dictionaries_of_trainers_are_opened_and_said(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrap, said = WRAPPED[name]
    torch.save(wrap(state()), tmp_path / "a.pt")
    printed = run(capsys, "inspect", tmp_path / "a.pt")
    assert all(words in printed for words in said), printed
    printed = run(capsys, "port", tmp_path / "a.pt", tmp_path / "b.pt", *SETTINGS)
    assert all(words in printed for words in said), printed
    write_state(tmp_path / "c.pt", makemoe_state())
    run(capsys, "port", tmp_path / "c.pt", tmp_path / "d.pt", *SETTINGS)
    ours, plain = read_state(tmp_path / "b.pt"), read_state(tmp_path / "d.pt")
    assert ours.keys() == plain.keys() and all(np.array_equal(ours[n], plain[n]) for n in plain)


def trained(words: tuple[str, str], prefix: str = "", named: bool = False) -> dict[str, Any]:
    """A training file of a loop around a wrapped module, after one step."""
    parameters = {n: torch.nn.Parameter(v.clone()) for n, v in state().items() if not n.endswith("tril")}
    given = [(f"{prefix}{n}", p) for n, p in parameters.items()]
    optimizer = torch.optim.AdamW(given if named else [p for _, p in given], lr=1e-3)
    sum((p**2).sum() for p in parameters.values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    weights = {f"{prefix}{n}": v for n, v in (state() | {n: p.detach() for n, p in parameters.items()}).items()}
    return {words[0]: weights, words[1]: optimizer.state_dict(), "epoch": 2}


@pytest.mark.parametrize(
    "words", [("model", "optimizer"), ("model_state_dict", "optimizer_state_dict"), ("state_dict", "optim")]
)
def test_training_files_under_other_words_and_prefixes(
    words: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, wrapped_file = tmp_path / "a.pt", tmp_path / "w.pt"
    torch.save(trained(("model", "optimizer")), plain)
    torch.save(trained(words, "_orig_mod.", named=words[0] == "state_dict"), wrapped_file)
    assert "makemoe" in run(capsys, "inspect", wrapped_file)  # and generate and parity, which load in the same way
    for file in (plain, wrapped_file):
        assert main(["port", str(file), str(file.with_suffix(".out.pt")), *SETTINGS]) == 0
    printed = capsys.readouterr().out
    assert "optimizer state (exp_avg and exp_avg_sq) after 1 steps" in printed and "names without _orig_mod." in printed
    one, two = (torch.load(file.with_suffix(".out.pt"), weights_only=True) for file in (plain, wrapped_file))
    assert one["model"].keys() == two["model"].keys() and one["epoch"] == two["epoch"] == 2
    for i, entry in one["optimizer"]["state"].items():
        assert all(torch.equal(entry[word], two["optimizer"]["state"][i][word]) for word in entry)


def test_generate_reads_a_training_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(trained(("model", "optimizer"), "_orig_mod."), tmp_path / "a.pt")
    (tmp_path / "text").write_text("abcdefghijk")
    arguments = [
        "generate", str(tmp_path / "a.pt"), "--text", str(tmp_path / "text"), "--prompt", "a", "--max-new-tokens", "2"
    ]
    assert main([*arguments, "--capacity-factor", "none"]) == 0
    streams = capsys.readouterr()
    assert len(streams.out.strip()) == 3 and "names without _orig_mod." in streams.err
    assert "the optimizer's state" in streams.err


STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no groups": (lambda s: s.pop("param_groups"), "must be what torch.optim's"),
    "groups of text": (lambda s: s.update(param_groups=["x"]), "must be what torch.optim's"),
    "numbers of text": (lambda s: s["param_groups"][0].update(params=["a"]), "must be what torch.optim's"),
    "betas of text": (lambda s: s["param_groups"][0].update(betas="ab"), "must be what torch.optim's"),
    "names of numbers": (lambda s: s["param_groups"][0].update(param_names=[1]), "must be what torch.optim's"),
    "an entry of text": (lambda s: s["state"].update({0: "x"}), "must be what torch.optim's"),
    "endless steps": (
        lambda s: s["state"][0].update(step=torch.tensor(float("inf"))), r"step of parameter 0 is a tensor"
    ),
    "steps of text": (lambda s: s["state"][0].update(step="3"), "step of parameter 0 is '3'"),
    "steps of a vector": (
        lambda s: s["state"][0].update(step=torch.ones(3)), r"step of parameter 0 is a tensor of \[3\]"
    ),
    "half a step": (lambda s: s["state"][0].update(step=0.5), "step of parameter 0 is 0.5"),
    "moments of text": (lambda s: s["state"][0].update(exp_avg="x"), "exp_avg of parameter 0 is 'x'"),
    "an expanded moment": (
        lambda s: s["state"][0].update(exp_avg=torch.zeros(1).expand(10**9)), "says 4,000,000,000 bytes",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_an_optimizer_that_is_none(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = trained(("model", "optimizer"))
    change, said = STATES[name]
    change(whole["optimizer"])
    torch.save(whole, tmp_path / "a.pt")
    assert re.search(said, fails(capsys, "port", tmp_path / "a.pt", tmp_path / "b.pt", *SETTINGS))


def test_what_stands_beside_a_model_without_end_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = trained(("model", "optimizer"))
    twice: list[Any] = [0]
    for _ in range(60):
        twice = [twice, twice]  # 2^60 numbers in words, a kilobyte in a pickle
    whole["config"] = twice
    torch.save(whole, tmp_path / "a.pt")
    assert main(["port", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), *SETTINGS]) == 0
    assert "left out, as they are not plain values: config" in capsys.readouterr().err


def test_planted_faults_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the list of wrapper parts a compiled model is unknown; without the check any optimizer passes."""
    torch.save({f"_orig_mod.{n}": v for n, v in state().items()}, tmp_path / "b.pt")
    monkeypatch.setattr(wrapped, "PARTS", ())
    with pytest.raises(ValueError, match="its names begin with _orig_mod"):
        jax_moe.load(tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"torch.optim's state_dict"):
        check_optimizer([], "x")
