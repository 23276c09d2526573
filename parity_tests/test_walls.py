"""Who may import whom, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("jax", "jaxlib", "flax", "torch", "optax", "orbax", "safetensors", "tyro", "matplotlib", "rich", "tokenizers")
CORE = (
    "__init__.py", "config.py", "dims.py", "presets.py", "routing.py", "dispatch.py", "experts.py", "losses.py", "moe.py",
    "soft_moe.py", "attention.py", "decoder_config.py", "grouped_attention.py", "rope.py", "block.py",
    "generation.py", "cached_generation.py", "windowed_generation.py", "sampling.py", "decoding.py",
    "sharding.py", "precision.py", "shapes.py", "arrays.py", "stored.py", "remat.py", "kernels", "models",
)
CORE_MAY = {"numpy", "jax", "flax", "jaxtyping", "jax_moe", *sys.stdlib_module_names}
# The reader of .pt files, and the package that runs both frameworks; inside functions only.
PARITY = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "moe_parity").glob("*.py"))
LAZILY = ("jax_moe/porting/torch_files.py",)
WITH_TOKAMAX = "jax_moe/kernels/ragged.py"  # a faster product, where it is installed


def python_files(*places: str) -> list[Path]:
    paths = [ROOT / place for place in places]
    return sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))


def imports(path: Path) -> dict[str, list[int]]:
    """Top-level packages imported anywhere in a file, with their lines."""
    found: dict[str, list[int]] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            found.setdefault(name.split(".")[0], []).append(node.lineno)
    return found


def offences(files: list[Path], forbidden: set[str] | None = None, allowed: set[str] | None = None) -> list[str]:
    """file:line package, for every import that is forbidden or not allowed."""
    return [
        f"{file.relative_to(ROOT)}:{line} imports {package}"
        for file in files
        for package, lines in imports(file).items()
        for line in lines
        if (forbidden is not None and package in forbidden) or (allowed is not None and package not in allowed)
    ]


def test_jax_moe_never_imports_torch() -> None:
    files = [file for file in python_files("jax_moe") if file not in [ROOT / name for name in LAZILY]]
    assert offences(files, forbidden={"torch", "torch_ref"}) == []


@pytest.mark.parametrize("file", [*LAZILY, *PARITY, WITH_TOKAMAX])
def test_what_may_not_be_there_is_imported_inside_functions_only(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in top for alias in node.names] + [getattr(node, "module", "") or "" for node in top]
    assert not [name for name in names if name.split(".")[0] in ("torch", "torch_ref", "transformers", "tokamax")]


def test_torch_ref_never_imports_jax() -> None:
    assert offences(python_files("torch_ref"), forbidden={"jax", "jaxlib", "flax", "optax"}) == []
    for file in python_files("torch_ref"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jax_moe":
                names = [alias.name for alias in node.names]
                whole = node.module in ("jax_moe.config", "jax_moe.presets", "jax_moe.precision", "jax_moe.shapes")
                where = f"{file.name} imports {names} from {node.module}"
                assert whole or (node.module == "jax_moe" and names == ["presets"]), where


def test_the_core_imports_numpy_jax_and_flax_only() -> None:
    files = python_files(*(f"jax_moe/{name}" for name in CORE if (ROOT / "jax_moe" / name).exists()))
    assert len(files) > 12
    ragged = ROOT / WITH_TOKAMAX
    assert offences([file for file in files if file != ragged], allowed=CORE_MAY) == []
    assert offences([ragged], allowed={*CORE_MAY, "tokamax"}) == []


def test_the_wall_sees_an_offence() -> None:
    bad = ROOT / "parity_tests" / "sides.py"
    assert [line for line in offences([bad], forbidden={"torch"}) if "imports torch" in line]


def loaded_by(statement: str) -> set[str]:
    """Heavy packages in sys.modules after a statement in a fresh interpreter."""
    code = f"import sys; {statement}; print(' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import jax_moe", "import jax_moe.config", "import jax_moe.presets", "from jax_moe import MoEConfig, presets"]
)
def test_contracts_cost_no_framework(statement: str) -> None:
    assert loaded_by(statement) == set()


def test_jax_moe_loads_no_torch_and_no_tool() -> None:
    loaded = loaded_by("import jax_moe; jax_moe.MoE, jax_moe.SoftMoE, jax_moe.MakeMoE, jax_moe.generate, jax_moe.from_torch")
    assert loaded >= {"jax", "flax"}
    assert loaded.isdisjoint({"torch", "safetensors", "tyro", "matplotlib", "tokenizers"})


def test_the_microscope_loads_no_torch_before_it_runs() -> None:
    loaded = loaded_by("import moe_parity.compare, moe_parity.html, jax_moe.commands.parity")
    assert "jax" in loaded and "torch" not in loaded


def test_torch_ref_loads_no_jax() -> None:
    pytest.importorskip("torch", reason="torch_ref needs PyTorch")
    assert loaded_by("import torch_ref") == {"torch"}


def test_every_public_name_loads_and_a_wrong_one_does_not() -> None:
    import jax_moe

    for name in jax_moe.__all__:
        assert getattr(jax_moe, name) is not None
    assert set(jax_moe.__all__) <= set(dir(jax_moe))
    with pytest.raises(AttributeError, match="no attribute 'Moe'"):
        _ = jax_moe.Moe
