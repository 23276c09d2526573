"""A made-up family with an attention of its own, all in this file; `add` puts both into the two lists."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jax_moe import attention, presets
from jax_moe.config.attention import LayerAttention
from jax_moe.config.checks import check_positive_ints
from jax_moe.config.decoder import DecoderConfig, LayerConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.parameters import parameter
from jax_moe.porting.families import FAMILIES
from jax_moe.porting.families.family import (
    GROUPED,
    Family,
    Mixture,
    Names,
    Whole,
    read_around,
    read_decoder,
    read_moe,
    write_around,
    write_decoder,
    write_moe,
)
from jax_moe.porting.families.qwen2_moe import PER_EXPERT
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.table.rows import Row


@dataclass(frozen=True, kw_only=True)
class MeanConfig(LayerAttention):
    """The mean of what came before, weighted by a gate: linear attention of one head, its state of constant size."""

    kind: ClassVar[str] = "mean"

    width: int
    scale: float = 1.0  # on the answer: no parameter depends on it

    def __post_init__(self) -> None:
        check_positive_ints(width=self.width)

    def stored(self) -> "MeanConfig":
        return dataclasses.replace(self, scale=1.0)

    def sizes(self) -> dict[str, int]:
        return {"mean_width": self.width}

    def words(self) -> dict[str, list[str]]:
        return {"attention": [f"a gated mean of width {self.width}", f"answers times {self.scale:g}"]}


class MeanAttention(nnx.Module):
    """out(sum of sigmoid(gate) * value / number of tokens)."""

    def __init__(self, config: MeanConfig, *, rngs: nnx.Rngs, kernel_init: Any, param_dtype: Any = jnp.float32):
        self.config = config
        D, A = config.model_dim, config.width
        for name, dims, shape in (("value", "D A", (D, A)), ("gate", "D A", (D, A)), ("out", "A D", (A, D))):
            setattr(self, name, parameter(kernel_init(rngs.params(), shape, param_dtype), dims, "attention"))

    @staticmethod
    def shared(config: MeanConfig, positions: Any, dtype: Any) -> Any:
        return (positions.position_BT + 1).astype(dtype)

    @staticmethod
    def empty_cache(config: MeanConfig, num_layers: int, batch_size: int, num_slots: int, dtype: Any) -> Any:
        return jnp.zeros((num_layers, batch_size, config.width), dtype)

    def __call__(self, x_BTD: Any, positions: Any, shared: Any, key: Any = None, memory: Any = None) -> Any:
        mask_BT = positions.mask_BT
        added_BTA = jax.nn.sigmoid(x_BTD @ self.gate[...]) * (x_BTD @ self.value[...])
        if mask_BT is not None:
            added_BTA = jnp.where(mask_BT[..., None], added_BTA, 0)
        sum_BTA, cache = jnp.cumsum(added_BTA, axis=1), None
        if memory is not None:
            cache, layer = memory
            sum_BTA += cache[layer][:, None]
            cache = cache.at[layer].set(sum_BTA[:, -1])
        return self.config.scale * (sum_BTA / shared[..., None]) @ self.out[...], cache


MEAN_ROWS = (
    Row("mean_attn.in_proj.weight", "(0/2 A) D", "attention.value", "D A"),
    Row("mean_attn.in_proj.weight", "(1/2 A) D", "attention.gate", "D A"),
    Row("mean_attn.out_proj.weight", "D A", "attention.out", "A D"),
)


def read_mixture(settings: Settings) -> MoEConfig:
    return read_moe(presets.mixtral, settings, "moe_intermediate_size")


def read(settings: Settings, moe: MoEConfig) -> DecoderConfig:
    """Layers of both kinds, as layer_types has them; without it none is of grouped attention."""
    around = read_around(settings)
    mean = MeanConfig(
        model_dim=around["model_dim"], width=settings.size("mean_width"), scale=settings.number("mean_scale", 1.0)
    )
    types = settings.strings("layer_types") or ["mean"] * settings.size("num_hidden_layers")
    kinds: dict[str, LayerAttention] = {"mean": mean}
    if "full" in types:
        kinds["full"] = read_decoder(settings, moe).attention
    return DecoderConfig(layers=tuple(LayerConfig(attention=kinds[one], ffn=moe) for one in types), **around)


def write(config: DecoderConfig) -> dict[str, Any]:
    types = ["mean" if isinstance(layer.attention, MeanConfig) else "full" for layer in config.layers]
    mean = config.layers[types.index("mean")].attention
    assert isinstance(mean, MeanConfig)
    written = write_decoder(config) | {"layer_types": types} if "full" in types else write_around(config)
    return written | {"mean_width": mean.width, "mean_scale": mean.scale}


NAMES = Names(PER_EXPERT, "hf_experts", "hf_mean_moe")
MEAN_MOE = Family(
    "mean_moe", Mixture(read_mixture, lambda moe: write_moe(moe, "num_experts", "moe_intermediate_size"), NAMES, NAMES),
    Whole(
        "MeanMoeForCausalLM", read, write, attention={"grouped": GROUPED, "mean": MEAN_ROWS},
        order=("self_attn.", "mean_attn.", "mlp.", "input_layernorm.", "post_attention_layernorm."),
    ),
)


def add(monkeypatch: pytest.MonkeyPatch) -> Family:
    """All that is needed outside this file."""
    monkeypatch.setitem(attention.KINDS, MeanConfig, MeanAttention)
    monkeypatch.setitem(FAMILIES, MEAN_MOE.name, MEAN_MOE)
    return MEAN_MOE
