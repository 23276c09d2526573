"""The benchmarks' checks and commands, without timings: contestants agree; a contestant that differs is not timed."""

import importlib
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from benchmarks import decode_layer, layer_contestants, moe_layer, scaling, shapes, timing
from benchmarks.command import read_options
from benchmarks.contestant import TOLERANCE
from benchmarks.layer_contestants import ENTRIES, Entry
from benchmarks.shapes import Shape
from benchmarks.timing import new_file

pytestmark = pytest.mark.usefixtures("quick")
TINY = Shape(32, 16, 24, 4, 2)
MEASURED = {"float32": 2.3e-7, "bfloat16": 1.1e-2}


@pytest.mark.parametrize(
    ("dtype", "left_out"), [("float32", set()), ("bfloat16", {"jax_moe einsum", "transformers eager"})]
)
def test_all_contestants_agree(dtype: str, left_out: set[str]) -> None:
    asked = set(layer_contestants.names(None)) - left_out
    chosen, notes = moe_layer.entrants(TINY, dtype, asked)
    assert {"dense limit", "jax_moe auto", "ragged_dot"} <= set(chosen) == asked
    errors = [note["difference"] for note in notes.values() if "difference" in note]
    assert len(errors) == len(chosen) - 1 and max(errors) < min(TOLERANCE[dtype], 10 * MEASURED[dtype])
    assert max(errors) > 0


def test_no_choice_hangs_on_rounding() -> None:
    logits = {dtype: np.sort(_logits(dtype), axis=1) for dtype in TOLERANCE}
    gaps = {dtype: (a[:, -2] - a[:, -3]).min() for dtype, a in logits.items()}
    assert gaps["float32"] < shapes.MARGIN["bfloat16"] < gaps["bfloat16"]


def _logits(dtype: str) -> np.ndarray:
    numbers = Shape(256, 16, 2, 8, 2).numbers(dtype)
    return np.asarray(numbers["x"], np.float32) @ np.asarray(numbers["router"], np.float32)


def _slightly_wrong(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return 1.0002 * jax.lax.ragged_dot(rows, weights, group_sizes)


def _breaks(shape: Shape, numbers: Any) -> Any:
    """A planted fault: a peer's kernel raises on an unsupported device; the command must report it and continue."""
    raise NotImplementedError("no kernel for this device\nand more")


def test_a_wrong_contestant_is_not_timed_and_all_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    planted = {
        "ragged_dot": Entry(partial(layer_contestants.sorted_rows, grouped_product=_slightly_wrong)),
        "jax_moe ragged": Entry(_breaks), "tokamax": Entry(_breaks, ("no_such_package",)),
    }
    for name, entry in planted.items():
        monkeypatch.setitem(ENTRIES, name, entry)
    monkeypatch.setattr(timing, "product_rate", lambda dtype, side: 1e9)
    asked = ["--shape", TINY.name, "--only", ",".join(["jax_moe einsum", *planted]), "--rounds", "1", "--save"]
    assert moe_layer.main([*asked, "--results", str(tmp_path), "--json"]) == 1
    about = json.loads(capsys.readouterr().out)
    (result,) = about["results"]
    notes = result["notes"]
    assert set(result["both"]) == {"dense limit", "jax_moe einsum"}
    assert "differs from jax_moe einsum by" in notes["ragged_dot"]["failed"]
    assert notes["jax_moe ragged"]["failed"] == "NotImplementedError: no kernel for this device"
    assert notes["tokamax"] == {"left_out": "no_such_package is not installed"}
    # 32 tokens, 2 choices, 3 products of 16 x 24, 2 FLOPs, 3 with the gradients
    cell = result["both"]["jax_moe einsum"]
    assert cell["share_of_rate"] * cell["ms"] * 1e6 == pytest.approx(32 * 2 * 3 * 16 * 24 * 2 * 3)
    moe_layer.show(result)
    assert "tokamax                   left out: no_such_package is not installed" in capsys.readouterr().out
    first = f"{about['date'][:10]}-cpu"
    assert new_file(about, tmp_path).name == f"{first}-2.json"
    assert [path.name for path in tmp_path.iterdir()] == [f"{first}.json"]
    assert json.loads((tmp_path / f"{first}.json").read_text()) == about


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (moe_layer.main, ["--shape", "1,2"], "shape='1,2': must be T,D,F,E,K"),
        (moe_layer.main, ["--shape", "8,8,8,2,0"], "five integers of at least 1, or one of cpu, mixtral-8x7b"),
        (moe_layer.main, ["--shape", "8,8,8,2,3"], "shape='8,8,8,2,3': must be of K=3 at most E=2"),
        (moe_layer.main, ["--only", "megablocks"], "only='megablocks': must be one of dense limit"),
        (moe_layer.main, ["--rounds", "0"], "rounds=0: must be an integer of at least 1"),
        (moe_layer.main, ["--dtype", "int8"], "invalid choice 'int8'"),
        (
            moe_layer.main, ["--plot", "no/such/folder.png"],
            "plot='no/such/folder.png': must be in a folder that exists",
        ),
        (scaling.main, ["--only", "heads"], "only='heads': must be one of experts, tokens, layers, mesh"),
        (scaling.main, ["--rounds", "many"], "--rounds"),
        (scaling.main, ["more"], "Unrecognized options: more"),
    ],
)
def test_bad_input_is_refused(
    main: Callable[[list[str]], int], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    assert words in " ".join(printed.err.replace("\u2502", " ").split()) and "Traceback" not in printed.err


@dataclass(frozen=True)
class WithFactor:
    """Options with a capacity."""

    capacity_factor: float | None = 1.0


def test_a_capacity_factor(capsys: pytest.CaptureFixture[str]) -> None:
    for text, factor in (("1.25", 1.25), ("none", None), ("NONE", None)):
        assert read_options(WithFactor, "x", None, ["--capacity-factor", text]).capacity_factor == factor
    with pytest.raises(SystemExit):
        read_options(WithFactor, "x", None, ["--capacity-factor", "dropless"])
    assert "'dropless': must be a number, or none" in capsys.readouterr().err


def commands(document: Path) -> list[tuple[str, list[str]]]:
    """(benchmark, its options) of every `python -m benchmarks...` in a document or a docstring."""
    found = re.findall(r"python -m benchmarks\.(\w+)([^`\n\[]*)", document.read_text())
    return [(name, shlex.split(words, comments=True)) for name, words in found]


ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
DOCUMENTED = sorted({(name, tuple(words)) for document in DOCUMENTS for name, words in commands(document)})


@pytest.mark.parametrize("name", sorted({name for name, _ in DOCUMENTED}))
def test_documented_commands_and_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name in ("finetune_step", "generate", "train_step"):
        pytest.importorskip("torch", reason=f"benchmarks.{name} compares with PyTorch")
    with mock.patch.dict(os.environ):  # tpu_compile sets variables for the TPU compiler
        module = importlib.import_module(f"benchmarks.{name}")
    for other, words in DOCUMENTED:
        if other == name:
            read_options(module.Options, name, None, [word for word in words if word != "..."])
    with pytest.raises(SystemExit) as stopped:
        read_options(module.Options, f"benchmarks.{name}", module.__doc__, ["--help"])
    assert stopped.value.code == 0 and f"python -m benchmarks.{name}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        read_options(module.Options, name, None, ["--no-such-option"])
    assert stopped.value.code == 2


def test_names_of_shapes() -> None:
    assert [shape.T for shape in moe_layer.read_shape("mixtral-8x7b")] == [8192, 32768]
    everything = moe_layer.read_shape("gpu")
    assert sorted(shape.name for shape in everything) == sorted(
        shape.name for name in ("mixtral-8x7b", "qwen3-30b", "fine-grained") for shape in moe_layer.read_shape(name)
    )
    assert [shape.name for shape in everything][::4] == ["16384,2560,1280,64,4", "32768,4096,14336,8,2"]


def test_a_device_that_jax_does_not_find_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        moe_layer.main(["--device", "tpu"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == "device='tpu': must be cpu, which jax finds here\n" and printed.out == ""


def test_a_mesh_needs_its_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--only", "mesh"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("only='mesh': must be left out with 1 device (XLA_FLAGS=") and printed.out == ""


def test_dispatchers_that_decode_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    row = decode_layer.measure(Shape(3, 16, 24, 8, 2), rounds=1)
    assert 1 < row["touched"] <= 6 and set(decode_layer.DISPATCHERS) < set(row["ms"])
    real = decode_layer.answer_of
    monkeypatch.setattr(
        decode_layer, "answer_of",
        lambda shape, name: lambda weights, x: real(shape, name)(weights, x) * (1.001 if name == "chosen" else 1),
    )
    with pytest.raises(ValueError, match="the answer of chosen differs from grouped's by 1"):
        decode_layer.measure(Shape(3, 16, 24, 8, 2), rounds=1)


def test_the_bytes_of_weak_scaling_in_theory() -> None:
    """By hand: what one device on the data axis sends, and 3/4 of six bytes for each number that it holds."""
    with mock.patch.dict(os.environ):  # it sets variables for the TPU compiler
        from benchmarks import weak_scaling
    with mock.patch.object(weak_scaling, "numbers_of_chip", lambda row: 1000):
        rows = [{"options": {"mesh": f"data={n},expert=8"}, "sent": {"all-to-all": 70.0}} for n in (1, 4)]
        assert [weak_scaling.in_theory(rows[0], row) for row in rows] == [70, 70 + 4500]


def test_scaling_compares_equal_work_and_programs_of_equal_size() -> None:
    for question, times in (("experts", 1), ("tokens", 2)):
        for _, large, _, small in scaling.PAIRS[question]:
            assert large.flops("both") == times * small.flops("both")
    sizes = {}
    for layers in (2, 3):
        step, arguments = scaling.training_step(partial(scaling.makemoe, layers))
        sizes[layers] = jax.jit(step).lower(*arguments).as_text().count("\n")
    assert sizes[2] == sizes[3]


def test_fine_tuning_steps_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both contestants train alike; with another learning rate the losses of the second step differ."""
    pytest.importorskip("transformers", reason="benchmarks.finetune_step compares with transformers")
    from benchmarks import finetune_step

    monkeypatch.setattr(finetune_step, "LAYERS", 2)
    monkeypatch.setattr(finetune_step, "POSITIONS", 16)
    finetune_step.write_folder(finetune_step.Shape("qwen3_moe", 16, 8, 4, 2), tmp_path)

    def losses(start: Callable[[Path], Callable[[int], float]]) -> list[float]:
        step = start(tmp_path)
        return [step(number) for number in range(2)]

    found = losses(finetune_step.jax_step)
    assert found == pytest.approx(losses(finetune_step.torch_step), rel=5e-7)  # measured 6.9e-8
    monkeypatch.setattr(finetune_step, "LEARNING_RATE", 2e-3)
    other = losses(finetune_step.torch_step)
    assert found[0] == pytest.approx(other[0], rel=5e-7)
    assert found[1] != pytest.approx(other[1], rel=5e-6)  # 2.5e-5
