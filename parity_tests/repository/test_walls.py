"""Which room may import which, and what an import loads."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("jax_moe", "torch_ref", "moe_parity", "moe_cli", "moe_train")
FRAMEWORKS = ("jax", "flax", "torch")
HEAVY = ("jax", "jaxlib", "flax", "torch", "optax", "orbax", "safetensors", "tyro", "matplotlib", "rich", "tokenizers")
STDLIB = set(sys.stdlib_module_names)
CORE = {"numpy", "jax", "flax", "jaxtyping", *STDLIB}

# The earlier rooms that each room of jax_moe may use; a file at the top of the package is a room of its own.
# Rooms not named here belong to SHARED or SENTENCE: files at the top that all rooms above config share.
SHARED = (
    "dims", "shapes", "arrays", "norms", "activations", "dropout", "precision", "remat", "stored", "parameters",
    "top_k", "process", "locks", "disk", "guarded", "unchosen", "optimizers", "presets", "initializers", "arguments",
    "programs",
)
SENTENCE = ("routing", "router_network", "dispatch", "experts", "losses", "moe", "soft_moe")
ROOMS: dict[str, tuple[str, ...]] = {
    "config": (),
    "kernels": ("config", *SHARED, "routing", "dispatch", "experts"),
    "sharding": ("config", *SHARED, "routing", "dispatch", "experts", "kernels"),
    "attention": ("config", *SHARED, "sharding"),
    "models": ("config", *SHARED, *SENTENCE, "attention", "sharding"),
    "generation": ("config", *SHARED, *SENTENCE, "kernels", "attention", "models", "sharding"),
    "porting": ("config", *SHARED, *SENTENCE, "attention", "models", "sharding"),
}
# Inside porting, from the mapping language up; each may use those before it.
PORTING = (
    "errors", "tensors", "torch_tensors", "table", "families", "state_dict", "formats", "targets", "optimizer",
    "convert", "pretrained", "mixture", "checkpoint", "loading", "__init__",
)
# Packages from outside that a room may use beside the core's.
OUTSIDE = {
    "jax_moe": {"lazy_loader"}, "jax_moe.arguments": {"tyro"}, "jax_moe.config": set(),
    "jax_moe.optimizers": {"optax"}, "jax_moe.unchosen": {"optax"},
    "jax_moe.generation": {"tokenizers"},
    "jax_moe.porting": {"lazy_loader", "optax", "orbax", "safetensors", "tokenizers", "ml_dtypes", "torch"},
}
# Packages of ours that a package may use.
USES = {
    "jax_moe": {"jax_moe"},
    "torch_ref": {"torch_ref", "jax_moe"},
    "moe_parity": {"moe_parity", "jax_moe", "torch_ref"},
    "moe_train": {"moe_train", "jax_moe", "torch_ref"},
    "moe_cli": {"moe_cli", "jax_moe", "moe_parity", "moe_train"},
}
# torch_ref uses those parts of jax_moe that load no framework.
OF_JAX_MOE = ("jax_moe.config", "jax_moe.presets", "jax_moe.shapes")
# Imported only inside functions, so that the package can be imported without them.
LAZY = ("torch", "torch_ref", "transformers")
LAZY_IN = ("jax_moe", "moe_parity", "moe_cli")


def sources(*packages: str) -> dict[str, Path]:
    """Every module of the packages and its file."""
    files = [file for package in packages for file in (ROOT / package).rglob("*.py")]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in sorted(files)
    }


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    """All imports in a tree, as the longest dotted name that may be a module, with the line."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


MODULES = sources(*PACKAGES)
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}


def module_of(name: str) -> str:
    """The module of a dotted name: the name itself, or its parent for a name inside a module."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name


def room(module: str) -> str:
    """jax_moe.porting.table.rows -> porting."""
    return module.split(".")[1] if "." in module else "__init__"


def ours(imported: str) -> bool:
    return imported.split(".")[0] in PACKAGES


def offences(module: str, tree: ast.AST) -> list[str]:
    """Every import of a module that its room does not allow, as `module:line imports what`."""
    return [f"{module}:{line} imports {imported}" for imported, line in imports(tree) if not allowed(module, imported)]


def allowed(module: str, imported: str) -> bool:
    """Whether a module may import a name."""
    package, top = module.split(".")[0], imported.split(".")[0]
    if top in STDLIB or (module, top) == ("jax_moe.__main__", "moe_cli"):
        return True
    if top not in PACKAGES:
        return {"jax_moe": top in _outside(module), "torch_ref": top in ("torch", "numpy", "jaxtyping")}.get(
            package, True
        )
    if top not in USES[package]:
        return False
    if package == "moe_cli" and top == "moe_train":
        return imported.startswith(("moe_train.INSTALLED", "moe_train.main."))
    if top == "jax_moe" and package == "torch_ref":
        return imported.startswith(OF_JAX_MOE)
    return top != "jax_moe" or package != "jax_moe" or _inside(module, module_of(imported))


def _outside(module: str) -> set[str]:
    extra = OUTSIDE.get(".".join(module.split(".")[:2]), set())
    return extra if room(module) == "config" else CORE | extra


def _inside(module: str, imported: str) -> bool:
    """Whether the room of one module of jax_moe may use the other."""
    mine, other = room(module), room(imported)
    if mine == other == "porting":
        return PORTING.index(_in_porting(imported)) <= PORTING.index(_in_porting(module))
    if mine in ROOMS:
        return other == mine or other in ROOMS[mine]
    return mine in ("__init__", "__main__") or other not in ("models", "generation", "porting", "attention")


def _in_porting(module: str) -> str:
    """jax_moe.porting.table.rows -> table."""
    parts = module.split(".")
    return parts[2] if len(parts) > 2 else "__init__"


def test_imports_stay_within_the_walls() -> None:
    assert [line for module, tree in TREES.items() for line in offences(module, tree)] == []


def test_every_room_is_known() -> None:
    rooms = {room(module) for module in MODULES if module.startswith("jax_moe.")}
    assert rooms == {*ROOMS, *SHARED, *SENTENCE, "__main__"}
    assert {_in_porting(module) for module in MODULES if module.startswith("jax_moe.porting")} == set(PORTING)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, if there is one."""
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle() -> None:
    graph = {
        module: {module_of(name) for name, _ in imports(tree) if ours(name)} - {module}
        for module, tree in TREES.items()
    }
    assert circle(graph) == []
    assert circle({"a": {"b"}, "b": {"a"}}) != []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("jax_moe.config.moe", "import jax"),
        ("jax_moe.config.moe", "from jax_moe.moe import MoE"),
        ("jax_moe.routing", "from jax_moe.models.decoder import Decoder"),
        ("jax_moe.attention.rope", "from jax_moe.porting import table"),
        ("jax_moe.models.block", "import optax"),
        ("jax_moe.porting.table.rows", "from jax_moe.porting.formats.open import open_path"),
        ("jax_moe.porting.checkpoint", "from moe_cli.common import say"),
        ("jax_moe.moe", "from torch_ref import MoE"),
        ("torch_ref.moe", "from jax_moe.moe import MoE"),
        ("torch_ref.moe", "import jax"),
        ("moe_parity.compare", "from moe_cli.main import main"),
        ("moe_train.loop", "import moe_cli"),
        ("moe_cli.port", "from moe_train.loop import main"),
    ],
)
def test_the_wall_sees_an_offence(module: str, line: str) -> None:
    assert module in MODULES and len(offences(module, ast.parse(line))) == 1


def test_what_may_not_be_there_is_imported_inside_functions_only() -> None:
    for module in [name for name in MODULES if name.split(".")[0] in LAZY_IN]:
        top = ast.Module([node for node in TREES[module].body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        assert [f"{module} {name}" for name, _ in imports(top) if name.split(".")[0] in LAZY] == []


def test_torch_is_read_in_its_own_files_only() -> None:
    readers = {
        module for module, tree in TREES.items()
        if module.startswith("jax_moe.") and any(name.split(".")[0] == "torch" for name, _ in imports(tree))
    }
    assert readers == {"jax_moe.porting.torch_tensors"}


def loaded_by(statement: str) -> set[str]:
    """Heavy packages in sys.modules after a statement in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    ["import jax_moe", "import jax_moe.config", "import jax_moe.presets", "from jax_moe import MoEConfig, presets"],
)
def test_contracts_cost_no_framework(statement: str) -> None:
    assert loaded_by(statement) == set()


@pytest.mark.parametrize("statement", [
    "from moe_cli.main import main; main(['--version'])",
    "from moe_cli.arguments import parse; parse(['inspect', 'x'])",
    "from moe_train.options import read_settings; read_settings(['--steps', '2'])",
])
def test_commands_are_read_without_a_framework(statement: str) -> None:
    """So that --help and a wrong option are answered at once."""
    quiet = f"import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()): {statement}\n"
    assert loaded_by(quiet).isdisjoint(FRAMEWORKS)


def test_jax_moe_loads_no_torch_and_no_tool() -> None:
    loaded = loaded_by(
        "import jax_moe; jax_moe.MoE, jax_moe.SoftMoE, jax_moe.MakeMoE, jax_moe.generate, jax_moe.from_torch"
    )
    assert loaded >= {"jax", "flax"}
    assert loaded.isdisjoint({"torch", "safetensors", "tyro", "matplotlib", "tokenizers"})


def test_the_microscope_loads_no_torch_before_it_runs() -> None:
    loaded = loaded_by("import moe_parity.compare, moe_parity.pages.html, moe_cli.parity")
    assert "jax" in loaded and "torch" not in loaded


def test_torch_ref_loads_no_jax() -> None:
    pytest.importorskip("torch", reason="torch_ref needs PyTorch")
    assert loaded_by("import torch_ref") == {"torch"}
