"""A small decoder of every Hugging Face family, filled with numbers from numpy. Needs no torch."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe import Decoder, DecoderConfig, presets
from jax_moe.config.attention import RopeConfig
from jax_moe.porting.formats.safetensors import read_safetensors

SIZES: dict[str, Any] = {
    "vocab_size": 11, "model_dim": 8, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4
}
EVERY = {"sliding_window": 3, "sliding_layers": (0, 1, 2)}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"moe": presets.mixtral(8, 6, 4, 2), "rope": RopeConfig(theta=1e6), **EVERY},
    "qwen2_moe": {
        "moe": presets.qwen2_moe(8, 6, 4, 2, shared_dim=4), "qkv_bias": True, "dense_layers": (1,), "dense_dim": 5,
        "sliding_window": 3, "sliding_layers": (0, 2),
    },
    "qwen3_moe": {
        "moe": presets.qwen3_moe(8, 6, 4, 2), "qk_norm": "per_head", "dense_layers": (0, 2), "dense_dim": 5,
        "rope": RopeConfig(kind="yarn", factor=2.0, original_max_positions=8, mscale=0.7, mscale_all_dim=0.5),
    },
    "olmoe": {
        "moe": presets.olmoe(8, 6, 4, 2), "qk_norm": "full_width", "clip_qkv": 3.5, "balance_loss_weight": 0.02,
        "rope": RopeConfig(kind="llama3", factor=2.0, original_max_positions=8), "qkv_bias": True, "output_bias": True,
    },
    "granitemoe": {
        "moe": presets.granite_moe(8, 6, 4, 2), "attention_multiplier": 0.2, "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5, "logits_divisor": 3.0, "tied_embeddings": True,
        "rope": RopeConfig(kind="linear", factor=2.0),
    },
}


def decoder(model_type: str, dtype: Any = "float32", **changes: Any) -> Decoder:
    """A decoder of the family, every weight its own random number."""
    config = DecoderConfig.grouped(**(SIZES | CONFIGS[model_type] | changes))
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype)))
    generator = np.random.default_rng(0)
    filled = [
        (keys, v.replace(jnp.asarray(generator.normal(size=v.shape), v.dtype)))
        for keys, v in nnx.to_flat_state(nnx.state(model))
    ]
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of all files."""
    return {
        name: value for file in sorted(folder.glob("*.safetensors")) for name, value in read_safetensors(file).items()
    }
