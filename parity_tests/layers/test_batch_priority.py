"""Batch Prioritized Routing against V-MoE's own rule, told again in NumPy: token for token, in both frameworks."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import presets
from jax_moe.config.describe import describe
from jax_moe.config.moe import MoEConfig
from jax_moe.dispatch import assign_slots
from jax_moe.routing import route
from parity_tests.shared.compare import MismatchError, check_exact

GROUPS, S, E, K = 24, 12, 4, 2


def contract(priority: str, factor: float = 0.5) -> MoEConfig:
    return presets.vmoe(8, 8, E, K).with_capacity(factor, multiple=1, priority=priority)


def logits(seed: int, ties: bool = False) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(S, E))
    return (np.round(drawn) if ties else drawn).astype(np.float32)


def by_vmoe(gates_SE: np.ndarray, capacity: int, by_best_weight: bool) -> np.ndarray:
    """Buffer index of every choice, `capacity` if it is dropped: a running count over choices in V-MoE's order."""
    chosen_SK = np.argsort(-gates_SE, axis=1, kind="stable")[:, :K]
    order = np.argsort(-gates_SE.max(axis=1), kind="stable") if by_best_weight else np.arange(S)
    one_hot = np.eye(E, dtype=int)[chosen_SK[order].T.ravel()]  # all first choices, then all second
    place = (np.cumsum(one_hot, axis=0) * one_hot).sum(axis=1) - 1
    index_SK = np.empty((S, K), int)
    index_SK[order] = place.reshape(K, S).T
    return np.minimum(index_SK, capacity)


def in_jax(logits_SE: np.ndarray, config: MoEConfig) -> tuple[np.ndarray, np.ndarray]:
    """Gates of all experts as the router computed them, and slots."""
    routing = route(jnp.asarray(logits_SE)[None], config)
    slots = assign_slots(routing, config, config.expert_capacity(S))
    gates = np.asarray(route(jnp.asarray(logits_SE)[None], dataclasses.replace(config, top_k=E)).weight_GSK[0])
    order = np.argsort(-logits_SE, axis=1, kind="stable")
    by_expert = np.empty_like(gates)
    np.put_along_axis(by_expert, order, gates, axis=1)
    return by_expert, np.asarray(slots.slot_GSK[0])


def in_torch(logits_SE: np.ndarray, config: MoEConfig) -> tuple[np.ndarray, np.ndarray]:
    torch = pytest.importorskip("torch", reason="the other framework")
    from torch_ref import dispatch, routing

    routed = routing.route(torch.from_numpy(logits_SE)[None], config)
    slots = dispatch.assign_slots(routed, config, config.expert_capacity(S))
    return torch.from_numpy(logits_SE).softmax(-1).numpy(), slots.slot_GSK[0].numpy()


Side = Callable[[np.ndarray, MoEConfig], tuple[np.ndarray, np.ndarray]]


def differing(side: Side, priority: str, by_best_weight: bool, ties: bool = False) -> int:
    """In how many of the groups the slots are others than V-MoE's."""
    config, count = contract(priority), 0
    for seed in range(GROUPS):
        gates, slots = side(logits(seed, ties), config)
        expected = by_vmoe(gates, config.expert_capacity(S), by_best_weight).astype(slots.dtype)
        try:
            check_exact({"slot": slots}, {"slot": expected}, priority)
        except MismatchError:
            count += 1
    return count


@pytest.mark.parametrize("side", [in_jax, in_torch])
def test_slots_are_those_of_vmoe(side: Side) -> None:
    assert differing(side, "batch", by_best_weight=True) == 0
    assert differing(side, "choice", by_best_weight=False) == 0
    assert differing(side, "batch", by_best_weight=True, ties=True) == 0


@pytest.mark.parametrize("other", ["token", "choice", "probability"])
def test_the_other_orders_are_other_orders(other: str) -> None:
    assert differing(in_jax, other, by_best_weight=True) >= GROUPS / 2


def test_equal_tokens_are_served_in_their_order() -> None:
    for side in (in_jax, in_torch):
        _, slots = side(np.zeros((S, E), np.float32), contract("batch"))
        assert slots[:, 0].tolist() == [0, 1, 2, *[3] * (S - 3)]  # three slots


def test_the_preset_asks_for_it_and_words_say_it() -> None:
    plain, asked = presets.vmoe(), presets.vmoe(batch_priority=True)
    assert plain.capacity is not None and plain.capacity.priority == "choice"
    assert asked.capacity == dataclasses.replace(plain.capacity, priority="batch")
    assert presets.vmoe(capacity_factor=None, batch_priority=True).capacity is None
    words = "tokens with the highest weight first, their first choices before all second choices"
    assert any(line.startswith("capacity:") and line.endswith(words) for line in describe(asked))


def test_it_survives_a_folder() -> None:
    from jax_moe.config.as_json import config_from_json, config_to_json

    config = presets.vmoe(8, 8, E, K, batch_priority=True)
    assert config_from_json(MoEConfig, config_to_json(config), "config") == config
