"""Mixture of Experts in JAX, provably equal to `torch_ref` in PyTorch.

Names and submodules load on first use, so `import jax_moe.config` pulls in neither jax nor flax.
"""

import importlib
import importlib.util
from typing import Any

_HOMES = {
    "Attention": "attention.multihead",
    "AttentionConfig": "config",
    "Block": "models.block",
    "BlockConfig": "config",
    "Decoder": "models.decoder",
    "DecoderConfig": "config",
    "MakeMoE": "models.makemoe",
    "MakeMoEConfig": "config",
    "MoE": "moe",
    "MoEConfig": "config",
    "MoEStats": "losses",
    "Randomness": "models.block",
    "PortError": "porting",
    "Precision": "config",
    "Routing": "routing",
    "SoftMoE": "soft_moe",
    "SoftMoEConfig": "config",
    "adamw_as_torch": "optimizers",
    "cast_to_compute": "precision",
    "chosen_experts": "losses",
    "from_torch": "porting",
    "from_torch_tree": "porting",
    "generate": "generation.generate",
    "load": "porting.loading",
    "load_optimizer": "porting.optimizer.own_file",
    "load_pretrained": "porting.pretrained",
    "optimizer_from_torch": "porting.optimizer.state",
    "optimizer_to_torch": "porting.optimizer.state",
    "save": "porting.loading",
    "save_pretrained": "porting.pretrained",
    "to_torch": "porting",
}
__all__ = [*_HOMES, "presets"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"jax_moe.{_HOMES[name]}"), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"jax_moe.{name}") is not None:
        value = importlib.import_module(f"jax_moe.{name}")
    else:
        raise AttributeError(f"module 'jax_moe' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
