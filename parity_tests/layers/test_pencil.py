"""Every JAX dispatcher against answers worked by hand (see `pencil.py`). Long because every part has its stories."""

import dataclasses
from collections.abc import Iterator
from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import MoE, SoftMoE, losses
from jax_moe.attention.multihead import Attention
from jax_moe.config.attention import AttentionConfig
from jax_moe.config.moe import BalanceConfig, CapacityConfig, ExpertConfig, MoEConfig, RouterConfig, SoftMoEConfig
from jax_moe.presets import gpt_oss
from jax_moe.routing import update_correction_bias
from jax_moe.soft_moe import soft_logits, soft_stats, soft_weights
from parity_tests.layers import pencil
from parity_tests.layers.pencil import Scenario, layer
from parity_tests.shared.filled import filled

WIDE = jnp.dtype("float64")
RTOL = 2e-15  # of the largest entry of an answer


@pytest.fixture(autouse=True, scope="module")
def fp64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def agree(got: object, want: object, rtol: float = RTOL) -> None:
    """Raises unless `got` equals `want` to `rtol` of the largest entry, including NaN and shape."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}: must be {want.shape}"
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * max(1.0, np.abs(want).max()))


def build(config: MoEConfig, weights: dict[str, np.ndarray], dtype: jnp.dtype = WIDE) -> MoE:
    """The layer with all its parameters set. Raises for a missing or an additional name."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0), param_dtype=dtype)))
    flat = nnx.to_flat_state(state)
    assert {".".join(path) for path, _ in flat} == set(weights)
    filled = []
    for path, variable in flat:
        value = weights[".".join(path)]
        assert value.shape == variable.shape, f"{path}: {value.shape}, not {variable.shape}"
        filled.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def dispatchers(config: MoEConfig) -> tuple[str, ...]:
    return ("einsum", "grouped", "ragged", "blocks", "chosen") if config.capacity is None else ("einsum", "gather")


def told(stories: list[Scenario]) -> list:
    return [pytest.param(s, d, id=f"{s.name}, {d}") for s in stories for d in dispatchers(s.config)]


@pytest.mark.parametrize(("story", "dispatcher"), told([*pencil.WEIGHTS, *pencil.DROPS, *pencil.EXPERTS]))
def test_story(story: Scenario, dispatcher: str) -> None:
    moe = build(dataclasses.replace(story.config, dispatcher=dispatcher), story.all_weights())
    mask = None if story.mask_BT is None else jnp.asarray(story.mask_BT)
    tokens = None if story.tokens_BT is None else jnp.asarray(story.tokens_BT, jnp.int32)
    state = None if story.state_BTI is None else jnp.asarray(story.state_BTI, WIDE)
    y_BTD, stats = moe(jnp.asarray(story.x_BTD, WIDE), mask_BT=mask, tokens_BT=tokens, router_state_BTI=state)
    agree(y_BTD, story.answer_BTD)
    agree(stats.dropped_fraction, story.dropped)


def test_a_wrong_story_is_caught() -> None:
    wrong = dataclasses.replace(pencil.DROPS[1], answer_BTD=[pencil.KEEPS_CHOICE])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_story(wrong, "einsum")


def test_the_three_priorities_drop_three_different_people() -> None:
    answers = [pencil.KEEPS_TOKEN, pencil.KEEPS_CHOICE, pencil.KEEPS_PROBABILITY]
    assert all(answers.count(answer) == 1 for answer in answers)
    assert all(list(pencil.SERVED.values()).count(served) == 1 for served in pencil.SERVED.values())


@pytest.mark.parametrize("priority", ["token", "choice", "probability", "batch"])
def test_choices_and_slots(priority: str) -> None:
    config = layer(capacity=CapacityConfig(priority=priority))
    found = build(config, pencil.pencil_weights(config)).run(jnp.asarray(pencil.ONE, WIDE))
    assert found.capacity == 2
    np.testing.assert_array_equal(found.routing.expert_GSK[0], pencil.CHOICES)
    np.testing.assert_array_equal(found.slots.slot_GSK[0], pencil.SLOTS[priority])


@pytest.mark.parametrize("dtype", [jnp.dtype(name) for name in ("bfloat16", "float16", "float32")], ids=str)
@pytest.mark.parametrize("order", ["score_then_select", "select_then_softmax"])
def test_ties_go_to_the_lower_index_in_every_dtype(dtype: jnp.dtype, order: str) -> None:
    config = layer(num_experts=8, top_k=3, router=dataclasses.replace(layer().router, order=order))
    moe = build(config, pencil.pencil_weights(config), dtype)
    # all equal; two equal best at 3 and 6, the rest equal; 1 alone at the bottom
    x = [[0] * 9, [0, 0, 0, 1, 0, 0, 1, 0, 0], [0, -1, 0, 0, 0, 0, 0, 0, 0]]
    routing = moe.run(jnp.asarray([x], dtype)).routing
    np.testing.assert_array_equal(routing.expert_GSK[0], [[0, 1, 2], [3, 6, 0], [0, 2, 3]])


def test_replayed_choices_get_the_weights_of_their_scores() -> None:
    # experts 2 and 0 are given, though 0 and 1 are best: 60 * 1/6 and 60 * 1/2
    moe = build(layer(), pencil.pencil_weights(layer()))
    y_BTD, _ = moe(
        jnp.asarray([[[*pencil.HALF_THIRD_SIXTH, 60.0]]], WIDE), expert_BTK=jnp.asarray([[[2, 0]]], jnp.int32)
    )
    agree(y_BTD, [[[30, 0, 10, 0]]])


@pytest.mark.parametrize(("logits", "experts", "answer"), pencil.MIXED)
def test_replayed_choices_under_the_sparse_mixer(logits: list, experts: list, answer: list) -> None:
    config = layer(router=pencil.MIXER)
    moe = build(config, pencil.pencil_weights(config))
    y_BTD, _ = moe(jnp.asarray([[[*logits, 60.0]]], WIDE), expert_BTK=jnp.asarray([[experts]], jnp.int32))
    agree(y_BTD, [[[*answer, 0]]])


# --- experts --------------------------------------------------------------------------------------------------------
def clamped_answer(x_N2: jax.Array) -> jax.Array:
    return build(pencil.CLAMPED, pencil.CLAMPED_WEIGHTS, x_N2.dtype)(x_N2[None])[0][0, :, 0]


def test_clamped_experts_and_their_gradient_at_the_bound() -> None:
    table = np.asarray(pencil.CLAMP_TABLE, float)
    x_N2 = jnp.asarray(table[:, :2], WIDE)

    @jax.jit
    def both(x_N2: jax.Array) -> tuple[jax.Array, jax.Array]:
        answer, pull = jax.vjp(clamped_answer, x_N2)
        return answer, pull(jnp.ones_like(answer))[0]

    answer, gradient = both(x_N2)
    agree(answer, table[:, 2])
    agree(gradient, table[:, 3:])


@pytest.mark.parametrize(
    ("config", "weights", "table"),
    [
        (pencil.AFTER, {}, pencil.AFTER_TABLE), (pencil.BESIDE, pencil.SHARED_WEIGHTS, pencil.BESIDE_TABLE),
        (pencil.SOFT_CAPPED, {}, pencil.SOFT_TABLE),
    ],
    ids=["the clamp after the activation", "a shared expert of its own bound and scale", "soft caps"],
)
def test_other_clamps(config: MoEConfig, weights: dict[str, np.ndarray], table: list) -> None:
    numbers = np.asarray(table, float)
    moe = build(config, {**pencil.CLAMPED_WEIGHTS, **weights})
    agree(jax.jit(lambda x: moe(x)[0])(jnp.asarray(numbers[None, :, :2], WIDE))[0, :, 0], numbers[:, 2])


def test_gpt_oss_activation() -> None:
    # (1 + 1) * gate * 3/4; and both at the bound of 7: 8 * 7 * sigmoid(11.914)
    expert = gpt_oss(model_dim=2, expert_dim=1, num_experts=1, top_k=1).expert
    config = dataclasses.replace(pencil.CLAMPED, expert=dataclasses.replace(expert, bias=False))
    moe = build(config, pencil.CLAMPED_WEIGHTS)
    y = jax.jit(lambda x: moe(x)[0])(jnp.asarray([[[pencil.QUICK_GATE, 1], [7, 7], [9, 9]]], WIDE))[0, :, 0]
    bound = 56 / (1 + exp(-11.914))
    agree(y, [1.5 * pencil.QUICK_GATE, bound, bound])


# --- losses ---------------------------------------------------------------------------------------------------------
def friends_stats(balance: BalanceConfig | None = None, x: list = pencil.ONE, **call: object) -> losses.MoEStats:
    config = layer(balance=balance or BalanceConfig())
    return build(config, pencil.pencil_weights(config))(jnp.asarray(x, WIDE), **call)[1]


def test_losses_of_the_friends() -> None:
    stats = friends_stats()
    agree(stats.expert_load_E, pencil.LOAD)
    agree(stats.router_prob_E, pencil.PROB)
    agree(stats.load_balance_loss, pencil.BALANCE)
    agree(stats.importance_cv2, pencil.IMPORTANCE_CV2)
    agree(stats.load_cv2, pencil.LOAD_CV2)
    agree(stats.router_z_loss, 0)  # logits are logarithms of probabilities: logsumexp is 0
    agree(friends_stats(pencil.HF_BALANCE).load_balance_loss, pencil.BALANCE_K)


@pytest.mark.parametrize("counted_in", ["batch", "group"])
def test_balance_loss_of_the_logits(counted_in: str) -> None:
    """A bias sends everybody to experts 1 and 2 by their sigmoids: the loss is that of the friends all the same."""
    router = RouterConfig(score="sigmoid", correction_bias=True)
    config = layer(router=router, balance=BalanceConfig(of="logits", counted_in=counted_in))
    weights = pencil.pencil_weights(config) | {"router.correction_bias": np.asarray([0.0, 9.0, 9.0])}
    stats = build(config, weights)(jnp.asarray(pencil.ONE, WIDE))[1]
    agree(stats.expert_load_E, [0, 1 / 2, 1 / 2])
    agree(stats.balance_load_E, pencil.LOAD)
    agree(stats.router_prob_E, pencil.PROB)
    agree(stats.load_balance_loss, pencil.BALANCE)


@pytest.mark.parametrize(("of", "counted_in", "mask", "want"), pencil.BY_SEQUENCE)
def test_balance_loss_of_each_sequence(of: str, counted_in: str, mask: list | None, want: float) -> None:
    """DeepSeek-V3's eq. 17 to 20, also where groups of three cut the sequences of two."""
    router = RouterConfig(score="sigmoid", correction_bias=True)
    for capacity in (None, CapacityConfig(factor=9.0, clamp=False, group="fixed", group_size=3)):
        config = layer(router=router, capacity=capacity, balance=BalanceConfig(of=of, counted_in=counted_in))
        moe = build(config, pencil.pencil_weights(config) | pencil.SEQUENCES_BIAS)
        stats = moe(jnp.asarray(pencil.SEQUENCES, WIDE), mask_BT=None if mask is None else jnp.asarray(mask))[1]
        agree(stats.load_balance_loss, want)


@pytest.mark.parametrize(("tokens", "bias", "added", "recentred"), pencil.BIASES)
def test_the_correction_bias_moves_towards_the_mean_load(
    tokens: list, bias: list, added: list, recentred: list
) -> None:
    before, tokens_E = jnp.asarray(bias, jnp.float32), jnp.asarray(tokens, jnp.int32)
    for recentre, want in ((False, added), (True, recentred)):
        after = update_correction_bias(before, tokens_E, 0.25, recentre)
        agree(after, np.add(bias, want), 2e-7)


def test_choices_are_counted_without_padding() -> None:
    chosen = jnp.asarray([[[0, 1], [1, 2], [0, 1]]])
    assert losses.tokens_per_expert(chosen, 3).tolist() == [2, 3, 1]
    mask = jnp.asarray([[True, True, False]])
    assert losses.tokens_per_expert(chosen, 3, mask).tolist() == [1, 2, 1]


def test_losses_do_not_see_padding() -> None:
    x = [pencil.sequence(pencil.STRANGER, *pencil.FRIENDS)]
    masked = friends_stats(x=x, mask_BT=jnp.asarray([[False, True, True, True]]))
    for got, want in zip(masked, friends_stats(), strict=True):
        agree(got, want)


def test_balanced_loss_is_one_or_k() -> None:
    agree(friends_stats(x=pencil.BALANCED).load_balance_loss, 1)
    agree(friends_stats(pencil.HF_BALANCE, x=pencil.BALANCED).load_balance_loss, 2)


def test_gradient_of_the_balance_loss_by_hand() -> None:
    config = layer()
    moe = build(config, pencil.pencil_weights(config))
    gradient = jax.jit(jax.grad(lambda x: moe(x)[1].load_balance_loss))(jnp.asarray(pencil.ONE, WIDE))
    agree(gradient[0, :, :3], pencil.BALANCE_GRADIENT)  # the logits are the first three features
    agree(gradient[0, :, 3], [0, 0, 0])


@pytest.mark.parametrize("score", list(pencil.SCORED))
def test_balance_loss_follows_the_scores(score: str) -> None:
    logits, prob, want = pencil.SCORED[score]
    config = layer(router=RouterConfig(score=score))
    moe = build(config, pencil.pencil_weights(config))
    alone = moe(jnp.asarray([[[*logits, 1.0]]], WIDE))[1]
    agree(alone.router_prob_E, prob)
    agree(alone.load_balance_loss, want)
    agree(alone.router_entropy, -sum(p * log(p) for p in prob))
    both = moe(jnp.asarray([[[*logits, 1.0], [*logits[::-1], 1.0]]], WIDE))[1]
    agree(both.router_prob_E, [(prob[0] + prob[2]) / 2, prob[1], (prob[0] + prob[2]) / 2])


def test_z_loss_and_entropy() -> None:
    # probabilities times e, e^2, e^3: logsumexp 1, 2, 3; (1 + 4 + 9) / 3
    shifted = [[[*(logit + n for logit in token[:3]), 1] for n, token in enumerate(pencil.ONE[0], 1)]]
    agree(friends_stats(x=shifted).router_z_loss, 14 / 3)
    agree(friends_stats(x=[[[0.0, 0.0, 0.0, 1.0]]]).router_entropy, log(3))
    # 1/2, 1/4, 1/4: ln 2 / 2 + 2 * ln 4 / 4
    agree(friends_stats(x=[pencil.sequence((2, 1, 1, 1))]).router_entropy, 1.5 * log(2))
    agree(friends_stats(x=[[[500.0, 0.0, 0.0, 1.0]]]).router_entropy, 0)


def test_squared_coefficient_of_variation() -> None:
    # 1, 3: mean 2, variance 1 (of the population, not 2 of the sample)
    agree(losses.squared_cv(jnp.asarray([1, 3], WIDE)), 1 / 4)
    agree(losses.squared_cv(jnp.asarray([5, 5, 5], WIDE)), 0)
    agree(losses.squared_cv(jnp.asarray([0, 0], WIDE)), 0)


def test_smooth_load() -> None:
    # Two experts, one place. Noisy 1, 0: expert 0 must beat 0, expert 1 must beat 1; clean 0 and 1: a coin toss each
    # Then clean 1 and 0 with deviation 1/2: 2 deviations above, 2 below
    noisy, clean = jnp.asarray([[[1, 0], [1, 0]]], WIDE), jnp.asarray([[[0, 1], [1, 0]]], WIDE)
    phi = 0.9772498680518208  # Phi(2)
    agree(losses.smooth_load(clean, noisy, jnp.full_like(clean, 0.5), 1), [0.5 + phi, 0.5 + 1 - phi])
    agree(losses.smooth_load(clean, noisy, jnp.full_like(clean, 0.5), 2), [2, 2])  # K = E: always in
    mask = jnp.asarray([[True, False]])
    agree(losses.smooth_load(clean, noisy, jnp.full_like(clean, 0.5), 1, mask), [0.5, 0.5])


def test_balance_loss_per_layer_or_pooled() -> None:
    # Layer 0 sends everybody to expert 0 with probability 3/4, layer 1 to expert 1: 2 * 1 * 3/4 each.
    # Pooled, both are used alike: f = P = (1/2, 1/2), and the loss is 1
    load, prob = jnp.asarray([[1, 0], [0, 1]], WIDE), jnp.asarray([[3 / 4, 1 / 4], [1 / 4, 3 / 4]], WIDE)
    for pooled, f_sums_to, top_k, want in [
        ("per_layer", "one", 1, 1.5), ("over_layers", "one", 1, 1.0), ("per_layer", "k", 2, 3.0),
        ("over_layers", "k", 2, 2.0),
    ]:
        config = layer(num_experts=2, top_k=top_k, balance=BalanceConfig(pooled=pooled, f_sums_to=f_sums_to))
        each = losses.load_balance_loss(load, prob, top_k, config.balance)
        zeros = jnp.zeros((2,), WIDE)
        stats = losses.MoEStats(
            load_balance_loss=each, router_z_loss=zeros, dropped_fraction=zeros, expert_load_E=load,
            router_entropy=zeros, router_prob_E=prob, importance_cv2=zeros, load_cv2=zeros,
            balance_load_E=load,
        )
        agree(losses.pool_balance_loss(stats, config), want)


# --- Soft MoE and attention -----------------------------------------------------------------------------------------
def soft_layer(residual: bool) -> SoftMoE:
    config = SoftMoEConfig(model_dim=2, num_experts=2, num_slots=1, hidden_dims=(), layer_norm=False, residual=residual)
    soft = filled(lambda: SoftMoE(config, rngs=nnx.Rngs(0), param_dtype=WIDE))
    soft.phi[...] = jnp.asarray(pencil.SOFT_PHI, WIDE)
    soft.experts.last_fc.kernel[...] = jnp.asarray(np.stack([np.eye(2) * f for f in pencil.SOFT_FACTORS]), WIDE)
    soft.experts.last_fc.bias[...] = jnp.zeros((2, 2), WIDE)
    return soft


def test_soft_moe() -> None:
    x = jnp.asarray(pencil.SOFT_X, WIDE)
    dispatch, combine = soft_weights(soft_logits(x, jnp.asarray(pencil.SOFT_PHI, WIDE)))
    agree(dispatch[0, :, :, 0], pencil.SOFT_DISPATCH)
    agree(combine[0, :, :, 0], pencil.SOFT_COMBINE)
    y_BTD, stats = soft_layer(residual=False)(x)
    agree(y_BTD, pencil.SOFT_ANSWER)
    agree(soft_layer(residual=True)(x)[0], pencil.SOFT_RESIDUAL)
    check_soft_stats(stats, pencil.SOFT_LOAD, pencil.SOFT_ENTROPY, pencil.SOFT_CV2)
    masked, stats = soft_layer(residual=False)(x, mask_BT=jnp.asarray([[True, False]]))
    agree(masked[0, :1], pencil.SOFT_MASKED)
    check_soft_stats(stats, *pencil.SOFT_MASKED_STATS)
    logits_BTEC = jnp.repeat(soft_logits(x, jnp.asarray(pencil.SOFT_PHI, WIDE)), 2, axis=3)  # every slot twice
    check_soft_stats(soft_stats(logits_BTEC), pencil.SOFT_LOAD, pencil.SOFT_ENTROPY, pencil.SOFT_CV2)


def check_soft_stats(stats: losses.MoEStats, load: list[float], entropy: float, cv2: float) -> None:
    agree(stats.expert_load_E, load)
    agree(stats.router_prob_E, load)
    agree(stats.router_entropy, entropy)
    for value in (stats.importance_cv2, stats.load_cv2):
        agree(value, cv2)
    for value in (stats.load_balance_loss, stats.router_z_loss, stats.dropped_fraction):
        agree(value, 0)


def test_next_token_loss() -> None:
    logits = jnp.asarray(pencil.LOSS_LOGITS, WIDE)
    targets, mask = jnp.asarray(pencil.LOSS_TARGETS), jnp.asarray(pencil.LOSS_MASK)
    agree(losses.next_token_loss(logits, targets), pencil.LOSS)
    agree(losses.next_token_loss(logits, targets, mask), pencil.LOSS_MASKED)
    anything = targets.at[0, 2].set(9)  # at padding
    agree(losses.next_token_loss(logits, anything, mask), pencil.LOSS_MASKED)
    agree(losses.next_token_loss(logits, targets, mask & False), 0)
    with pytest.raises(AssertionError):
        agree(losses.next_token_loss(logits, targets * 0), pencil.LOSS)


@pytest.mark.parametrize("scale", ["head_dim", "model_dim"])
@pytest.mark.parametrize("projections", ["per_head", "fused"])
def test_attention(scale: str, projections: str) -> None:
    config = AttentionConfig(model_dim=4, num_heads=4, scale=scale, projections=projections)
    attention = filled(lambda: Attention(config, rngs=nnx.Rngs(0), param_dtype=WIDE))
    maps = np.zeros((3, 4, 4, 1))  # query, key, value: [D, H, A]
    maps[0, 0, 0] = maps[1, 1, 0] = maps[2, 2, 0] = 1
    if projections == "fused":
        attention.qkv[...] = jnp.asarray(np.moveaxis(maps, 0, 1), WIDE)
    else:
        attention.query[...], attention.key[...], attention.value[...] = (jnp.asarray(kernel, WIDE) for kernel in maps)
    attention.out[...] = jnp.asarray(np.eye(4).reshape(4, 1, 4), WIDE)
    attention.out_bias[...] = jnp.zeros((4,), WIDE)
    y = attention(jnp.asarray(pencil.ATTENTION_X, WIDE))
    agree(y[0, :, 0], pencil.ATTENTION_ANSWER[scale])
    agree(y[0, :, 1:], np.zeros((2, 3)))


def test_dropout_by_mask() -> None:
    # Ann's answers from experts 1 and 0; the second is dropped out, the first divided by 1 - 1/2
    config = layer(expert=ExpertConfig(activation="identity", gated=False, dropout=0.5))
    keep_BTKD = jnp.asarray([[[[True] * 4, [False] * 4]]])
    for dispatcher in dispatchers(config):
        moe = build(dataclasses.replace(config, dispatcher=dispatcher), pencil.pencil_weights(config))
        agree(moe(jnp.asarray([pencil.sequence(pencil.ANN)], WIDE), keep_BTKD=keep_BTKD)[0], [[[0, 20, 0, 0]]])
