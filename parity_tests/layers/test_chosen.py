"""The dispatcher for few tokens against the one-hot reference: answers, gradients, and when it is taken."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import MoE, MoEConfig, kernels, presets
from jax_moe.kernels.chosen import are_few
from parity_tests.shared.compare import MismatchError, check_close
from parity_tests.shared.filled import filled

CONTRACTS: dict[str, MoEConfig] = {
    "mixtral": presets.mixtral(6, 10, 12, 2),
    "qwen2_moe": presets.qwen2_moe(6, 10, 12, 2, shared_dim=4),
    "weighted input": dataclasses.replace(
        presets.mixtral(6, 10, 12, 2),
        expert=dataclasses.replace(presets.mixtral(6, 10, 12, 2).expert, weight_on="input"),
    ),
    "biased": dataclasses.replace(
        presets.mixtral(6, 10, 12, 2), expert=dataclasses.replace(presets.mixtral(6, 10, 12, 2).expert, bias=True)
    ),
}
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)), jnp.float32)
MASK = jnp.asarray([[True, True, True], [False, True, True]])
TOLERANCE = 1.5e-6  # measured 1.8e-7


def answers(config: MoEConfig, dispatcher: Any) -> dict[str, np.ndarray]:
    """The layer's answer, also without gradients, and the gradients of its weighted sum by every parameter and by the
    input.
    """
    layer = filled(lambda: MoE(dataclasses.replace(config, dispatcher=dispatcher), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(layer)

    def loss(state: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(graphdef, state)(x, mask_BT=MASK)[0]
        return (y * jnp.arange(y.size).reshape(y.shape)).sum(), y

    (by_state, by_x), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, X)
    alone = jax.jit(lambda state, x: loss(state, x)[1])(state, X)  # on CPU without gradients another loop
    gradients = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(by_state)}
    return {"answer": np.asarray(y), "answer alone": np.asarray(alone), "by x": np.asarray(by_x), **gradients}


@pytest.mark.parametrize("name", CONTRACTS)
def test_few_tokens_agree_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(kernels, "chosen_dispatch", lambda *args: (taken.append("chosen"), chosen(*args))[1])
    found = answers(CONTRACTS[name], "auto")
    assert taken == ["chosen"] * 2  # with and without gradients
    check_close(found, answers(CONTRACTS[name], "einsum"), TOLERANCE, name)


chosen = kernels.chosen_dispatch


def test_a_wrong_expert_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def neighbour(x_GSD: Any, routing: Any, *rest: Any) -> Any:
        return chosen(x_GSD, routing._replace(expert_GSK=(routing.expert_GSK + 1) % 12), *rest)

    monkeypatch.setattr(kernels, "chosen_dispatch", neighbour)
    config = CONTRACTS["mixtral"]
    with pytest.raises(MismatchError, match=r"answer|by x|experts"):
        check_close(answers(config, "auto"), answers(config, "einsum"), TOLERANCE, "neighbours")


def test_few_are_no_more_choices_than_experts() -> None:
    config = presets.mixtral(6, 10, 12, 2)
    assert [num for num in range(1, 20) if are_few(num, config)] == [1, 2, 3, 4, 5, 6]
