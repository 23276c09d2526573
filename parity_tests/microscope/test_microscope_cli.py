"""`jax-moe parity` as it is used: its table, JSON and page, its exit status, and one clear line for bad input."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_moe import guarded
from jax_moe.porting.formats.state_file import write_state
from moe_cli.main import main
from moe_parity import memory
from moe_parity.batch import read_tokens, read_vectors
from moe_parity.choices import Flip, Verdict
from moe_parity.explanation import search
from moe_parity.pages import plots
from moe_parity.pages.html import page
from moe_parity.report import Report, parts, worst
from moe_parity.stages import StageResult
from moe_parity.training.jax_side import Curve
from moe_parity.training.runs import Runs
from parity_tests.cli.commands import fails
from parity_tests.porting.porting_cases import STATES

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_state(tmp_path / "model.safetensors", STATES["makemoe"]())
    return tmp_path / "model.safetensors"


def named(model: Path, name: str, text: str) -> Path:
    (model.parent / name).write_text(text)
    return model.parent / name


class Links(HTMLParser):
    """What a page would load or run, its text and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.tags: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)


def check_page(text: str) -> Links:
    """One file that loads nothing and runs nothing."""
    found = Links()
    found.feed(text)
    assert found.open == [] and "script" not in found.tags and all(link.startswith("#") for link in found.links)
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|@import|xmlns|#[0-9a-f]{6}\b.*</svg>", text)
    ids = re.findall(r' id="([^"]*)"', text)
    assert {*found.links, *re.findall(r"url\((#\w+)\)", text)} == {f"#{name}" for name in ids}
    assert len(ids) == len({*ids})
    return found


def test_a_run_prints_a_table_json_and_a_page(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="the other side is PyTorch")
    tokens, out = named(model, "tokens.txt", "1 2, 3 4\n\n10,0,0,5\n"), model.parent / "report.html"
    assert main(["parity", str(model), "--tokens", str(tokens), "--html", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["passed"] and said["batch_shape"] == [2, 4] and said["first_divergence"] is None
    assert (said["reference"], said["dtype"], said["replay"]) == ("torch_ref", "float32", True)
    stages = {one["name"]: one for one in said["stages"]}
    assert len(stages) == len(said["stages"]) == 38 and stages["layer 2: chosen experts"]["agreement"] == 1
    assert 0 < stages["logits"]["error"] < stages["logits"]["tolerance"]
    found = check_page(out.read_text())
    assert found.tags["svg"] == 4 and "All 38 stages agree within tolerance in float32." in out.read_text()
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.safetensors", "report.html", "tokens.txt"]


def test_a_fault_is_exit_status_1(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="the other side is PyTorch")
    import torch_ref

    honest = torch_ref.MakeMoE.load_state_dict

    def swapped(self: Any, state: dict, strict: bool = True) -> object:
        one, two = (f"blocks.1.smoe.experts.{e}.net.0.weight" for e in (0, 1))
        return honest(self, {**state, one: state[two], two: state[one]}, strict=strict)

    monkeypatch.setattr(torch_ref.MakeMoE, "load_state_dict", swapped)
    assert main(["parity", str(model)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^First divergence: layer 1: expert outputs, error 1\.\d where .*a wrong number", out, re.M), out
    failed = [line.split("  ")[0] for line in out.splitlines() if line.rstrip().endswith("FAILED")]
    assert failed == ["layer 1", "layer 2", "after the layers"] and "--explain tries" in out
    monkeypatch.setattr(search, "explain_traces", lambda module, x, theirs: f"matches if {len(x)}")
    assert main(["parity", str(model), "--explain"]) == 1
    assert "too. Conventions: matches if 2.\n" in capsys.readouterr().out


def report(error: float = 1e-7, margin: float | None = None, layers: int = 2) -> Report:
    results = [StageResult("round trip of weights", None, "checkpoint", 0.0, 0.0, "same")]
    for i in range(layers):
        flips = () if margin is None or i else (Flip((0, 1), 2, 3, margin, 1e-5),)
        verdict: Verdict = "same" if not flips else "flip at a near tie" if flips[0].near_tie else "wrong number"
        fits: Verdict = "same" if error <= 1e-5 else "wrong number"
        results.append(StageResult(f"layer {i}: attention", i, "attention", error, 1e-5, fits))
        values: tuple[Any, ...] = (
            margin or 0.0, 1e-5, verdict, "", flips, len(flips), 0.5 if flips else 1.0, 1e-3, 1e-5
        )
        results.append(StageResult(f"layer {i}: chosen experts", i, "experts", *values))
    return Report("mixtral", "<b>theirs</b>", "float32", (2, 16), True, tuple(results))


def test_the_sentence_tells_a_flip_from_a_wrong_number() -> None:
    assert report().sentence() == "All 5 stages agree within tolerance in float32."
    flipped = report(margin=3e-7)
    assert flipped.passed and flipped.flips == 1
    assert flipped.sentence().endswith("; 1 choice differs at a near tie (margin at most 3e-07; replayed).")
    wrong = report(error=0.5)
    assert not wrong.passed
    assert wrong.sentence().startswith("First divergence: layer 0: attention, error 0.5 where 1e-05 is allowed")
    assert wrong.sentence().endswith("1 later stage is beyond tolerance too.")
    assert [one.name for one in map(worst, parts(wrong.results).values())][1:] == [
        "layer 0: attention",
        "layer 1: attention",
    ]


REPORTS = [report(), report(margin=3e-7), report(error=float("inf"), margin=0.1), report(layers=80), report(0.0)]


@pytest.mark.parametrize("one", REPORTS)
def test_a_page_is_whole_whatever_is_in_it(one: Report) -> None:
    text = page([one])
    check_page(text)
    assert "<b>theirs" not in text and not re.search(r'(points|cx|cy|[xyr][12]?|width|height)="[^"]*(nan|inf)', text)
    assert ('class="verdict wrong"' in text) == (not one.passed) and json.dumps(one.to_json(), allow_nan=False)
    tips = [f"<title>{stage.name}: {stage.error:.2g}, " for stage in one.results if stage.kind == "attention"]
    assert all(text.count(tip) == 2 for tip in tips), "each in the plot by stage and in the plot by layer"
    assert page([one]) == text


def test_an_axis_holds_its_values() -> None:
    assert plots.decades([1e-9, 3e-5, 0.0, float("inf")]) == pytest.approx((1e-10, 1e-3), rel=1e-12)
    assert plots.decades([0.0]) == pytest.approx((0.1, 10.0), rel=1e-12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 2 3\n4 x\n", "line 2: 'x': must be a number"),
        ("1 2 3\n4 5\n", "sequences must have the same length, but have 3, 2"),
        ("\n \n", "must hold at least one sequence"),
        ("1 2 3 11\n", "token 11 (sequence 1, position 4): must be 0 to 10 (vocab_size=11)"),
        ("1 2\n1 -2\n", "token -2 (sequence 2, position 2): must be 0 to 10"),
        ("1 2 3 4 5\n", "5 positions: must be 1 to 4"),
        ("9" * 30, "must be a number"),
        ("\udcff", "must be a .npy file, or text with a sequence of numbers per line"),
    ],
)
def test_bad_tokens_are_one_line(text: str, words: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = model.parent / "tokens.txt"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    line = fails(capsys, "parity", model, "--tokens", file)
    assert words in line and str(file) in line


def test_tokens_and_vectors_from_npy(tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    np.save(file, np.arange(6, dtype=np.uint16).reshape(2, 3))
    assert read_tokens(file).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match=r"must hold floats \[sequences, positions, 3\], holds uint16 \[2, 3\]"):
        read_vectors(file, 3)
    np.save(file, np.ones((1, 2, 3)))
    assert read_vectors(file, 3).shape == (1, 2, 3)
    with pytest.raises(ValueError, match="must hold integers"):
        read_tokens(file)
    np.save(file, np.full((1, 2, 3), np.nan))
    with pytest.raises(ValueError, match="must be finite"):
        read_vectors(file, 3)
    np.save(file, np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match="must hold numbers, holds Python objects"):
        read_tokens(file)
    file.write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"must be a \.npy file as np\.save"):
        read_tokens(file)


def test_bad_arguments_are_one_line_and_nothing_is_written(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model.parent
    layer = folder / "layer.safetensors"
    write_state(layer, STATES["mixtral"]())
    before = sorted(folder.rglob("*"))
    for arguments, words in (
        ((model, "--html", folder), "must be the name of a file, is a folder"),
        ((model, "--html", folder / "no" / "a.html"), "in a folder that exists"),
        ((model, "--html", folder / ("x" * 300)), "cannot be written"),
        ((model, "--tokens", folder / "no.txt"), "cannot be read (No such file or directory)"),
        ((model, "--tokens", folder), "cannot be read (Is a directory)"),
        ((model, "--tokens", folder / "no.npy"), "cannot be read"),
        ((model, "--tokens", model, "--num-tokens", "3"), "num_tokens=3: must be left out with --tokens"),
        ((model, "--num-tokens", "5"), "num_tokens: 5 positions: must be 1 to 4"),
        ((model, "--batch-size", "0"), "batch_size=0: must be at least 1"),
        ((layer, "--tokens", folder / "tokens.txt"), "a .npy of floats [sequences, positions, model_dim] for a layer"),
        ((folder, "--html", folder / "a.html"), "has no config.json"),
        ((model, "--plot", folder / "a.png"), "must be left out without --train: --html has the plots"),
        ((model, "--train", "2", "--explain"), "explain=True: must be left out with --train"),
        ((model, "--train", "2", "--dtype", "float64"), "dtype='float64': must be left out with --train"),
    ):
        assert words in fails(capsys, "parity", *arguments), arguments
    monkeypatch.setitem(sys.modules, "torch", None)  # what import does where it is not installed
    assert "parity needs PyTorch" in fails(capsys, "parity", model, "--html", folder / "a.html")
    assert sorted(folder.rglob("*")) == before


def test_too_little_memory_is_said_first(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    line = fails(capsys, "parity", model, "--grads", "--dtype", "float64")
    assert re.search(
        r"not enough memory for both sides: [\d,]+ parameters need about 0\.0 GB, 0\.0 GB are available", line
    )
    assert line.rstrip().endswith("less is needed with --dtype float32 and without --grads")
    monkeypatch.undo()
    assert guarded.available_memory() is None or guarded.available_memory() > 0  # type: ignore[operator]


def test_too_little_memory_for_whole_runs_is_said_too(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="its absence is said before")
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    line = fails(capsys, "parity", model, "--train", "2")
    assert "not enough memory for both sides: " in line and line.endswith(" are available\n")


def test_memory_of_a_container_is_what_its_group_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "CGROUP", tmp_path)
    monkeypatch.setattr(guarded, "MEMINFO", tmp_path / "meminfo")
    assert guarded.available_memory() is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:      8 kB\n")
    assert guarded.available_memory() == 8192
    for name, text in (("memory.max", "5000"), ("memory.current", "3000"), ("memory.stat", "anon 9\nfile 1000\n")):
        (tmp_path / name).write_text(text)
    assert guarded.available_memory() == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert guarded.available_memory() == 8192
    assert memory.needed(10, 4, 30, "outputs") == 80 and memory.needed(10, 4, 900, "gradients") == 1800


def test_the_picture_of_a_training_run_is_written(tmp_path: Path) -> None:
    """Two dtypes; in the second a token changes its expert from the third step on."""
    loss_S, expert_SNLTK = np.linspace(3.0, 2.0, 5), np.zeros((5, 1, 1, 4, 2), int)
    flipped = expert_SNLTK.copy()
    flipped[2:, :, :, 0] = 1
    ours, theirs, control = Curve(loss_S, expert_SNLTK), Curve(loss_S * (1 + 1e-7), flipped), Curve(loss_S, flipped)
    runs = [Runs("float64", ours, ours, ours, 0.0, "", {}), Runs("float32", ours, theirs, control, 0.0, "", {})]
    plots.write_picture(tmp_path / "runs.png", runs, "a title")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG") and len([*tmp_path.iterdir()]) == 1
    labels = plots.picture(runs, "a title").axes[1].get_legend_handles_labels()[1]
    assert len(labels) == 5 and labels[-1] == "first token that changes its expert, float32"
