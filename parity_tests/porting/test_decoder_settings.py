"""Contracts of families whose decoders are tables, written as config.json and read again. Needs no torch."""

from typing import Any

import pytest

from jax_moe import DecoderConfig, presets
from jax_moe.config.as_json import config_from_json, config_to_json
from jax_moe.config.attention import RopeConfig
from jax_moe.porting.families import FAMILIES

SIZES: dict[str, Any] = {
    "vocab_size": 11, "model_dim": 8, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4,
    "balance_loss_weight": 0.0,
}
FIRST = {"dense_layers": (0, 1), "dense_dim": 5}
V3 = presets.glm4_moe(8, 6, 4, 2)
HALF = RopeConfig(fraction=0.5)
# Contracts that each family can say, and one that it cannot with the field that it has no words for.
SAID: dict[str, tuple[dict[str, Any], ...]] = {
    "glm4_moe": ({"moe": V3, "rope": HALF}, {"moe": V3, "qk_norm": "per_head", "qkv_bias": True, **FIRST}),
}
UNSAID: dict[str, tuple[dict[str, Any], str]] = {
    "glm4_moe": ({"moe": V3, "dense_layers": (1,), "dense_dim": 5}, "dense_layers"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_a_family_can_say(name: str) -> None:
    for own in SAID[name]:
        config = DecoderConfig.grouped(**SIZES | own)
        values = FAMILIES[name].values(config)
        assert FAMILIES[name].config(values) == config
        assert config_from_json(DecoderConfig, config_to_json(config), "config") == config


@pytest.mark.parametrize("name", UNSAID)
def test_what_a_family_cannot_say(name: str) -> None:
    own, field = UNSAID[name]
    with pytest.raises(ValueError, match=rf"^{name}: must be a contract of that family; it cannot say {field}$"):
        FAMILIES[name].values(DecoderConfig.grouped(**SIZES | own))


@pytest.mark.parametrize(("changes", "message"), [
    ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1: must be an integer of at least 0"),
    ({"rope_parameters": {"partial_rotary_factor": 2.0}}, "rope_parameters: fraction=2.0: must be a number above 0 and at most 1"),
    ({"use_qk_norm": "yes"}, "use_qk_norm='yes': must be true or false"),
])
def test_a_wrong_setting_is_named(changes: dict[str, Any], message: str) -> None:
    values = FAMILIES["glm4_moe"].values(DecoderConfig.grouped(**SIZES | SAID["glm4_moe"][0]))
    with pytest.raises(ValueError) as caught:
        FAMILIES["glm4_moe"].config(values | changes)
    assert str(caught.value) == message
