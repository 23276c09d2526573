"""`torch_ref` against answers worked by hand: the stories and literals of `test_pencil.py`."""

import dataclasses
from math import exp, log

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="this leg has no PyTorch")

import torch_ref  # noqa: E402
from jax_moe.config.attention import AttentionConfig  # noqa: E402
from jax_moe.config.moe import (  # noqa: E402
    BalanceConfig,
    CapacityConfig,
    ExpertConfig,
    MoEConfig,
    RouterConfig,
    SoftMoEConfig,
)
from jax_moe.presets import gpt_oss  # noqa: E402
from parity_tests.layers import pencil  # noqa: E402
from parity_tests.layers.pencil import Scenario, layer  # noqa: E402
from torch_ref import losses  # noqa: E402
from torch_ref.routing import update_correction_bias  # noqa: E402
from torch_ref.soft_moe import soft_logits, soft_stats, soft_weights  # noqa: E402

RTOL = 2e-15  # measured: 3e-16 of the largest entry of an answer


def tensor(x: object) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def agree(got: torch.Tensor, want: object, rtol: float = RTOL) -> None:
    got_n, want_n = got.detach().double().numpy(), np.asarray(want, np.float64)
    assert got_n.shape == want_n.shape, f"shape {got_n.shape}: must be {want_n.shape}"
    np.testing.assert_allclose(got_n, want_n, rtol=0, atol=rtol * max(1.0, np.abs(want_n).max()))


def torch_names(weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Our names to `torch_ref.MoE`'s by hand, a line per kind, independent of the porting tables."""
    named = {}
    for name, value in weights.items():
        part, _, leaf = name.partition(".")
        kind, ending = (leaf[: -len("_bias")], "bias") if leaf.endswith("_bias") else (leaf, "weight")
        if name == "shared_gate":
            named["shared_gate.weight"] = tensor(value.T)
        elif name == "answer_bias" or (part == "router" and leaf.endswith("scale")):
            named[name] = tensor(value)
        elif part.startswith("latent_") or leaf.endswith("scale"):
            torch_name = {"experts": "answer_norm"}
            named[f"{torch_name.get(part, part)}.weight"] = tensor(value.T)
        elif part == "router" and leaf.startswith("network"):
            path, vector = f"router.{kind}", value.ndim == 1
            named[path if vector and ending == "weight" else f"{path}.{ending}"] = tensor(value.T)
        elif part == "router":
            torch_name = {"kernel": "linear.weight", "bias": "linear.bias", "keys": "keys.weight"}.get(leaf, leaf)
            named[f"router.{torch_name}"] = tensor(value if leaf == "expert_table" else value.T)
        elif part == "shared":
            named[f"shared.{kind}.{ending}"] = tensor(value[0].T)
        else:
            for e, matrix in enumerate(value):
                named[f"{part}.{e}.{kind}.{ending}"] = tensor(matrix.T)
    return named


def build(config: MoEConfig, weights: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> torch_ref.MoE:
    moe = torch_ref.MoE(config).to(dtype)
    moe.load_state_dict(torch_names(weights), strict=True)
    return moe


@pytest.mark.parametrize("story", [*pencil.WEIGHTS, *pencil.DROPS, *pencil.EXPERTS], ids=lambda story: story.name)
def test_story(story: Scenario) -> None:
    mask = None if story.mask_BT is None else torch.tensor(story.mask_BT)
    tokens = None if story.tokens_BT is None else torch.tensor(story.tokens_BT)
    state = None if story.state_BTI is None else tensor(story.state_BTI)
    moe = build(story.config, story.all_weights())
    y_BTD, stats = moe(tensor(story.x_BTD), mask_BT=mask, tokens_BT=tokens, router_state_BTI=state)
    agree(y_BTD, story.answer_BTD)
    agree(stats.dropped_fraction, story.dropped)


def test_a_wrong_story_is_caught() -> None:
    wrong = dataclasses.replace(pencil.DROPS[1], answer_BTD=[pencil.KEEPS_CHOICE])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_story(wrong)


@pytest.mark.parametrize("priority", ["token", "choice", "probability", "batch"])
def test_choices_and_slots(priority: str) -> None:
    config = layer(capacity=CapacityConfig(priority=priority))
    output = build(config, pencil.pencil_weights(config)).run(tensor(pencil.ONE))
    assert output.capacity == 2
    assert output.routing.expert_GSK[0].tolist() == pencil.CHOICES
    assert output.slots.slot_GSK[0].tolist() == pencil.SLOTS[priority]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("order", ["score_then_select", "select_then_softmax"])
def test_ties_go_to_the_lower_index_in_every_dtype(dtype: torch.dtype, order: str) -> None:
    config = layer(num_experts=8, top_k=3, router=dataclasses.replace(layer().router, order=order))
    x = [[0] * 9, [0, 0, 0, 1, 0, 0, 1, 0, 0], [0, -1, 0, 0, 0, 0, 0, 0, 0]]
    routing = build(config, pencil.pencil_weights(config), dtype).run(torch.tensor([x], dtype=dtype)).routing
    assert routing.expert_GSK[0].tolist() == [[0, 1, 2], [3, 6, 0], [0, 2, 3]]


def test_replayed_choices_get_the_weights_of_their_scores() -> None:
    x = tensor([[[*pencil.HALF_THIRD_SIXTH, 60.0]]])
    y_BTD, _ = build(layer(), pencil.pencil_weights(layer()))(x, expert_BTK=torch.tensor([[[2, 0]]]))
    agree(y_BTD, [[[30, 0, 10, 0]]])


@pytest.mark.parametrize(("logits", "experts", "answer"), pencil.MIXED)
def test_replayed_choices_under_the_sparse_mixer(logits: list, experts: list, answer: list) -> None:
    config = layer(router=pencil.MIXER)
    moe = build(config, pencil.pencil_weights(config))
    y_BTD, _ = moe(tensor([[[*logits, 60.0]]]), expert_BTK=torch.tensor([[experts]]))
    agree(y_BTD, [[[*answer, 0]]])


# --- experts --------------------------------------------------------------------------------------------------------
def test_clamped_experts_and_their_gradient_at_the_bound() -> None:
    table = np.asarray(pencil.CLAMP_TABLE, float)
    x_N2 = tensor(table[:, :2]).requires_grad_()
    answer = build(pencil.CLAMPED, pencil.CLAMPED_WEIGHTS)(x_N2[None])[0][0, :, 0]
    answer.sum().backward()
    agree(answer, table[:, 2])
    agree(x_N2.grad, table[:, 3:])


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
    y = build(config, {**pencil.CLAMPED_WEIGHTS, **weights})(tensor(numbers[None, :, :2]))[0][0, :, 0]
    agree(y, numbers[:, 2])


def test_gpt_oss_activation() -> None:
    expert = gpt_oss(model_dim=2, expert_dim=1, num_experts=1, top_k=1).expert
    config = dataclasses.replace(pencil.CLAMPED, expert=dataclasses.replace(expert, bias=False))
    y = build(config, pencil.CLAMPED_WEIGHTS)(tensor([[[pencil.QUICK_GATE, 1], [7, 7], [9, 9]]]))[0][0, :, 0]
    bound = 56 / (1 + exp(-11.914))
    agree(y, [1.5 * pencil.QUICK_GATE, bound, bound])


# --- losses ---------------------------------------------------------------------------------------------------------
def friends_stats(balance: BalanceConfig | None = None, x: list = pencil.ONE, **call: object) -> losses.MoEStats:
    config = layer(balance=balance or BalanceConfig())
    return build(config, pencil.pencil_weights(config))(tensor(x), **call)[1]


def test_losses_of_the_friends() -> None:
    stats = friends_stats()
    agree(stats.expert_load_E, pencil.LOAD)
    agree(stats.router_prob_E, pencil.PROB)
    agree(stats.load_balance_loss, pencil.BALANCE)
    agree(stats.importance_cv2, pencil.IMPORTANCE_CV2)
    agree(stats.load_cv2, pencil.LOAD_CV2)
    agree(stats.router_z_loss, 0)
    agree(friends_stats(pencil.HF_BALANCE).load_balance_loss, pencil.BALANCE_K)


@pytest.mark.parametrize("counted_in", ["batch", "group"])
def test_balance_loss_of_the_logits(counted_in: str) -> None:
    """A bias sends everybody to experts 1 and 2 by their sigmoids: the loss is that of the friends all the same."""
    router = RouterConfig(score="sigmoid", correction_bias=True)
    config = layer(router=router, balance=BalanceConfig(of="logits", counted_in=counted_in))
    weights = pencil.pencil_weights(config) | {"router.correction_bias": np.asarray([0.0, 9.0, 9.0])}
    stats = build(config, weights)(tensor(pencil.ONE))[1]
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
        stats = moe(tensor(pencil.SEQUENCES), mask_BT=None if mask is None else torch.tensor(mask))[1]
        agree(stats.load_balance_loss, want)


@pytest.mark.parametrize(("tokens", "bias", "added", "recentred"), pencil.BIASES)
def test_the_correction_bias_moves_towards_the_mean_load(
    tokens: list, bias: list, added: list, recentred: list
) -> None:
    before, tokens_E = torch.tensor(bias, dtype=torch.float32), torch.tensor(tokens)
    for recentre, want in ((False, added), (True, recentred)):
        after = update_correction_bias(before, tokens_E, 0.25, recentre)
        agree(after, np.add(bias, want), 2e-7)


def test_choices_are_counted_without_padding() -> None:
    chosen = torch.tensor([[[0, 1], [1, 2], [0, 1]]])
    assert losses.tokens_per_expert(chosen, 3).tolist() == [2, 3, 1]
    mask = torch.tensor([[True, True, False]])
    assert losses.tokens_per_expert(chosen, 3, mask).tolist() == [1, 2, 1]


def test_losses_do_not_see_padding() -> None:
    x = [pencil.sequence(pencil.STRANGER, *pencil.FRIENDS)]
    masked = friends_stats(x=x, mask_BT=torch.tensor([[False, True, True, True]]))
    for got, want in zip(masked, friends_stats(), strict=True):
        agree(got, want.detach().numpy())


def test_balanced_loss_is_one_or_k() -> None:
    agree(friends_stats(x=pencil.BALANCED).load_balance_loss, 1)
    agree(friends_stats(pencil.HF_BALANCE, x=pencil.BALANCED).load_balance_loss, 2)


def test_gradient_of_the_balance_loss_by_hand() -> None:
    config, x = layer(), tensor(pencil.ONE).requires_grad_()
    build(config, pencil.pencil_weights(config))(x)[1].load_balance_loss.backward()
    agree(x.grad[0, :, :3], pencil.BALANCE_GRADIENT)
    agree(x.grad[0, :, 3], [0, 0, 0])


@pytest.mark.parametrize("score", list(pencil.SCORED))
def test_balance_loss_follows_the_scores(score: str) -> None:
    logits, prob, want = pencil.SCORED[score]
    config = layer(router=RouterConfig(score=score))
    moe = build(config, pencil.pencil_weights(config))
    alone = moe(tensor([[[*logits, 1.0]]]))[1]
    agree(alone.router_prob_E, prob)
    agree(alone.load_balance_loss, want)
    agree(alone.router_entropy, -sum(p * log(p) for p in prob))
    both = moe(tensor([[[*logits, 1.0], [*logits[::-1], 1.0]]]))[1]
    agree(both.router_prob_E, [(prob[0] + prob[2]) / 2, prob[1], (prob[0] + prob[2]) / 2])


def test_z_loss_and_entropy() -> None:
    shifted = [[[*(logit + n for logit in token[:3]), 1] for n, token in enumerate(pencil.ONE[0], 1)]]
    agree(friends_stats(x=shifted).router_z_loss, 14 / 3)
    agree(friends_stats(x=[[[0.0, 0.0, 0.0, 1.0]]]).router_entropy, log(3))
    agree(friends_stats(x=[pencil.sequence((2, 1, 1, 1))]).router_entropy, 1.5 * log(2))
    agree(friends_stats(x=[[[500.0, 0.0, 0.0, 1.0]]]).router_entropy, 0)


def test_squared_coefficient_of_variation() -> None:
    agree(losses.squared_cv(tensor([1, 3])), 1 / 4)
    agree(losses.squared_cv(tensor([5, 5, 5])), 0)
    agree(losses.squared_cv(tensor([0, 0])), 0)


def test_smooth_load() -> None:
    noisy, clean = tensor([[[1, 0], [1, 0]]]), tensor([[[0, 1], [1, 0]]])
    phi = 0.9772498680518208  # Phi(2)
    agree(losses.smooth_load(clean, noisy, torch.full_like(clean, 0.5), 1), [0.5 + phi, 0.5 + 1 - phi])
    agree(losses.smooth_load(clean, noisy, torch.full_like(clean, 0.5), 2), [2, 2])
    mask = torch.tensor([[True, False]])
    agree(losses.smooth_load(clean, noisy, torch.full_like(clean, 0.5), 1, mask), [0.5, 0.5])


def test_balance_loss_per_layer_or_pooled() -> None:
    load, prob, zeros = tensor([[1, 0], [0, 1]]), tensor([[3 / 4, 1 / 4], [1 / 4, 3 / 4]]), tensor([0, 0])
    for pooled, f_sums_to, top_k, want in [
        ("per_layer", "one", 1, 1.5), ("over_layers", "one", 1, 1.0), ("per_layer", "k", 2, 3.0),
        ("over_layers", "k", 2, 2.0),
    ]:
        config = layer(num_experts=2, top_k=top_k, balance=BalanceConfig(pooled=pooled, f_sums_to=f_sums_to))
        stats = losses.MoEStats(
            load_balance_loss=losses.load_balance_loss(load, prob, top_k, config.balance), router_z_loss=zeros,
            dropped_fraction=zeros, expert_load_E=load, router_entropy=zeros, router_prob_E=prob, importance_cv2=zeros,
            load_cv2=zeros, balance_load_E=load,
        )
        agree(losses.pool_balance_loss(stats, config), want)


# --- Soft MoE and attention -----------------------------------------------------------------------------------------
def soft_layer(residual: bool) -> torch_ref.SoftMoE:
    config = SoftMoEConfig(model_dim=2, num_experts=2, num_slots=1, hidden_dims=(), layer_norm=False, residual=residual)
    soft = torch_ref.SoftMoE(config).double()
    state = {"phi": tensor(pencil.SOFT_PHI)}
    for e, factor in enumerate(pencil.SOFT_FACTORS):
        state |= {
            f"experts.{e}.last_fc.weight": factor * tensor(np.eye(2)),
            f"experts.{e}.last_fc.bias": tensor([0, 0]),
        }
    soft.load_state_dict(state, strict=True)
    return soft


def test_soft_moe() -> None:
    x = tensor(pencil.SOFT_X)
    dispatch, combine = soft_weights(soft_logits(x, tensor(pencil.SOFT_PHI)))
    agree(dispatch[0, :, :, 0], pencil.SOFT_DISPATCH)
    agree(combine[0, :, :, 0], pencil.SOFT_COMBINE)
    y_BTD, stats = soft_layer(residual=False)(x)
    agree(y_BTD, pencil.SOFT_ANSWER)
    agree(soft_layer(residual=True)(x)[0], pencil.SOFT_RESIDUAL)
    check_soft_stats(stats, pencil.SOFT_LOAD, pencil.SOFT_ENTROPY, pencil.SOFT_CV2)
    masked, stats = soft_layer(residual=False)(x, mask_BT=torch.tensor([[True, False]]))
    agree(masked[0, :1], pencil.SOFT_MASKED)
    check_soft_stats(stats, *pencil.SOFT_MASKED_STATS)
    logits_BTEC = soft_logits(x, tensor(pencil.SOFT_PHI)).repeat_interleave(2, dim=3)  # every slot twice
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
    logits = tensor(pencil.LOSS_LOGITS)
    targets, mask = torch.tensor(pencil.LOSS_TARGETS), torch.tensor(pencil.LOSS_MASK)
    agree(losses.next_token_loss(logits, targets), pencil.LOSS)
    agree(losses.next_token_loss(logits, targets, mask), pencil.LOSS_MASKED)
    anything = targets.masked_fill(~mask, 9)  # at padding
    agree(losses.next_token_loss(logits, anything, mask), pencil.LOSS_MASKED)
    agree(losses.next_token_loss(logits, targets, mask & False), 0)
    with pytest.raises(AssertionError):
        agree(losses.next_token_loss(logits, targets * 0), pencil.LOSS)


@pytest.mark.parametrize("scale", ["head_dim", "model_dim"])
@pytest.mark.parametrize("projections", ["per_head", "fused"])
def test_attention(scale: str, projections: str) -> None:
    attention = torch_ref.Attention(
        AttentionConfig(model_dim=4, num_heads=4, scale=scale, projections=projections)
    ).double()
    state = {"proj.weight": tensor(np.eye(4)), "proj.bias": tensor([0] * 4)}
    if projections == "fused":
        qkv = np.zeros((12, 4))  # rows: four queries, four keys, four values; head 0 is the first of each
        qkv[0, 0] = qkv[4, 1] = qkv[8, 2] = 1
        state["qkv.weight"] = tensor(qkv)
    else:
        for h in range(4):
            for feature, name in enumerate(("query", "key", "value")):
                state[f"heads.{h}.{name}.weight"] = tensor(np.eye(4)[[feature]] * (h == 0))
    attention.load_state_dict(state, strict=True)
    y = attention(tensor(pencil.ATTENTION_X))
    agree(y[0, :, 0], pencil.ATTENTION_ANSWER[scale])
    agree(y[0, :, 1:], np.zeros((2, 3)))


def test_dropout_by_mask() -> None:
    config = layer(expert=ExpertConfig(activation="identity", gated=False, dropout=0.5))
    keep_BTKD = torch.tensor([[[[True] * 4, [False] * 4]]])
    y_BTD = build(config, pencil.pencil_weights(config))(tensor([pencil.sequence(pencil.ANN)]), keep_BTKD=keep_BTKD)[0]
    agree(y_BTD, [[[0, 20, 0, 0]]])
