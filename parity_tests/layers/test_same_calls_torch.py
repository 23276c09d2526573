"""`torch_ref`'s layers and model are called as `jax_moe`'s are."""

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="this leg has no PyTorch")

import torch_ref  # noqa: E402
from parity_tests.layers.bad_arrays import TAKES, TOKENS, contracts  # noqa: E402
from parity_tests.layers.same_calls import (  # noqa: E402
    TABLE,
    check_form,
    check_names,
    check_padding,
    check_replay,
    model_arrays,
    refused,
)

KINDS = {
    "moe": torch_ref.MoE, "soft": torch_ref.SoftMoE, "attention": torch_ref.Attention, "block": torch_ref.Block,
    "soft block": torch_ref.Block,
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    return KINDS[name](contracts()[name])


def tensors(arrays: dict[str, Any]) -> dict[str, Any]:
    floats = {"f": torch.float32, "i": torch.int64, "b": torch.bool}
    return {name: torch.from_numpy(np.array(value)).to(floats[value.dtype.kind]) for name, value in arrays.items()}


def call(layer: Any, x: np.ndarray, **arrays: Any) -> tuple:
    with torch.no_grad():
        answer = layer(torch.from_numpy(x), **tensors(arrays))
    y_BTD, stats = (answer, ()) if isinstance(layer, torch_ref.Attention) else answer
    return y_BTD.numpy(), tuple(value.numpy() for value in stats)


@pytest.mark.parametrize("name", TAKES)
def test_every_layer(name: str) -> None:
    layer = made(name)
    takes = set(TAKES["block" if KINDS[name] is torch_ref.Block else name])
    check_names(layer.forward, "x_BTD", takes | TABLE.get(name, set()))
    check_form(call, layer, name)
    check_padding(call, layer, name)


def test_a_block_replays_as_its_mixture() -> None:
    check_replay(call, made("block"))


def test_the_model_has_a_call_and_run() -> None:
    torch.manual_seed(0)
    model = torch_ref.MakeMoE(contracts()["model"])
    names = {"mask_BT", "randomness", "expert_LBTK", "remat"}
    check_names(model.forward, "tokens_BT", names)
    check_names(model.run, "tokens_BT", names | {"watch"})
    arrays, draws = model_arrays(3)
    tokens, given = torch.from_numpy(TOKENS), {**tensors(arrays), "randomness": torch_ref.Randomness(**tensors(draws))}
    output = model.run(tokens, **given)
    assert isinstance(output, torch_ref.ModelOutput)
    np.testing.assert_array_equal(output.expert_LBTK, arrays["expert_LBTK"])
    for remat in ("none", "full"):
        assert torch.equal(model(tokens, **given, remat=remat), output.logits_BTV)
    other = model(tokens, **{**given, "expert_LBTK": given["expert_LBTK"].flip(1)})
    refused(np.testing.assert_array_equal, other.detach(), output.logits_BTV.detach())
