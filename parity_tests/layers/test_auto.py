"""Which dispatcher `auto` takes, by platform, capacity, number of tokens, group size and expert width."""

import jax
import jax.numpy as jnp
import pytest

from jax_moe import MoE, MoEConfig, kernels, presets

DROPLESS = presets.mixtral(model_dim=4, expert_dim=96, num_experts=8, top_k=2)


def capped(group_size: int) -> MoEConfig:
    """Groups of a fixed number of tokens."""
    return DROPLESS.with_capacity(1.0, group="fixed", group_size=group_size)


@pytest.mark.parametrize(
    ("backend", "config", "num_tokens", "name"),
    [
        ("cpu", DROPLESS, 4, "chosen"), ("tpu", DROPLESS, 4, "chosen"), ("cpu", DROPLESS, 5, "grouped"),
        ("tpu", DROPLESS, 5, "ragged"), ("gpu", DROPLESS, 5, "ragged"), ("cpu", capped(8), 16, "gather"),
        ("gpu", capped(8), 16, "gather"), ("tpu", capped(8), 16, "einsum"), ("tpu", capped(9), 16, "gather"),
    ],
)
def test_auto(backend: str, config: MoEConfig, num_tokens: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class TakenError(Exception):
        pass

    def taken(*args: object) -> None:
        raise TakenError

    layer = MoE(config)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(kernels, f"{name}_dispatch", taken)
    with pytest.raises(TakenError):
        layer(jnp.ones((1, num_tokens, 4)))
