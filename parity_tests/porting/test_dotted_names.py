"""Every dotted name in README and docs exists after `import jax_moe` alone, and so does every submodule."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import jax_moe
import moe_parity

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"(?<![\w./-])((?:jax_moe|torch_ref|moe_parity)(?:\.[A-Za-z_]\w*)+)")
FILES = ("py", "md", "json", "svg", "html")  # suffixes of paths, not names
# The package is imported anew for each name, so that modules loaded for another name do not help.
CHECK = """
import importlib, sys
for name in sys.argv[1:]:
    package, *parts = name.split(".")
    for module in [one for one in sys.modules if one.split(".")[0] == package]:
        del sys.modules[module]
    value = importlib.import_module(package)
    for part in parts:
        value = getattr(value, part)
"""


def names() -> list[str]:
    """The dotted names in README and docs, sorted."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    found = {name for text in texts for name in NAME.findall(text)}
    return sorted(name for name in found if name.rpartition(".")[2] not in FILES)


def resolved(*dotted: str) -> subprocess.CompletedProcess[str]:
    """Runs the check in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", CHECK, *dotted], cwd=ROOT, capture_output=True, text=True)


def test_names_of_the_documents_resolve() -> None:
    found = names()
    assert "jax_moe.sharding.device_mesh" in found
    if importlib.util.find_spec("torch") is None:
        found = [name for name in found if not name.startswith("torch_ref.")]
    done = resolved(*found)
    assert done.returncode == 0, done.stderr


def test_a_wrong_name_is_caught() -> None:
    done = resolved("jax_moe.sharding.expert_mash")
    assert done.returncode != 0 and "expert_mash" in done.stderr


@pytest.mark.parametrize("package", [jax_moe, moe_parity], ids=lambda package: package.__name__)
def test_submodules_are_attributes(package: ModuleType) -> None:
    """They stand in the stub, from which attributes are loaded; another test's import would hide a missing one."""
    assert package.__file__ is not None
    stub = Path(package.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    listed = re.findall(r"^from \. import (\w+) as", stub, re.MULTILINE)
    found = {module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")}
    assert set(listed) == found
    assert getattr(package, min(found)).__name__ == f"{package.__name__}.{min(found)}"
    with pytest.raises(AttributeError, match="attribute shading"):
        _ = package.shading
