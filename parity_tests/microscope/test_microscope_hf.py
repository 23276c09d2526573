"""The microscope against `transformers`: a sound folder passes, every planted fault and near tie is located."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the other side is PyTorch")
pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

import jax_moe
from jax_moe.porting.formats.safetensors import read_safetensors, write_safetensors
from moe_parity.compare import compare_traces, settings
from moe_parity.sides.transformers import trace_transformers
from moe_parity.stages import Place, first_divergence
from parity_tests.table.family_cases import case_folder

pytestmark = pytest.mark.usefixtures("quick")
Trace = dict[Place, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case_folder("mixtral", tmp_path_factory.mktemp("theirs") / "model")


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 37, (2, 9))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Trace:
    """The reference, in fp64, with its gradients."""
    return trace_transformers(folder, "mixtral", tokens(), "float64", True)


def exchange(model: Any) -> None:
    experts = model.moe.experts
    gate, up = experts.gate[...], experts.up[...]
    experts.gate[...], experts.up[...] = gate.at[1].set(up[1]), up.at[1].set(gate[1])


def swap_rows(model: Any) -> None:
    kernel = model.moe.router.kernel[...]
    model.moe.router.kernel[...] = kernel.at[0, :, [1, 3]].set(kernel[0][:, [3, 1]].T)


def other_scale(model: Any) -> None:
    """Scales layer 0's queries by 0.4 in place of head_dim**-0.5."""
    attention = model.blocks.attention
    attention.query[...] = attention.query[...].at[0].multiply(0.4 * attention.config.head_dim**0.5)


def swap_down(model: Any) -> None:
    """Exchanges two rows of an expert's down."""
    down = model.moe.experts.down[...]
    model.moe.experts.down[...] = down.at[1, 2, [0, 1]].set(down[1, 2, [1, 0]])


def norm_off(model: Any) -> None:
    """Changes a norm's weight by a thousandth."""
    scale = model.blocks.ffn_norm.scale
    scale[...] = scale[...].at[1, 0].add(1e-3)


def other_theta(model: Any) -> None:
    """Another rope_theta, as from config.json."""
    model.config = model.config.with_attention(rope=dataclasses.replace(model.config.rope, theta=5e5))


FAULTS: list[tuple[Callable[[Any], None], str]] = [
    (exchange, "layer 1: expert outputs"), (swap_rows, "layer 0: router logits"),
    (other_scale, "layer 0: attention"), (swap_down, "layer 1: expert outputs"),
    (norm_off, "layer 1: norm before the FFN"),
    (other_theta, "layer 0: attention"),
]


def test_a_healthy_folder_passes(folder: Path, theirs: Trace) -> None:
    """Measured over all models of family_cases: see moe_parity/stages.py."""
    with settings("float64"):
        results = compare_traces(
            jax_moe.load_pretrained(folder, dtype="float64"), tokens(), theirs, dtype="float64", grads=True
        )
    assert first_divergence(results) is None
    assert max(stage.error for stage in results if stage.kind != "gradient") <= 1e-14
    assert sum(stage.kind == "gradient" for stage in results) == 21 and len(results) == 45


@pytest.mark.parametrize(("fault", "where"), FAULTS, ids=lambda fault: getattr(fault, "__name__", None))
def test_a_planted_fault_is_named(fault: Callable[[Any], None], where: str, folder: Path, theirs: Trace) -> None:
    with settings("float64"):
        model = jax_moe.load_pretrained(folder, dtype="float64")
        fault(model)
        results = compare_traces(model, tokens(), theirs, dtype="float64")
    first = first_divergence(results)
    assert first is not None and first.name == where and first.verdict == "wrong number"
    assert not next(stage for stage in results if stage.kind == "logits").passed


def test_a_flip_at_a_near_tie(folder: Path, tmp_path: Path) -> None:
    """Two columns of layer 0's router differ by 1e-7; on each side another of them is larger."""
    name, state = "model.layers.0.mlp.gate.weight", read_safetensors(folder / "model.safetensors")
    (name,) = [key for key in state if key.startswith("model.layers.0.") and key.endswith("gate.weight")]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    sides = []
    for upper in (0, 1):
        gate = state[name].copy()
        gate[1] = gate[0]
        gate[upper] *= np.float32(1 + 1.2e-7)
        write_safetensors(tmp_path / "model.safetensors", {**state, name: gate}, {"format": "pt"})
        if upper == 0:
            sides.append(trace_transformers(tmp_path, "mixtral", tokens(), "float32", False))
    with settings("float32"):
        results = compare_traces(jax_moe.load_pretrained(tmp_path), tokens(), sides[0], dtype="float32")
    flips = [stage for stage in results if stage.num_flips]
    assert [stage.name for stage in flips] == ["layer 0: chosen experts"] and flips[0].verdict == "flip at a near tie"
    assert flips[0].flips[0].margin < 2e-6 < flips[0].noise  # type: ignore[operator]
    assert all({flip.ours, flip.theirs} == {0, 1} for flip in flips[0].flips)
    assert first_divergence(results) is None, "with their choices everything after the flip agrees"


def test_a_mixture_whose_weights_are_on_the_input(tmp_path: Path) -> None:
    """Llama 4: its router hands out scores of all experts, and its experts get no choices. Measured: 1e-15."""
    place = case_folder("llama4", tmp_path / "llama4")
    expected = trace_transformers(place, "llama4", tokens(), "float64", False)
    with settings("float64"):
        model = jax_moe.load_pretrained(place, dtype="float64")
        results = compare_traces(model, tokens(), expected, dtype="float64")
        assert first_divergence(results) is None and max(stage.error for stage in results) <= 1e-14
        exchange(model)
        first = first_divergence(compare_traces(model, tokens(), expected, dtype="float64"))
    assert first is not None and first.name == "layer 1: expert outputs"
