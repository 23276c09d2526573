"""The tiled dispatcher with several tiles per expert, and its queues: against the reference and against counting."""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import MoE, MoEConfig, dispatch, presets
from jax_moe.kernels import grouped, tiles
from parity_tests.shared.compare import MismatchError, check_close, check_exact
from parity_tests.shared.filled import filled
from parity_tests.shared.quick import QUICK

TOLERANCE = 2e-15  # measured 4e-16
E, K = 5, 2
MIXTRAL = presets.mixtral(6, 10, E, K)
GPT_OSS = presets.gpt_oss(6, 10, E, K)  # biases and clamps
ON_INPUT = dataclasses.replace(MIXTRAL, expert=dataclasses.replace(MIXTRAL.expert, weight_on="input", gated=False))
DROPOUT = dataclasses.replace(MIXTRAL, expert=dataclasses.replace(MIXTRAL.expert, dropout=0.3))


def choices(load: str, num_tokens: int) -> np.ndarray:
    """[1, T, K]: spread, all to one pair, or all but two experts empty."""
    random = np.random.default_rng(len(load))
    if load == "spread":
        return np.argsort(random.normal(size=(num_tokens, E)), axis=1)[None, :, :K]
    return np.broadcast_to(np.asarray([1, 4] if load == "two" else [3, 0]), (1, num_tokens, K))


def answers(config: MoEConfig, dispatcher: str, load: str, num_tokens: int, masked: bool) -> dict[str, np.ndarray]:
    """Answer, statistics and all gradients in fp64, with the choices given."""
    with jax.enable_x64(True):
        config = dataclasses.replace(config, dispatcher=dispatcher)  # type: ignore[arg-type]
        layer = filled(lambda: MoE(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64))
        graphdef, state = nnx.split(layer)
        random = np.random.default_rng(7)
        x = random.normal(size=(1, num_tokens, 6))
        keep = random.random(size=(1, num_tokens, K, 6)) > 0.3
        mask = jnp.asarray(np.arange(num_tokens)[None] % 3 != 1) if masked else None

        @partial(jax.jit, compiler_options=QUICK)
        def run(state: nnx.State, x: jax.Array) -> Any:
            def loss(state: nnx.State, x: jax.Array) -> tuple[jax.Array, Any]:
                chosen = jnp.asarray(choices(load, num_tokens))
                y, stats = nnx.merge(graphdef, state)(x, mask_BT=mask, expert_BTK=chosen, keep_BTKD=jnp.asarray(keep))
                return (y * jnp.sin(jnp.arange(y.size).reshape(y.shape))).sum(), (y, stats)

            return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)

        (by_state, by_x), (y, stats) = run(state, jnp.asarray(x))
        gradients = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(by_state)}
        return {
            "answer": np.asarray(y), "by x": np.asarray(by_x), "dropped": np.asarray(stats.dropped_fraction),
            **gradients,
        }


def compare_with_reference(what: str, config: MoEConfig = MIXTRAL, load: str = "spread", masked: bool = False) -> None:
    """Raises MismatchError."""
    found = answers(config, "grouped", load, 23, masked)
    check_close(found, reference(config, load, masked), TOLERANCE, what)


@functools.cache
def reference(config: MoEConfig, load: str, masked: bool) -> dict[str, np.ndarray]:
    """Of the one-hot dispatcher."""
    return answers(config, "einsum", load, 23, masked)


@pytest.mark.parametrize("sizes", [(2, 4), (3, 5, 64)], ids=str)
@pytest.mark.parametrize(
    ("config", "load", "masked"),
    [
        (MIXTRAL, "spread", False), (MIXTRAL, "two", True), (MIXTRAL, "others", False), (GPT_OSS, "spread", True),
        (GPT_OSS, "two", False), (ON_INPUT, "spread", True), (DROPOUT, "spread", False), (DROPOUT, "others", True),
    ],
    ids=["mixtral", "two", "others", "gpt_oss", "gpt_oss two", "on input", "dropout", "dropout others"],
)
def test_tiles_of_any_size(
    monkeypatch: pytest.MonkeyPatch, config: MoEConfig, load: str, masked: bool, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(grouped, "tile_sizes", lambda *_: sizes)
    compare_with_reference(f"{load} {sizes}", config, load, masked)


def test_a_row_of_the_next_expert_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*args: Any) -> tiles.Tiles:
        plan = tiles.plan_tiles(*args)
        return plan._replace(row_I=plan.row_I + (plan.expert_I == 2))

    monkeypatch.setattr(grouped, "plan_tiles", late)
    with pytest.raises(MismatchError):
        compare_with_reference("late")


def test_a_gradient_that_forgets_the_first_tile_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    put = grouped._put_expert
    monkeypatch.setattr(grouped, "tile_sizes", lambda *_: (2, 4))
    monkeypatch.setattr(grouped, "_put_expert", lambda total, own, expert, add: put(total, own, expert, False))
    with pytest.raises(MismatchError, match="experts"):
        compare_with_reference("sets")


def test_sizes_hold_what_they_must() -> None:
    """Rising, and the waste below a sixth of the rows where experts have a fair share of many."""
    for num_rows, num_experts in ((1, 1), (20, 5), (2047, 8), (4096, 8), (16384, 64), (65536, 128), (100, 500)):
        sizes = tiles.tile_sizes(num_rows, num_experts)
        assert list(sizes) == sorted(set(sizes)) and sizes[0] >= 1
        if num_rows >= 2048:
            assert tiles.num_places(num_rows, num_experts, sizes) <= num_rows * 7 / 6


@pytest.mark.parametrize("priority", ["token", "choice", "probability", "batch"])
@pytest.mark.parametrize("packed", [True, False], ids=["one key", "two keys"])
def test_queue_positions_by_counting(monkeypatch: pytest.MonkeyPatch, priority: str, packed: bool) -> None:
    """Each choice's place is how many of its expert's came earlier, whichever way they are sorted."""
    if not packed:
        monkeypatch.setattr(dispatch, "LARGEST_KEY", 0)
    random = np.random.default_rng(3)
    G, S = 3, 17
    expert = np.argsort(random.normal(size=(G, S, E)), axis=2)[..., :K]
    weight = np.round(random.random(size=(G, S, K)), 1)  # with ties
    mask = random.random(size=(G, S)) > 0.2
    expected = np.zeros((G, S, K), int)
    for g in range(G):
        turns = [(s, k) for s in range(S) for k in range(K)]
        if priority == "choice":
            turns.sort(key=lambda turn: (turn[1], turn[0]))
        if priority == "probability":
            turns.sort(key=lambda turn: -weight[g][turn])
        if priority == "batch":
            turns.sort(key=lambda turn: (turn[1], -weight[g][turn[0]].max(), turn[0]))
        count = np.zeros(E, int)
        for s, k in turns:
            if mask[g, s]:
                expected[g, s, k] = count[expert[g, s, k]]
                count[expert[g, s, k]] += 1
    found = dispatch.queue_positions(
        jnp.asarray(expert), jnp.asarray(weight, jnp.float32), E, priority, jnp.asarray(mask)  # type: ignore[arg-type]
    )
    check_exact({"place": np.asarray(found)[mask]}, {"place": expected[mask].astype(np.int32)}, priority)
