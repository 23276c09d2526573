"""Every stored array of every module declares its dims and its role, after every nnx transform too."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jax_moe
from jax_moe import presets
from jax_moe.attention.multihead import Attention
from jax_moe.config.attention import AttentionConfig
from jax_moe.config.parameters import Declared
from jax_moe.parameters import declared, of_role, parameter, stacked
from jax_moe.stored import stored_state

SOFT = jax_moe.SoftMoEConfig(
    model_dim=4, num_experts=2, num_slots=3, hidden_dims=(5,), layer_norm=True, output_layer_norm=True, normalise=True
)
MAKEMOE = jax_moe.MakeMoEConfig(
    vocab_size=11, block_size=8, model_dim=6, num_heads=2, num_layers=3, num_experts=4, top_k=2
)
DECODER: dict[str, Any] = {
    "vocab_size": 11, "model_dim": 6, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 12,
    "dense_layers": (0,), "dense_dim": 9, "qkv_bias": True, "output_bias": True, "sinks": True,
    "moe": presets.qwen2_moe(model_dim=6, expert_dim=8, num_experts=7, top_k=2, shared_dim=10),
}
MODULES: dict[str, Callable[[], nnx.Module]] = {
    "makemoe": lambda: jax_moe.MakeMoE(MAKEMOE),
    "soft": lambda: jax_moe.SoftMoE(SOFT),
    "decoder": lambda: jax_moe.Decoder(jax_moe.DecoderConfig.grouped(**DECODER, qk_norm="per_head"), rngs=nnx.Rngs(0)),
    "wide norms": lambda: jax_moe.Decoder(
        jax_moe.DecoderConfig.grouped(**DECODER, qk_norm="full_width"), rngs=nnx.Rngs(0)
    ),
    "correction": lambda: jax_moe.MoE(presets.deepseek_v3(
        model_dim=6, expert_dim=8, num_experts=4, top_k=2, num_clusters=2, top_clusters=1
    )),
    "fused": lambda: Attention(
        AttentionConfig(model_dim=6, num_heads=2, projections="fused"), rngs=nnx.Rngs(0)
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_stored_array_says_its_dims(name: str) -> None:
    """A word per dim; within a module a letter has a single size (except W, I and O, which have any)."""
    found = declared(nnx.eval_shape(MODULES[name]))
    sizes: dict[tuple[str, str], int] = {}
    for path, array in found.items():
        assert array.dims is not None and array.role is not None, path
        assert len(array.letters) == len(array.shape), path
        for letter, size in zip(array.letters, array.shape, strict=True):
            if letter.isdigit():
                assert size == int(letter), path
            elif letter not in "WIO" and not (letter in "LF" and name in ("decoder", "wide norms", "correction")):
                assert sizes.setdefault((name, letter), size) == size, path


def test_what_a_decoder_says() -> None:
    found = declared(nnx.eval_shape(MODULES["decoder"]))
    assert found["embedding"] == Declared((11, 6), "V D", "embedding")
    assert found["blocks.attention.key"] == Declared((4, 6, 2, 12), "L D J A", "attention")
    assert found["blocks.attention.key_norm.scale"] == Declared((4, 12), "L W", "norm")
    assert found["moe.experts.down"] == Declared((3, 7, 8, 6), "L E F D", "expert")
    assert found["moe.shared.up"] == Declared((3, 1, 6, 10), "L 1 D F", "shared")
    assert found["dense.up"] == Declared((1, 1, 6, 9), "L 1 D F", "shared")
    assert found["moe.shared_gate"] == Declared((3, 6, 1), "L D 1", "gate")
    soft = declared(MODULES["soft"]())
    assert soft["experts.last_fc.kernel"] == Declared((2, 5, 4), "E I O", "soft_expert")
    assert declared(MODULES["correction"]())["router.correction_bias"] == Declared((4,), "E", "correction")


def test_it_survives_what_nnx_does() -> None:
    module = jax_moe.MakeMoE(MAKEMOE)
    said = declared(module)
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    assert declared(params) == said
    assert declared(nnx.merge(graphdef, nnx.to_pure_dict(params), rest)) == said
    assert declared(jax.tree.map(jnp.asarray, module)) == said
    assert declared(jax.eval_shape(lambda: stored_state(jax_moe.MakeMoE(MAKEMOE)))) == said
    assert declared(nnx.clone(module)) == said
    experts = {path for path, array in said.items() if array.role == "expert"}
    assert set(declared(nnx.state(module, of_role("expert")))) == experts != set()
    assert hash(graphdef) == hash(nnx.graphdef(jax_moe.MakeMoE(MAKEMOE, rngs=nnx.Rngs(1)))), "a jit cache would miss"


def test_wrong_declarations() -> None:
    with pytest.raises(ValueError, match=r"dims='E D': must be a word for each dim of shape \(2, 3, 4\)"):
        parameter(jnp.zeros((2, 3, 4)), "E D", "expert")
    with pytest.raises(Exception, match="router"):  # ValueError, or the type checker's error
        parameter(jnp.zeros((2,)), "E", "routers")  # type: ignore[arg-type]


def test_a_stack_leads_with_its_letter() -> None:
    found = stacked(lambda rngs: jax_moe.SoftMoE(SOFT, rngs=rngs), nnx.Rngs(0), 3, "L")
    assert declared(found)["experts.fcs.0.kernel"] == Declared((3, 2, 4, 5), "L E I O", "soft_expert")
    assert declared(found)["scale"] == Declared((3,), "L", "gate")
