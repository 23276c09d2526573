"""Every public name can be imported, has its type for type checkers, and is where the documents say."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
# The packages and rooms whose names are promised.
FACES = (
    "jax_moe", "jax_moe.attention", "jax_moe.config", "jax_moe.generation", "jax_moe.models", "jax_moe.porting",
    "jax_moe.sharding", "moe_parity", "torch_ref", "torch_ref.attention", "torch_ref.generation", "torch_ref.models",
)
# Expressions of users, and the types that an editor must show.
WRITTEN = {
    "jax_moe.presets.mixtral(8, 16, 4, 2)": "jax_moe.config.moe.MoEConfig",
    "jax_moe.MoE": r"def \(config: jax_moe.config.moe.MoEConfig, .*\) -> jax_moe.moe.MoE",
    "jax_moe.DecoderConfig": r"def \(.*vocab_size: int.*\) -> jax_moe.config.decoder.DecoderConfig",
    "jax_moe.load_moe": r"def \(.*\) -> jax_moe.moe.MoE",
    "jax_moe.load_pretrained": r"def \(.*\) -> jax_moe.models.decoder.Decoder",
    "torch_ref.MoE": r"def \(config: jax_moe.config.moe.MoEConfig\) -> torch_ref.moe.MoE",
    "moe_parity.explain": r"def \(.*\) -> .*moe_parity.explanation.search.Explanation.*",
    "jax_moe.__version__": "str",
}
REVEALED = re.compile(r'names\.py:(\d+): note: Revealed type is "(.*)"')


def here(package: str) -> bool:
    return not package.startswith("torch_ref") or importlib.util.find_spec("torch") is not None


@pytest.mark.parametrize("package", FACES)
def test_every_name_is_there(package: str) -> None:
    if not here(package):
        pytest.skip("torch_ref needs PyTorch")
    module = importlib.import_module(package)
    assert len(module.__all__) == len(set(module.__all__)) > 0
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module.__all__) <= set(dir(module))


def test_what_training_needs_is_at_the_top() -> None:
    import jax_moe
    import jax_moe.config

    contracts = {name for name in jax_moe.config.__all__ if name.endswith("Config")}
    assert contracts | {"Precision", "presets", "sharding"} <= set(jax_moe.__all__)


def test_the_citation_has_the_version() -> None:
    import jax_moe

    assert f"\nversion: {jax_moe.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_every_shipped_package_is_marked_as_typed() -> None:
    assert len(SHIPPED) == 5 and all((ROOT / package / "py.typed").exists() for package in SHIPPED)


def test_type_checkers_see_every_name(tmp_path: Path) -> None:
    """A run of mypy reveals the type of each name: none is Any, and a missing name is an error."""
    pytest.importorskip("mypy", reason="mypy is in the extra check")
    faces = {package: importlib.import_module(package).__all__ for package in FACES if here(package)}
    asked = [f"{package}.{name}" for package, names in faces.items() for name in names]
    asked += [text for text in WRITTEN if here(text)]
    asked.append("typing.cast(typing.Any, 1)")  # a control: a name without a type
    lines = ["jax_moe.Moe", *(f"reveal_type({text})" for text in asked)]
    (tmp_path / "names.py").write_text("\n".join([f"import typing, {', '.join(faces)}", *lines]))
    options = ("--no-site-packages", "--ignore-missing-imports", "--follow-imports=silent", "names.py")
    command, environment = [sys.executable, "-m", "mypy", *options], {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if ": error:" in line] == [
        'names.py:2: error: Module has no attribute "Moe"  [attr-defined]'
    ], done.stdout
    found = {asked[int(line) - 3]: kind for line, kind in REVEALED.findall(done.stdout)}
    assert found.keys() == set(asked)
    assert [name for name, kind in found.items() if kind == "Any"] == asked[-1:]
    for text, kind in WRITTEN.items():
        if here(text):
            assert re.fullmatch(kind, found[text]), f"{text}: {found[text]}"
