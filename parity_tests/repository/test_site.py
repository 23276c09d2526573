"""The pages of the site: links lead somewhere, the reference has every public name, the contract page every field."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from jax_moe.config import moe
from parity_tests.repository import contract_page
from parity_tests.repository.documents import README, ROOT, SITE
from parity_tests.repository.fields import field_comments

NAMES = re.findall(r"^::: (\S+)$", "\n".join(p.read_text(encoding="utf-8") for p in SITE), re.MULTILINE)
LINK = re.compile(r"(?:\]\(|<img src=\")([^)\s\"]+)")  # of links and pictures


def slug(heading: str) -> str:
    """The anchor that mkdocs gives a heading."""
    plain = re.sub(r"[`*]", "", heading).strip().lower()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain))


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page to files, pictures or headings that are not there."""
    found = []
    for link in LINK.findall(text):
        if link.startswith(("http", "#")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve()
        there = target.exists()
        if there and anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            there = anchor in map(slug, headings)
        if not there:
            found.append(link)
    return found


@pytest.mark.parametrize("page", [README, *SITE], ids=lambda page: page.stem)
def test_links(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found() -> None:
    text = "[a](start/install.md), [b](nowhere.md), [c](start/concepts.md#letters), [d](start/concepts.md#nothing)"
    text += '![e](data_flow.svg) ![f](none.svg) <img src="routing.png" width="9"> <img src="none.png">'
    broken = ["nowhere.md", "start/concepts.md#nothing", "none.svg", "none.png"]
    assert broken_links(ROOT / "docs" / "index.md", text) == broken


@pytest.mark.parametrize("package", ["jax_moe", "torch_ref", "moe_parity"])
def test_the_reference_has_every_public_name(package: str) -> None:
    """Classes and functions; contracts that both packages share stand under jax_moe."""
    if package == "torch_ref" and importlib.util.find_spec("torch") is None:
        pytest.skip("torch_ref needs PyTorch")
    module = importlib.import_module(package)
    public = {name for name in module.__all__ if callable(getattr(module, name))}
    if package == "torch_ref":
        public = {name for name in public if getattr(module, name).__module__.startswith("torch_ref")}
    shown = {name.removeprefix(f"{package}.") for name in NAMES if name.startswith(f"{package}.")}
    assert public - shown == set()


def test_the_reference_names_what_exists() -> None:
    assert len(NAMES) == len(set(NAMES)) > 80
    for name in NAMES:
        if name.startswith("torch_ref") and importlib.util.find_spec("torch") is None:
            continue
        package, _, rest = name.partition(".")
        value = importlib.import_module(package)
        for part in rest.split("."):
            value = getattr(value, part)


def test_the_contract_page_is_that_of_the_source() -> None:
    text = contract_page.PAGE.read_text(encoding="utf-8")
    assert contract_page.page(text) == text, "python -m parity_tests.repository.contract_page --update"
    assert {found[2] for found in contract_page.MARK.finditer(text)} == {"MoEConfig", *contract_page.PARTS}
    stale = text.replace('`"sum"`: mixtral', '`"none"`: mixtral')
    assert contract_page.page(stale) == text != stale


def test_comments_of_fields() -> None:
    source = 'class A:\n    """Doc."""\n\n    # above\n    # twice\n    x: int = 1  # behind\n    y: int = 2\n'
    assert field_comments(source) == {"A": {"x": "above twice; behind", "y": ""}}
    assert contract_page.COMMENTS["RouterConfig"].keys() == vars(moe.RouterConfig()).keys()
