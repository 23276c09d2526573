"""The page of `jax-moe routing`: hostile text stays text, and a real browser shows it without a request or an error."""

import re
from pathlib import Path

import numpy as np
import pytest

import jax_moe
from moe_cli.main import main
from moe_parity.pages.palette import EIGHT, expert_colours
from moe_parity.pages.routing import Text, page
from moe_parity.pages.visible import named, visible
from moe_parity.routing.numbers import numbers
from parity_tests.cli.browser import needs_browser, see
from parity_tests.cli.routing_cases import HOSTILE, Shown, observed, save_makemoe, written

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def makemoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests do not change it."""
    return save_makemoe(tmp_path_factory.mktemp("makemoe") / "model")


def test_the_page_shows_hostile_text(makemoe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every character as text: nothing of it becomes a tag; the page names no address."""
    out = tmp_path / "<b>out&.html"
    source = tmp_path / "<i>'\"&.txt"
    source.write_text(HOSTILE, encoding="utf-8")
    out.write_text("an earlier page")  # is replaced, as by `jax-moe parity`
    assert main(["routing", str(makemoe), "--text", str(source), "--html", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^layer 1: load [\d.]+% \(expert \d\) to .* dropped [\d.]+%$", printed, re.M)
    assert printed.endswith(f"wrote {out}\n")
    text = out.read_text(encoding="utf-8")
    shown, content = Shown.of(text)
    assert "".join(shown.pieces) == visible(HOSTILE) and len(shown.pieces) == len(HOSTILE)
    bars = 2 * 4  # of two layers of four experts
    assert (shown.tags["script"], shown.tags["b"], shown.tags["i"]) == (2, bars, 2 * bars)
    assert all(link.startswith("#layer-") for link in shown.links)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|[\x00-\x09\x0b-\x1f\u202e]", text)
    assert 'content="default-src \'none\'; style-src \'unsafe-inline\'; script-src \'unsafe-inline\'"' in text
    assert "<i>'\"&.txt" in shown.text and "noise is left out" in shown.text and jax_moe.__version__ in shown.text
    assert "capacity: floor(tokens K / experts * 1.0) slots per expert" in shown.text
    assert len(content["rows"]) == 2 and content["rows"][0]["dropped"].count("1") == sum(
        tip.count("dropped") for tip in shown.tips
    )


def test_what_has_no_shape_is_written_out() -> None:
    assert visible("a\tb\n") == "a\tb\u21b5\n" and visible("\x00\x7f\x85") == "\u2400\u2421[U+0085]"
    assert visible("\u202e\u2067\u200f\ud800\ue000\u2028\ufeff") == (
        "[U+202E][U+2067][U+200F][U+D800][U+E000][U+2028][U+FEFF]"
    )
    whole = "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET} \N{ARABIC LETTER MEEM} <&>"
    assert visible(whole) == whole and named("a\n") == "'a\u21b5'" and named("\t") == "'\u2409'"


@pytest.mark.parametrize("K", [1, 2])
def test_hostile_tokens_names_and_titles(K: int) -> None:
    """A whole tag as one token, a name, a title and a line; forty experts, whose pairs are listed."""
    tag, tokens = "<script src='a'>\"&amp;</script><!--", list(range(20))
    starts = np.asarray(tokens) == 0
    text = Text(np.asarray(tokens), starts, ["" if n == 3 else tag for n in tokens], {n: f"{n}{tag}" for n in tokens})
    layers = numbers(observed(tokens, [[n, n + 1][:K] for n in tokens]), (0,), 40)
    shown, content = Shown.of(page(tag, [tag], [tag], text, layers))
    assert shown.pieces == [f"3{tag}" if n == 3 else tag for n in tokens] and shown.classes[3].endswith(" m")
    assert shown.tips[7].splitlines()[0] == content["names"][7] == f"'7{tag}', token 7"
    taken = 20 + 20 * (K - 1)  # each of 20 tokens once by each of its experts
    assert shown.text.count(tag) == 2 + 2 + 20 + taken and shown.tags["script"] == 2
    assert ("The pairs that most tokens chose" in shown.text) == (K == 2)
    assert "No choice was dropped." in shown.text and ("experts chosen together" in shown.text) == (K == 2)


def test_colours_differ() -> None:
    assert expert_colours(8) == list(EIGHT) and len({*expert_colours(64)}) == 64


@needs_browser
def test_a_browser_shows_the_page(makemoe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawn, with nothing on the console and no request. The script shows the layer of the address; of the first
    layer it writes what is there without it.
    """
    out = tmp_path / "out.html"
    assert main(["routing", str(makemoe), "--text", str(written(tmp_path, HOSTILE)), "--html", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    first, second = see(out, tmp_path), see(out, tmp_path, "#layer-1")
    for seen in (first, second):
        assert seen.console == [] and seen.requests == [] and seen.colours > 100
    (static, content), (drawn, _), (other, _) = Shown.of(page), Shown.of(first.dom), Shown.of(second.dom)
    assert (drawn.pieces, drawn.tips, drawn.classes) == (static.pieces, static.tips, static.classes)
    experts = content["rows"][1]["experts"][::2]
    assert [int(re.findall(r"e(\d+)", each)[0]) for each in other.classes] == experts and other.tips != static.tips
    assert [dom.count("<section hidden") for dom in (first.dom, second.dom)] == [1, 1]
    assert not np.array_equal(first.picture, second.picture)


@needs_browser
def test_the_browser_finds_what_is_wrong(tmp_path: Path) -> None:
    """An image from elsewhere: asked for without the policy, and refused on the console with it; and a blank page."""
    image = '<img src="http://127.0.0.1:9/a.png">'
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'\">"
    file = tmp_path / "a.html"
    file.write_text(f"<!doctype html>{image}")
    assert see(file, tmp_path).requests == ["http://127.0.0.1:9/a.png"]
    file.write_text(f"<!doctype html>{policy}{image}")
    refused = see(file, tmp_path)
    assert refused.requests == [] and "violates the following Content Security Policy" in refused.console[0]
    file.write_text("<!doctype html><script>missing()</script>")
    broken = see(file, tmp_path)
    assert "ReferenceError" in broken.console[0] and broken.colours == 1


@needs_browser
def test_a_browser_shows_the_parity_page(tmp_path: Path) -> None:
    """The other page has the same policy, and runs no script."""
    from moe_parity.pages.html import page as report_page
    from parity_tests.microscope.test_microscope_cli import report

    file = tmp_path / "report.html"
    file.write_text(report_page([report(), report(margin=1e-6)]), encoding="utf-8")
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in file.read_text(encoding="utf-8")
    seen = see(file, tmp_path)
    assert seen.console == [] and seen.requests == [] and seen.colours > 100
