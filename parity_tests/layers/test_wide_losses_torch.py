"""Losses and statistics of bf16 and fp16 arrays are those of the same numbers in fp32, in both packages."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="this leg has no PyTorch")

from jax_moe import losses as ours  # noqa: E402
from torch_ref import losses as theirs  # noqa: E402

G, S, E, K = 1, 1031, 4, 2
GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(size=(G, S, E)) * 4
CHOICES = np.argsort(-LOGITS, axis=-1)[..., :K]
MASK = GENERATOR.random((G, S)) < 0.7
LOAD = GENERATOR.random(E)
CALLS: dict[str, dict[str, Any]] = {
    "masked_mean": {"x_GS": LOGITS, "mask_GS": MASK}, "router_z_loss": {"logits_GSE": LOGITS, "mask_GS": MASK},
    "router_entropy": {"logits_GSE": LOGITS, "mask_GS": MASK}, "squared_cv": {"x_E": LOAD},
    "importance": {"expert_GSK": CHOICES, "weight_GSK": np.abs(LOGITS[..., :K]), "num_experts": E, "mask_GS": MASK},
    "smooth_load": {
        "clean_GSE": LOGITS, "noisy_GSE": LOGITS + 1, "scale_GSE": np.exp(LOGITS / 4), "top_k": K, "mask_GS": MASK
    },
}


def value(name: str, package: Any, arguments: dict[str, Any]) -> np.ndarray:
    """A loss of either package, as numpy; that of a float array must be in fp32."""
    found = getattr(package, name)(**arguments)
    assert str(found.dtype).removeprefix("torch.") == "float32"
    return np.asarray(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CALLS)
def test_narrow_arrays_are_computed_wide(name: str, dtype: str) -> None:
    floats = {
        key: torch.tensor(x).to(getattr(torch, dtype))
        for key, x in CALLS[name].items()
        if np.asarray(x).dtype.kind == "f"
    }
    others = {key: x for key, x in CALLS[name].items() if key not in floats}
    as_torch = {key: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for key, x in others.items()}
    as_jax = {key: jnp.asarray(x) if isinstance(x, np.ndarray) else x for key, x in others.items()}
    wide = {key: x.float() for key, x in floats.items()}
    wanted = value(name, theirs, wide | as_torch)
    narrow = {key: jnp.asarray(x.float().numpy(), dtype) for key, x in floats.items()}
    # measured: 3e-7; the sums of bf16 are off by 4e-3
    np.testing.assert_allclose(value(name, theirs, floats | as_torch), wanted, rtol=3e-6)
    np.testing.assert_allclose(value(name, ours, narrow | as_jax), wanted, rtol=3e-6)


def test_a_load_in_bf16_is_rounded_once() -> None:
    exact = np.bincount(CHOICES[MASK].ravel(), minlength=E) / CHOICES[MASK].size
    for found in (
        ours.expert_load(jnp.asarray(CHOICES), E, jnp.bfloat16, jnp.asarray(MASK)),
        theirs.expert_load(torch.from_numpy(CHOICES), E, torch.bfloat16, torch.from_numpy(MASK)).float().numpy(),
    ):
        np.testing.assert_array_equal(
            np.asarray(found, np.float32), torch.tensor(exact).to(torch.bfloat16).float().numpy()
        )
