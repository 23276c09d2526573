"""Every program of examples/ runs and prints; each asserts its own claim, which a planted fault breaks."""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from flax import nnx

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(file.stem for file in EXAMPLES.glob("*.py"))
OPTIONAL = {"port_makemoe": ("torch",), "finetune_folder": ("torch", "transformers")}
pytestmark = pytest.mark.usefixtures("quick", "small_programs", "unchecked")

OTHER_WEIGHTS = SimpleNamespace(Rngs=nnx.Rngs, State=nnx.State, update=lambda layer, state: None)
# Arguments of main, or names of the example that are replaced, that make its claim wrong; and the claim.
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nnx_model": ({"learning_rate": 0.0}, {}, "the error falls"),
    "linen_model": ({}, {"nnx": OTHER_WEIGHTS}, "is the layer in NNX"),
    "router_only": ({"trained": nnx.Param}, {}, "the same bits as before"),
    "soft_moe_vectors": ({"steps": 1}, {}, "the larger circle is found"),
    "port_makemoe": ({}, {"silent": lambda tokens_BT: None}, "the same logits"),  # the noise stays on
}


def example(name: str) -> ModuleType:
    """The example as a module; skips where a package that it needs is missing."""
    for package in OPTIONAL.get(name, ()):
        pytest.importorskip(package, reason=f"the example {name} needs {package}")
    found = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def quietly(main: Callable[..., None], **arguments: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings are no errors for users
        main(**arguments)


@pytest.mark.parametrize("name", FILES)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    quietly(example(name).main)
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_claim_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, replaced, claim = FAULTS[name]
    module = example(name)
    for attribute, value in replaced.items():
        monkeypatch.setattr(module, attribute, value)
    with pytest.raises(AssertionError, match=claim):
        quietly(module.main, **arguments)
