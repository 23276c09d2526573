"""`compare_modules`: a user's torch module against a user's Flax module or JAX function, by a mapping table."""

import doctest
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the other side here is PyTorch: install the extra `test`")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from moe_parity import ModulesDifferError, compare_modules, modules, permute, reshape, split, stacked, then, transpose

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
MAPPING = {"up.weight": ("up.kernel", transpose), "up.bias": "up.bias", "down.weight": ("down.kernel", transpose)}


class Theirs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4, bias=False)

    def forward(self, x: Any) -> Any:
        return self.down(torch.nn.functional.gelu(self.up(x)))


class Ours(nnx.Module):
    def __init__(self, approximate: bool = False):
        rngs = nnx.Rngs(1)
        self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 4, use_bias=False, rngs=rngs)
        self.approximate = approximate

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=self.approximate))


def test_importing_the_parity_package_imports_no_torch() -> None:
    """And `explain` is the function, whatever was imported before it."""
    names = "callable(p.compare_modules) and callable(p.explain)"
    code = f"import sys, moe_parity.compare, moe_parity as p; assert {names}; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_the_example_in_its_docstring_runs() -> None:
    result = doctest.testmod(modules, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 5 and result.failed == 0


def test_modules_that_agree() -> None:
    report = compare_modules(Theirs(), Ours(), MAPPING, X)
    assert report.passed and len(report.results) == 5
    assert max(one.error for one in report.results) < 1e-6 < report.results[0].tolerance
    assert (
        report.sentence().startswith("all 5 comparisons agree; the largest error is that of ")
        and str(report).count("\n") == 5
    )


def test_in_fp64_they_agree_to_rounding() -> None:
    report = compare_modules(Theirs().double(), Ours(), MAPPING, X.astype(np.float64), tolerance=1e-13)
    assert 0 < max(one.error for one in report.results) < 1e-14


def test_another_gelu_is_caught_and_the_first_failure_named() -> None:
    with pytest.raises(
        ModulesDifferError, match=r"^output: error .* where 1e-05 is allowed \(at .* fail too"
    ) as caught:
        compare_modules(Theirs(), Ours(approximate=True), MAPPING, X)
    assert [one.passed for one in caught.value.report.results] == [False] * 5
    report = compare_modules(Theirs(), Ours(approximate=True), MAPPING, X, fail=False)
    assert not report.passed and str(report).startswith("FAILED")


def test_a_gradient_that_is_stopped_is_named() -> None:
    class Stopped(Ours):
        def __call__(self, x: jax.Array) -> jax.Array:
            up = jax.nn.gelu(x @ self.up.kernel[...] + jax.lax.stop_gradient(self.up.bias[...]), approximate=False)
            return self.down(up)

    with pytest.raises(ModulesDifferError, match=r"^gradient of up.bias: error 1 where .*; the other 4 agree$"):
        compare_modules(Theirs(), Stopped(), MAPPING, X)


def test_weights_of_our_own_are_compared_first() -> None:
    with pytest.raises(ModulesDifferError, match=r"^weight up.kernel: error"):
        compare_modules(Theirs(), Ours(), MAPPING, X, copy_weights=False)


def function(params: dict[str, Any], tokens: jax.Array, scale: jax.Array) -> dict[str, jax.Array]:
    """Experts stacked, a fused qkv split, two inputs, two outputs."""
    x = params["embed"][tokens] * scale
    heads = sum(jnp.einsum("...d,dh->...h", x, params["attention"][name]) for name in "qkv")
    return {"heads": heads, "mean": jnp.einsum("...d,edf->...f", x, params["experts"]) / 2}


class Fused(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.qkv = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 6, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 3, bias=False) for _ in range(2))
        self.register_buffer("mask", torch.ones(2))

    def forward(self, tokens: Any, scale: Any) -> Any:
        x = self.embed(tokens) * scale
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return {"heads": q + k + v, "mean": sum(expert(x) for expert in self.experts) / 2}


FUSED: dict[str, Any] = {
    "embed.weight": "embed", "mask": None,
    "qkv.weight": [(f"attention.{name}", then(split(i, 3), transpose)) for i, name in enumerate("qkv")],
    "experts.0.weight": stacked("experts", 0, transpose), "experts.1.weight": stacked("experts", 1, transpose),
}
PARAMS = {"embed": np.zeros((7, 4)), "attention": {n: np.zeros((4, 2)) for n in "qkv"}, "experts": np.zeros((2, 4, 3))}
INPUTS = (np.array([[1, 2], [6, 1]]), np.float32(1.5) * np.ones((2, 2, 4), np.float32))


def test_a_function_with_params_fused_and_stacked_weights_integers_and_several_outputs() -> None:
    report = compare_modules(Fused(), function, FUSED, INPUTS, params=PARAMS)
    assert [one.name for one in report.results] == [
        "output heads", "output mean", "gradient of input 1", "gradient of embed.weight",
        "gradient of qkv.weight (attention.q)", "gradient of qkv.weight (attention.k)",
        "gradient of qkv.weight (attention.v)", "gradient of experts.0.weight",
        "gradient of experts.1.weight",
    ]
    swapped = {f"experts.{i}.weight": stacked("experts", 1 - i, transpose) for i in range(2)}
    assert compare_modules(Fused(), function, FUSED | swapped, INPUTS, params=PARAMS).passed  # a sum does not care


@pytest.mark.parametrize(("change", "says"), [
    (
        {"embed.weight": ...},
        "PyTorch tensors that are not mapped: embed.weight; JAX arrays that nothing maps to: embed",
    ),
    ({"bias": "embed2"}, "PyTorch tensors that do not exist: bias; JAX arrays that do not exist: embed2"),
    (
        {"embed.weight": None},
        "PyTorch parameters that are mapped to None: embed.weight; JAX arrays that nothing maps to: embed",
    ),
    ({"mask": "embed"}, "JAX arrays that are mapped more than once: embed"),
    ({"experts.1.weight": stacked("experts", 2)}, "JAX arrays whose places are not 0, 1, 2 ...: experts"),
    ({"embed.weight": ("embed", transpose)}, r"shapes do not fit. embed would be \(4, 7\), must be \(7, 4\)"),
    (
        {"embed.weight": ("embed", reshape(5, 5))},
        r"embed.weight of shape \(7, 4\) cannot be turned into embed: cannot reshape",
    ),
    ({"experts.0.weight": stacked("experts", 0)}, r"experts would be \(3, 4\) and \(4, 3\), must be \(2, 4, 3\)"),
    ({"embed.weight": 3}, r"3 must be a path, \(path, transform\), an Entry"),
])
def test_a_mapping_that_does_not_fit_says_all_of_it(change: dict[str, Any], says: str) -> None:
    mapping = {name: value for name, value in {**FUSED, **change}.items() if value is not ...}
    with pytest.raises(ValueError, match=says):
        compare_modules(Fused(), function, mapping, INPUTS, params=PARAMS)


def test_what_is_neither_a_module_nor_a_function_with_params() -> None:
    with pytest.raises(ValueError, match="must be an nnx module, or a function together with params="):
        compare_modules(Theirs(), function, MAPPING, X)


def test_outputs_that_one_side_lacks_or_shapes_otherwise() -> None:
    def but(outputs: Callable) -> Callable:
        return lambda params, *inputs: outputs(function(params, *inputs))

    report = compare_modules(Fused(), but(lambda y: {"heads": y["heads"]}), FUSED, INPUTS, params=PARAMS, fail=False)
    assert "output mean: error inf" in report.sentence() and "on one side only" in report.sentence()
    report = compare_modules(
        Fused(), but(lambda y: {**y, "heads": y["heads"].sum(-1)}), FUSED, INPUTS, params=PARAMS, fail=False
    )
    assert "output heads: error inf" in report.sentence()
    assert "shape (2, 2) in JAX, (2, 2, 2) in the reference" in report.sentence()


def test_a_convolution_and_dropout_left_alone() -> None:
    class Convolved(nnx.Module):
        def __init__(self) -> None:
            self.conv = nnx.Conv(2, 3, (3,), padding="VALID", rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(1))

        def __call__(self, x_NLC: jax.Array) -> jax.Array:
            return self.dropout(self.conv(x_NLC.swapaxes(1, 2))).swapaxes(1, 2)

    torch.manual_seed(2)
    theirs = torch.nn.Conv1d(2, 3, 3)
    x = np.random.default_rng(1).normal(size=(2, 2, 7)).astype(np.float32)
    assert compare_modules(
        theirs, Convolved(), {"weight": ("conv.kernel", permute(2, 1, 0)), "bias": "conv.bias"}, x
    ).passed
