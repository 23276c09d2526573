"""Small modules for the porting tests, and state dicts under the original names, written out by hand."""

import jax
import ml_dtypes
import numpy as np
from flax import nnx

import jax_moe
from jax_moe import presets

TINY = jax_moe.MakeMoEConfig(
    vocab_size=11, block_size=4, model_dim=8, num_heads=2, num_layers=3, num_experts=4, dropout=0.0
)
SOFT = jax_moe.SoftMoEConfig(model_dim=8, num_experts=3, num_slots=2, hidden_dims=(5, 6), output_layer_norm=True)
CAUSAL = {"model_dim": 8, "num_heads": 2}
HEADS = jax_moe.AttentionConfig(**CAUSAL)
FUSED = jax_moe.AttentionConfig(projections="fused", **CAUSAL)

# name -> (make, layout)
MODULES = {
    "makemoe": (lambda rngs, dtype: jax_moe.MakeMoE(TINY, rngs=rngs, param_dtype=dtype), "makemoe"),
    "soft_moe": (lambda rngs, dtype: jax_moe.SoftMoE(SOFT, rngs=rngs, param_dtype=dtype), "soft_moe"),
    "attention": (lambda rngs, dtype: jax_moe.Attention(HEADS, rngs=rngs, param_dtype=dtype), "torch_ref"),
    "attention_fused": (lambda rngs, dtype: jax_moe.Attention(FUSED, rngs=rngs, param_dtype=dtype), "torch_ref"),
    "block": (
        lambda rngs, dtype: jax_moe.Block(
            jax_moe.BlockConfig(attention=HEADS, moe=presets.deepseek_v3(8, 6, 4, 2, 3, 2, 1)), rngs=rngs,
            param_dtype=dtype,
        ),
        "torch_ref",
    ),
    "block_soft": (
        lambda rngs, dtype: jax_moe.Block(
            jax_moe.BlockConfig(attention=jax_moe.AttentionConfig(causal=False, **CAUSAL), moe=SOFT), rngs=rngs,
            param_dtype=dtype,
        ),
        "torch_ref_soft",
    ),
    "moe_mixtral": (lambda rngs, dtype: _moe(presets.mixtral(8, 6, 4, 2), rngs, dtype), "mixtral"),
    "moe_makemoe": (lambda rngs, dtype: _moe(presets.makemoe(8, 6, 4, 2), rngs, dtype), "makemoe"),
    "moe_qwen2": (lambda rngs, dtype: _moe(presets.qwen2_moe(8, 6, 4, 2, shared_dim=5), rngs, dtype), "torch_ref"),
    "moe_deepseek": (lambda rngs, dtype: _moe(presets.deepseek_v3(8, 6, 4, 2, 3, 2, 1), rngs, dtype), "torch_ref"),
    "moe_gpt_oss": (lambda rngs, dtype: _moe(presets.gpt_oss(8, 6, 4, 2), rngs, dtype), "torch_ref"),
}


def _moe(config: jax_moe.MoEConfig, rngs: nnx.Rngs, dtype: object) -> jax_moe.MoE:
    return jax_moe.MoE(config, rngs=rngs, param_dtype=dtype)


def make(name: str, seed: int = 0, dtype: object = "float32") -> nnx.Module:
    """A module whose every weight is another number (biases and norms too, so that a swap shows)."""
    module = nnx.eval_shape(lambda: MODULES[name][0](nnx.Rngs(0), jax.numpy.dtype(dtype)))
    draw = np.random.default_rng(seed)
    state = jax.tree.map(lambda x: jax.numpy.asarray(draw.standard_normal(x.shape), x.dtype), nnx.state(module))
    nnx.update(module, state)
    return module


def bits(module: nnx.Module) -> list[bytes]:
    """The bytes of every weight."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(module))]


def makemoe_state(dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """makeMoE's state dict for TINY, with the names and shapes of its nn.Modules."""
    V, U, D, H, L, E = 11, 4, 8, 2, 3, 4
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding_table.weight": (V, D), "position_embedding_table.weight": (U, D),
        "ln_f.weight": (D,), "ln_f.bias": (D,), "lm_head.weight": (V, D), "lm_head.bias": (V,),
    }
    for i in range(L):
        b = f"blocks.{i}"
        shapes |= {f"{b}.sa.heads.{h}.{p}.weight": (D // H, D) for h in range(H) for p in ("key", "query", "value")}
        shapes |= {f"{b}.sa.proj.weight": (D, D), f"{b}.sa.proj.bias": (D,)}
        shapes |= {f"{b}.ln{n}.{w}": (D,) for n in (1, 2) for w in ("weight", "bias")}
        for router in ("topkroute_linear", "noise_linear"):
            shapes |= {f"{b}.smoe.router.{router}.weight": (E, D), f"{b}.smoe.router.{router}.bias": (E,)}
        for e in range(E):
            net = f"{b}.smoe.experts.{e}.net"
            shapes |= {f"{net}.0.weight": (4 * D, D), f"{net}.0.bias": (4 * D,)}
            shapes |= {f"{net}.2.weight": (D, 4 * D), f"{net}.2.bias": (D,)}
    state = drawn(shapes, dtype, seed)
    tril = np.tril(np.ones((U, U))).astype(state["ln_f.bias"].dtype)
    return state | {f"blocks.{i}.sa.heads.{h}.tril": tril.copy() for i in range(L) for h in range(H)}


def mixtral_state(dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Mixtral's sparse block: 4 experts, width 8, expert width 6."""
    shapes: dict[str, tuple[int, ...]] = {"gate.weight": (4, 8)}
    for e in range(4):
        shapes |= {f"experts.{e}.w1.weight": (6, 8), f"experts.{e}.w2.weight": (8, 6), f"experts.{e}.w3.weight": (6, 8)}
    return drawn(shapes, dtype, seed)


def soft_state(dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Soft MoE for SOFT."""
    shapes: dict[str, tuple[int, ...]] = {"phi": (8, 3, 2)}
    for e in range(3):
        for name, (rows, columns) in {"fcs.0": (5, 8), "fcs.1": (6, 5), "last_fc": (8, 6)}.items():
            shapes |= {f"experts.{e}.{name}.weight": (rows, columns), f"experts.{e}.{name}.bias": (rows,)}
        for name, width in {"layer_norms.0": 5, "layer_norms.1": 6, "last_ln": 8}.items():
            shapes |= {f"experts.{e}.{name}.{w}": (width,) for w in ("weight", "bias")}
    return drawn(shapes, dtype, seed)


def drawn(shapes: dict[str, tuple[int, ...]], dtype: str, seed: int) -> dict[str, np.ndarray]:
    """Unit Gaussians of these shapes."""
    draw, kind = np.random.default_rng(seed), np.dtype(getattr(ml_dtypes, dtype, dtype))
    return {name: draw.standard_normal(shape).astype(kind) for name, shape in shapes.items()}


STATES = {"makemoe": makemoe_state, "mixtral": mixtral_state, "soft_moe": soft_state}
