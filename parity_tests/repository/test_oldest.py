"""oldest.txt has the lower bound of each dependency of the library, as pyproject.toml says them."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
OF_OTHERS = {"jaxlib", "pyparsing"}  # of jax, and of matplotlib


def pins() -> dict[str, Version]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "oldest.txt").read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    assert all(len(one.specifier) == 1 and next(iter(one.specifier)).operator == "==" for one in found)
    return {one.name: Version(next(iter(one.specifier)).version) for one in found}


def bounds() -> dict[str, Version]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = map(Requirement, (*project["dependencies"], *project["optional-dependencies"]["text"]))
    return {
        one.name: Version(next(each.version for each in one.specifier if each.operator == ">=")) for one in needed
    }


def test_each_lower_bound_is_pinned() -> None:
    found = pins()
    assert {name: pin for name, pin in found.items() if name not in OF_OTHERS} == bounds()
    assert found["jaxlib"] == found["jax"]
