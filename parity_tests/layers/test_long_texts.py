"""The ways to compute attention's products give the same numbers; memory of `blocks` grows with the text alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe.attention import GroupedAttention, attention_by, kind_of, products
from jax_moe.attention.masks import Scope
from jax_moe.attention.multihead import Attention
from jax_moe.attention.positions import whole_call
from jax_moe.attention.products import Softmax, blockwise, kernels, plain
from jax_moe.config.attention import AttentionConfig, GroupedAttentionConfig, RopeConfig
from jax_moe.remat import rematerialised
from parity_tests.layers.test_decoder_generation import cached_logits
from parity_tests.layers.test_latent import LATENT, decoder
from parity_tests.shared.compare import MismatchError, check_close
from parity_tests.shared.filled import filled
from parity_tests.shared.quick import QUICK

SIZES: dict[str, Any] = {"model_dim": 6, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
MASK = np.arange(11) >= np.asarray([0, 3])[:, None]
# By name: the contract, and whether there is padding
CASES: dict[str, tuple[Any, bool]] = {
    "window, padding": (GroupedAttentionConfig(**SIZES, window=3), True),
    "chunk, padding": (GroupedAttentionConfig(**SIZES, chunk=4), True),
    "sinks, growth, gate": (
        GroupedAttentionConfig(**SIZES, sinks=True, output_gate=True, temperature=0.5, temperature_step=4), False
    ),
    "latent": (LATENT, True),
    "multi-head": (AttentionConfig(model_dim=6, num_heads=2), True),
    "both ways": (AttentionConfig(model_dim=6, num_heads=2, causal=False), True),
}
FP64 = 7e-15  # measured 7e-16


def numbers(contract: Any, padded: bool, way: str) -> dict[str, np.ndarray]:
    """The answer of a layer in fp64, and its gradients by name."""
    kwargs: dict[str, Any] = {"kernel_init": nnx.initializers.normal(), "param_dtype": "float64"}
    multihead = isinstance(contract, AttentionConfig)
    kind = Attention if multihead else kind_of(contract)
    graphdef, params = nnx.split(filled(lambda: kind(contract, rngs=nnx.Rngs(0), **kwargs)))
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 11, contract.model_dim)))
    mask_BT = jnp.asarray(MASK) if padded else None
    positions = whole_call(11, jnp.broadcast_to(jnp.arange(11), (2, 11)), mask_BT)

    def loss(params: nnx.State, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        layer = nnx.merge(graphdef, params)
        if multihead:
            y_BTD = layer(x_BTD, mask_BT=mask_BT)
        else:
            y_BTD, _ = layer(x_BTD, positions, layer.shared(contract, positions, x_BTD.dtype))
        return (y_BTD * jnp.sin(jnp.arange(y_BTD.size)).reshape(y_BTD.shape)).sum(), y_BTD

    with attention_by(way):
        both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), compiler_options=QUICK)
        (_, y_BTD), (by_params, by_x) = both(params, x_BTD)
    gradients = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(by_params)}
    return {"y": np.asarray(y_BTD), "x": np.asarray(by_x), **gradients}


@pytest.fixture
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4: the last of 11 queries has 3."""
    monkeypatch.setattr(blockwise, "QUERIES", 4)


@pytest.mark.usefixtures("few_queries")
@pytest.mark.parametrize("name", CASES)
def test_blocks(name: str) -> None:
    with jax.enable_x64(True):
        check_close(numbers(*CASES[name], "blocks"), numbers(*CASES[name], "plain"), FP64, name)


@pytest.mark.usefixtures("few_queries")
def test_a_block_that_is_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: blocks believe that they stand a position further."""
    def shifted(q: jax.Array, k: jax.Array, v: jax.Array, scope: Scope, softmax: Softmax) -> jax.Array:
        return plain(q, k, v, scope._replace(slot_T=scope.slot_T + 1), softmax)

    with jax.enable_x64(True):
        expected = numbers(*CASES["window, padding"], "plain")
        monkeypatch.setattr(blockwise, "plain", shifted)
        with pytest.raises(MismatchError):
            check_close(numbers(*CASES["window, padding"], "blocks"), expected, 1e-3, "off by one")


def test_prefill_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt read in blocks of two leaves the cache as it is; its steps are plain."""
    monkeypatch.setattr(blockwise, "QUERIES", 2)
    with jax.enable_x64(True):
        model = decoder("float64")
        expected = {"logits": cached_logits(model)}
        with attention_by("blocks"):
            check_close({"logits": cached_logits(model)}, expected, FP64, "prefill")


def heads(T: int, dtype: str = "float32") -> tuple[jax.Array, ...]:
    """Queries of four heads, keys and values of two."""
    draw = np.random.default_rng(0)
    return tuple(jnp.asarray(draw.normal(size=(2, T, number, 16)), dtype) for number in (4, 2, 2))


def answers(way: Callable, scope: Scope, T: int) -> dict[str, np.ndarray]:
    """The answer and its gradients at what is no padding."""
    real = np.ones((2, T), bool) if scope.mask_BU is None else np.asarray(scope.mask_BU)
    probe = jnp.asarray(np.random.default_rng(1).normal(size=(2, T, 4, 16)) * real[..., None, None], jnp.float32)

    def both(*given: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda *given: way(*given, scope, Softmax(0.3)), *given)
        return *pull(probe), y

    run = jax.jit(both, compiler_options=QUICK)
    return {name: np.asarray(x)[real] for name, x in zip(("q", "k", "v", "y"), run(*heads(T)), strict=True)}


SCOPES: dict[str, dict[str, Any]] = {
    "causal": {}, "window": {"window": 60}, "chunk": {"chunk": 70}, "padding": {"mask_BU": True},
}


@pytest.mark.parametrize("name", SCOPES)
def test_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splash attention in Pallas' interpreter, tiles of 128 with a text of 150; and what is asked of cuDNN, of XLA."""
    monkeypatch.setattr(kernels, "TILE", 128)
    changes = dict(SCOPES[name])
    if "mask_BU" in changes:
        changes["mask_BU"] = jnp.arange(150) >= jnp.asarray([0, 40])[:, None]
    scope = Scope(jnp.arange(150), 150, **changes)
    expected = answers(plain, scope, 150)
    found = answers(lambda *given: kernels.splash(*given, interpret=True), scope, 150)
    check_close(found, expected, 8e-6, f"splash, {name}")  # measured 8.3e-7
    if name in ("causal", "window"):
        found = answers(lambda *given: kernels.cudnn(*given, implementation="xla"), scope, 150)
        check_close(found, expected, 2.5e-6, f"XLA, {name}")  # measured 2.7e-7
    wrong = scope._replace(window=59)
    if name == "window":
        with pytest.raises(MismatchError):
            check_close(answers(lambda *given: kernels.splash(*given, interpret=True), wrong, 150), expected, 1e-3, "")


def memory(way: str, T: int) -> int:
    """The bytes that a layer's forward and backward pass takes beside its arguments and results, from the compiler.

    The layer is told to keep its matrix products, as by `remat="dots"`.
    """
    contract = GroupedAttentionConfig(
        model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, window=64, sinks=True, rope=RopeConfig()
    )
    layer = GroupedAttention(contract, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.normal())
    mask_BT = jax.ShapeDtypeStruct((1, T), bool)

    def loss(layer: GroupedAttention, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        positions = whole_call(T, jnp.broadcast_to(jnp.arange(T), (1, T)), mask_BT)
        return layer(x_BTD, positions, layer.shared(contract, positions, x_BTD.dtype))[0].sum()

    with attention_by(way):
        gradient = jax.jit(jax.grad(rematerialised(loss, "dots")))
        lowered = gradient.lower(layer, jax.ShapeDtypeStruct((1, T, 32), "float32"), mask_BT)
        return lowered.compile(compiler_options=QUICK).memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_text() -> None:
    """Twice the text: twice the memory by blocks, four times by plain; `auto` turns to blocks above `LONG`."""
    found = {(way, T): memory(way, T) for way in ("plain", "blocks") for T in (2048, 4096)}
    assert found["blocks", 4096] <= 2.2 * found["blocks", 2048] and found["plain", 4096] >= 3.5 * found["plain", 2048]
    assert memory("auto", 2048) == found["plain", 2048] and memory("auto", 4096) == found["blocks", 4096]


def test_what_is_refused() -> None:
    """Unknown names; dropout; a kernel on this device. `auto` falls back, and a step of generation is plain."""
    given, scope = heads(8), Scope(jnp.arange(8), 8)
    dropping = Softmax(1.0, rate=0.5, key=jax.random.key(0))
    with pytest.raises(ValueError, match="attention='flash': must be one of auto, plain, blocks, kernel"):
        attention_by("flash")
    with attention_by("blocks"), pytest.raises(ValueError, match=r"attention='blocks': .* with dropout"):
        products.attend(*given, scope, dropping)
    with attention_by("kernel"), pytest.raises(ValueError, match="the kernel does not cover the device cpu"):
        products.attend(*given, scope, Softmax(1.0))
    mesh = jax.sharding.AbstractMesh((2,), ("sequence",))
    with attention_by("kernel"), jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match="'sequence'"):
        products.attend(*given, scope, Softmax(1.0))
    with attention_by("kernel"):
        assert products.chosen(given[0][:, :1], *given[1:], Scope(jnp.arange(1), 8), Softmax(1.0)) == "plain"
    long, given = Scope(jnp.zeros(4096, jnp.int32), 4096), (jnp.zeros((1, 4096, 2, 1)),) * 3
    assert [products.chosen(*given, long, each) for each in (Softmax(1.0), dropping)] == ["blocks", "plain"]
