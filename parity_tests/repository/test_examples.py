"""Every program and notebook of examples/ runs; each asserts its own claims, which a planted fault breaks."""

import importlib.util
import json
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
    "finetune_folder": ({"steps": 1}, {}, "learned to count"),
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


NOTEBOOK = EXAMPLES / "seed_questions.ipynb"


def run_notebook(fault: tuple[str, str] = ("", "")) -> int:
    """Runs the code cells in order in one namespace, `fault` replaced in them; the number of figures they draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names: dict[str, Any] = {"__name__": "notebook"}
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    try:
        for i, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]).replace(*fault), f"{NOTEBOOK.name}, cell {i}", "exec"), names)
        return len(plt.get_fignums())
    finally:
        plt.close("all")


def test_the_notebook_runs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings are no errors for users
        assert run_notebook() == 5


def test_the_notebook_stores_no_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_a_wrong_claim_of_the_notebook_is_found() -> None:
    """A router whose weights are not divided by their sum does learn of experts that were not chosen."""
    with pytest.raises(AssertionError, match="the router learns nothing of the unchosen"):
        other = "jax_moe.MoE(jax_moe.presets.olmoe(D, 32, E, K), rngs=nnx.Rngs(0))"
        run_notebook(("nnx.split(mixtral)", f"nnx.split({other})"))
