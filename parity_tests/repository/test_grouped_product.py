"""The benchmark of single grouped products, without timings: a wrong kernel is reported, and results are kept."""

import json
from pathlib import Path

import jax
import pytest

from benchmarks import grouped_product, timing
from benchmarks.grouped_product import KERNELS, PRODUCTS, by_gradient

pytestmark = pytest.mark.usefixtures("quick")


def _slightly_wrong(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    return 1.01 * jax.lax.ragged_dot(rows, weights, sizes)


def test_a_wrong_kernel_is_reported_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wrong = {**KERNELS["xla"](), "weights": by_gradient(_slightly_wrong)["weights"]}
    monkeypatch.setitem(KERNELS, "pallas", lambda: wrong)
    monkeypatch.setattr(timing, "product_rate", lambda dtype, side: 1e9)
    asked = ["--shape", "32,16,24,4,2", "--only", "xla,pallas,tokamax triton", "--rounds", "1", "--dtype", "float32"]
    assert grouped_product.main([*asked, "--save", "--results", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["results"]
    assert path.name.endswith("-cpu-grouped-product.json")
    timed = {(row["kernel"], row["product"]) for row in rows if "ms" in row}
    assert timed == {("xla", p) for p in PRODUCTS} | {("pallas", "forward"), ("pallas", "rows")}
    failed = [row["failed"] for row in rows if "failed" in row]
    assert len(failed) == 2 and all("differs from the reference by 1.0e-02" in words for words in failed)
    assert "tokamax is not installed" in printed or "tokamax does not import" in printed
    (cell,) = [r for r in rows if (r["kernel"], r["product"], r["side"]) == ("xla", "rows", "up")]
    assert cell["tflops"] * cell["ms"] * 1e9 == pytest.approx(2 * 64 * 16 * 24)
