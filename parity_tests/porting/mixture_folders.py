"""Folders of models whose decoder is not known: a mixture in some layers, something else around it."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_moe
from jax_moe import presets
from jax_moe.porting.families import FAMILIES
from jax_moe.porting.formats.safetensors import write_safetensors
from parity_tests.shared.filled import filled

CONTRACT = presets.deepseek_v3(8, 6, 6, 2, num_clusters=3, top_clusters=2)
LAYERS = (1, 3)  # of four; layer 4, of multi-token prediction, has one too


def mixture(layer: int) -> jax_moe.MoE:
    """A layer's weights, each its own random number."""
    moe = filled(lambda: jax_moe.MoE(CONTRACT, rngs=nnx.Rngs(0)), seed=layer)
    moe.router.correction_bias[...] = jnp.asarray(np.random.default_rng(layer).normal(size=6), jnp.float32)
    return moe


def deepseek(folder: Path, fused: bool = False, **settings: Any) -> Path:
    """A DeepSeek-V3 folder, a file a layer; `settings` change its config.json, None leaves one out."""
    folder.mkdir()
    family = FAMILIES["deepseek_v32"].mixture
    assert family is not None
    side, where = family.in_memory if fused else family.on_disk, dict[str, str]()
    for layer in range(5):
        state = {f"model.layers.{layer}.input_layernorm.weight": np.full(8, layer, np.float32)}
        if layer in (*LAYERS, 4):
            named = jax_moe.to_torch(mixture(layer), layout=side.layer)
            state |= {side.within.format(l=layer) + name: value for name, value in named.items()}
        else:
            state[f"model.layers.{layer}.mlp.gate_proj.weight"] = np.zeros((5, 8), np.float32)
        file = f"model-{layer}.safetensors"
        write_safetensors(folder / file, state, {"format": "pt"})
        where |= dict.fromkeys(state, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    values = {**family.write(CONTRACT), "model_type": "deepseek_v32", "num_hidden_layers": 4, **settings}
    text = json.dumps({name: value for name, value in values.items() if value is not None})
    (folder / "config.json").write_text(text)
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.txt").write_text("kept as it is")
    return folder
