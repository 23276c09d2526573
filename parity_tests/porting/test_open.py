"""What is at a path is asked once: the answer for every kind, and how often config.json is opened on the way."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

import jax_moe
from jax_moe import presets
from jax_moe.porting.checkpoint import Checkpoint, save
from jax_moe.porting.formats.found import Found
from jax_moe.porting.formats.open import open_path
from jax_moe.porting.formats.safetensors import write_safetensors
from moe_cli.main import main
from parity_tests import samples
from parity_tests.porting.decoder_cases import decoder
from parity_tests.porting.porting_cases import TINY, make, mixtral_state

SAMPLES = Path(samples.__file__).parent / "v0_1_0"
_watched: dict[Path, int] = {}


def _opened(event: str, arguments: tuple) -> None:
    """Counts openings of files that are watched; an audit hook stays for as long as Python runs."""
    if event == "open" and _watched and isinstance(arguments[0], str | Path) and Path(arguments[0]) in _watched:
        _watched[Path(arguments[0])] += 1


sys.addaudithook(_opened)


@contextmanager
def openings(file: Path) -> Iterator[Callable[[], int]]:
    """How often the file has been opened since."""
    _watched[file] = 0
    try:
        yield lambda: _watched[file]
    finally:
        del _watched[file]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """A checkpoint of every kind that is made in no time."""
    jax_moe.save_pretrained(decoder("qwen2_moe"), tmp_path / "hf", model_type="qwen2_moe")
    save(Checkpoint("makemoe", make("makemoe"), "abcdefghijk"), tmp_path / "ours")
    write_safetensors(tmp_path / "block.safetensors", {f"module.{n}": v for n, v in mixtral_state().items()})
    assert main(["port", str(tmp_path / "hf"), str(tmp_path / "orbax")]) == 0
    return {name: tmp_path / name for name in ("hf", "orbax", "ours", "block.safetensors")}


def summary(found: Found) -> tuple:
    return found.kind, found.family.name, found.decoder, found.ours, found.characters, found.assumed, found.note


def test_the_answer_of_every_kind(places: dict[str, Path]) -> None:
    found = {name: open_path(place) for name, place in places.items()}
    assert {name: summary(one) for name, one in found.items()} == {
        "hf": ("hf", "qwen2_moe", True, False, None, {}, None),
        "orbax": ("ours", "qwen2_moe", True, True, None, {}, None),
        "ours": ("ours", "makemoe", False, True, "abcdefghijk", {}, None),
        "block.safetensors": ("file", "mixtral", False, False, None, {"top_k": 2}, "names without module."),
    }
    assert found["hf"].config == found["orbax"].config == decoder("qwen2_moe").config
    assert found["ours"].config == TINY and found["block.safetensors"].config == presets.mixtral(8, 6, 4, 2)
    assert found["ours"].tensors.keys() == Checkpoint("makemoe", make("makemoe")).weights.keys()
    assert all(one.run is None and one.optimizer is None and one.place == one.path for one in found.values())


def test_of_a_run_its_newest_weights_and_of_a_training_checkpoint_the_optimizer() -> None:
    run, training = open_path(SAMPLES / "run_stopped"), open_path(SAMPLES / "training")
    assert (
        run.run is not None and (run.kind, run.family.name, run.place.parent.name) == ("run", "makemoe", "checkpoints")
    )
    assert training.optimizer == SAMPLES / "training" / "optimizer.safetensors"


def test_tensors_are_read_when_they_are_asked_for(places: dict[str, Path]) -> None:
    """The weights' file is gone by half: headers, shapes and contract are known all the same, a reading shows it."""
    found = open_path(places["hf"])
    name = "model.embed_tokens.weight"
    assert found.tensors[name].shape == (11, 8)
    file = places["hf"] / "model.safetensors"
    with file.open("r+b") as raw:
        raw.seek(file.stat().st_size - 4 * 88)
        raw.write(b"\xff" * (4 * 88))
    assert not all(np.isfinite(one.read()).all() for one in found.tensors.values())


@pytest.mark.parametrize("name", ["hf", "orbax", "ours"])
def test_every_command_and_call_opens_config_json_once(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    place = places[name]
    calls: list[Callable[[], object]] = [
        lambda: open_path(place), lambda: jax_moe.load(place), lambda: main(["inspect", str(place)]),
        lambda: main(["port", str(place), str(tmp_path / "there")]),
    ]
    if name == "hf":
        greedy = ("--max-new-tokens", "1", "--temperature", "0")
        calls += [
            lambda: jax_moe.load_pretrained(place),
            lambda: main(["generate", str(place), "--tokens", "1,2", *greedy]),
        ]
    for number, call in enumerate(calls):
        with openings(place / "config.json") as counted:
            assert call() != 1  # the status of a command that fails
            assert counted() == 1, number


def test_the_count_sees_a_second_reading(places: dict[str, Path]) -> None:
    with openings(places["ours"] / "config.json") as counted, jax.enable_x64(True):
        open_path(places["ours"])
        open_path(places["ours"])
        assert counted() == 2
