"""Initialisation: as many parameters as published, and every expert drawn as if it stood alone."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import Decoder, DecoderConfig, MakeMoE, MakeMoEConfig, MoE, SoftMoE, SoftMoEConfig, presets
from jax_moe.initializers import rounded
from parity_tests.shared.quick import QUICK

FP32 = jnp.dtype("float32")
SMALL = MakeMoEConfig(vocab_size=65, block_size=32, model_dim=64, num_heads=4, num_layers=2, num_experts=4)


def count(module: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def check_std(drawn: np.ndarray, std: float, what: str) -> None:
    """Deviation and mean of the sample within four standard errors (of a normal: std / sqrt(2 n), std / sqrt(n))."""
    error = std / np.sqrt(drawn.size)
    assert abs(drawn.std() - std) < 4 * error / np.sqrt(2), f"{what}: std {drawn.std():.4g}, must be {std:.4g}"
    assert abs(drawn.mean()) < 4 * error, f"{what}: mean {drawn.mean():.4g}"


def check_uniform(drawn: np.ndarray, bound: float, what: str) -> None:
    assert np.abs(drawn).max() <= bound, what
    assert np.abs(drawn).max() > 0.8 * bound, f"{what}: largest {np.abs(drawn).max():.4g} of {bound:.4g}"
    assert drawn.min() < 0 < drawn.max(), what


def test_the_published_model_has_8_996_545_parameters() -> None:
    model = nnx.eval_shape(lambda: MakeMoE(MakeMoEConfig(), rngs=nnx.Rngs(0), param_dtype=FP32))
    assert count(model) == 8_996_545


def test_a_plain_router_has_fewer() -> None:
    # no noise_linear: 8 layers * (128 * 8 + 8)
    model = nnx.eval_shape(lambda: MakeMoE(MakeMoEConfig(noise=False), rngs=nnx.Rngs(0), param_dtype=FP32))
    assert count(model) == 8_996_545 - 8 * (128 * 8 + 8)


def test_param_dtype_is_fp32_unless_told_otherwise() -> None:
    model = nnx.eval_shape(lambda: MakeMoE(SMALL, rngs=nnx.Rngs(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {FP32}
    narrow = nnx.eval_shape(lambda: MakeMoE(SMALL, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow, nnx.Param))} == {jnp.dtype("bfloat16")}


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    graphdef = None

    @jax.jit
    def make() -> nnx.State:
        nonlocal graphdef
        graphdef, state = nnx.split(MakeMoE(SMALL, rngs=nnx.Rngs(0), param_dtype=FP32))
        return state

    flat = nnx.to_flat_state(make())
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}


# torch's kaiming_normal_: std sqrt(2 / fan_in); an expert's fan_in is its own rows, not the experts' times its rows
KAIMING = {
    "blocks.moe.experts.up": 64, "blocks.moe.experts.down": 256, "blocks.moe.router.kernel": 64,
    "blocks.moe.router.noise_kernel": 64, "blocks.attention.query": 64, "blocks.attention.key": 64,
    "blocks.attention.value": 64, "blocks.attention.out": 64, "head.kernel": 64,
}
BIASES = {  # torch.nn.Linear's own: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
    "blocks.moe.experts.up_bias": 64, "blocks.moe.experts.down_bias": 256, "blocks.moe.router.bias": 64,
    "blocks.moe.router.noise_bias": 64, "blocks.attention.out_bias": 64, "head.bias": 64,
}
OTHERS = {
    "token_embedding.embedding", "position_embedding.embedding", "final_norm.scale", "final_norm.bias",
    "blocks.attention_norm.scale", "blocks.attention_norm.bias", "blocks.moe_norm.scale", "blocks.moe_norm.bias",
}


def test_no_parameter_is_forgotten_here(drawn: dict[str, np.ndarray]) -> None:
    assert set(drawn) == set(KAIMING) | set(BIASES) | OTHERS


@pytest.mark.parametrize(("name", "fan_in"), KAIMING.items())
def test_kernels_are_kaiming_normal_each_on_its_own(drawn: dict[str, np.ndarray], name: str, fan_in: int) -> None:
    value = drawn[name]
    layers = [value] if name == "head.kernel" else list(value)
    each = [one for layer in layers for one in layer] if ".experts." in name else layers
    for number, one in enumerate(each):
        check_std(one, (2 / fan_in) ** 0.5, f"{name} number {number}")
    for other in each[1:]:
        assert not np.array_equal(other, each[0]), "every layer and every expert has numbers of its own"


@pytest.mark.parametrize(("name", "fan_in"), BIASES.items())
def test_biases_are_torchs(drawn: dict[str, np.ndarray], name: str, fan_in: int) -> None:
    check_uniform(drawn[name], fan_in**-0.5, name)


def test_embeddings_and_norms(drawn: dict[str, np.ndarray]) -> None:
    check_std(drawn["token_embedding.embedding"], 1.0, "token embedding")
    check_std(drawn["position_embedding.embedding"], 1.0, "position embedding")
    for name in OTHERS:
        if name.endswith("norm.scale"):
            assert (drawn[name] == 1).all()
        if name.endswith("norm.bias"):
            assert (drawn[name] == 0).all()


def test_experts_of_a_plain_layer_are_scaled_by_their_own_fan_in() -> None:
    layer = MoE(presets.mixtral(64, 96, 8, 2), rngs=nnx.Rngs(0), param_dtype=FP32)
    for name, fan_in in (("up", 64), ("gate", 64), ("down", 96)):
        for expert in np.asarray(getattr(layer.experts, name)[...]):
            # a normal truncated at two deviations has thinner tails, so its deviation is known better: the bound holds
            check_std(expert, fan_in**-0.5, name)


def test_soft_experts_are_orthogonal_with_gain_one_hundredth() -> None:
    config = SoftMoEConfig(model_dim=16, num_experts=4, num_slots=32, hidden_dims=(24, 8))
    layer = SoftMoE(config, rngs=nnx.Rngs(0), param_dtype=FP32)
    check_std(np.asarray(layer.phi[...]), 1.0, "phi")
    linears = [*layer.experts.fcs, layer.experts.last_fc]
    assert [linear.kernel.shape for linear in linears] == [(4, 16, 24), (4, 24, 8), (4, 8, 16)]
    for linear in linears:
        assert (np.asarray(linear.bias[...]) == 0).all()
        kernels = np.asarray(linear.kernel[...], np.float64)
        for kernel in kernels:
            short = kernel if kernel.shape[0] <= kernel.shape[1] else kernel.T
            # fp32; measured 4.8e-11
            np.testing.assert_allclose(short @ short.T, 1e-4 * np.eye(len(short)), rtol=0, atol=1e-10)
        assert not np.array_equal(kernels[0], kernels[1])


SOFT = SoftMoEConfig(model_dim=64, num_experts=2, num_slots=2, hidden_dims=(16,))
TINY = MakeMoEConfig(vocab_size=65, block_size=8, model_dim=64, num_heads=2, num_layers=1, num_experts=2)
DECODER = DecoderConfig.grouped(
    vocab_size=64, model_dim=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32,
    moe=presets.qwen2_moe(64, 32, 2, 1, shared_dim=32),
)
MODULES: dict[str, Callable[..., nnx.Module]] = {
    "makemoe": partial(MakeMoE, TINY), "soft_moe": partial(SoftMoE, SOFT), "decoder": partial(Decoder, DECODER),
    "own initializer": partial(MoE, presets.mixtral(64, 32, 2, 1), kernel_init=nnx.initializers.normal(0.3)),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_bf16_weights_are_the_fp32_draw_rounded_once(make: Callable[..., nnx.Module]) -> None:
    """So their means and variances are those of the fp32 draw, up to rounding."""
    @partial(jax.jit, compiler_options=QUICK)
    def drawn() -> list[nnx.State]:
        made = (make(rngs=nnx.Rngs(0), param_dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
        return [nnx.state(module, nnx.Param) for module in made]

    for (path, wide), (_, narrow) in zip(*map(nnx.to_flat_state, drawn()), strict=True):
        value, rounded_value = np.asarray(wide[...]), np.asarray(narrow[...])
        assert rounded_value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(rounded_value, value.astype(jnp.bfloat16), err_msg=str(path))
        value, rounded_value = value.astype(np.float64), rounded_value.astype(np.float64)
        # measured: 5e-4 of the largest number, 4e-3 of the variance
        np.testing.assert_allclose(rounded_value.mean(), value.mean(), rtol=0, atol=2e-3 * np.abs(value).max())
        np.testing.assert_allclose(rounded_value.var(), value.var(), rtol=2e-2)


def test_a_draw_in_bf16_itself_is_seen() -> None:
    """The planted fault: flax's initializer asked for bf16 gives other numbers than its fp32 draw rounded."""
    init, key = nnx.initializers.normal(1.0), jax.random.key(0)
    wide = init(key, (64, 64), jnp.float32).astype(jnp.bfloat16)
    assert (rounded(init)(key, (64, 64), jnp.bfloat16) == wide).all()
    assert (init(key, (64, 64), jnp.bfloat16) != wide).mean() > 0.5
