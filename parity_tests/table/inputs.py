"""Weights, tokens and draws of a case: plain numpy, seeded by the case's name, the same for every dtype and framework.

Tokens are picked so that no choice is a near tie and no ReLU input is near zero: rounding to bf16 may move a score, but
not past its neighbour, and a unit, but not past zero. Where tokens cannot be picked (inside a block or a model, after
Soft MoE's mixing) the noise spreads the logits, and in the bf16 runs biases keep the units away from zero.
Draws are fp32-representable, so that they mean the same in every dtype.
"""

import math
import zlib

import ml_dtypes
import numpy as np

from jax_moe.config.attention import AttentionConfig
from jax_moe.config.models import BlockConfig, MakeMoEConfig
from jax_moe.config.moe import MoEConfig
from parity_tests.table.cases import Case

Arrays = dict[str, np.ndarray]
Path = tuple[str | int, ...]

POOL = 60  # candidates for each token


def generator(case: Case, what: str) -> np.random.Generator:
    """A generator for each use, seeded by the case's name."""
    return np.random.default_rng([zlib.crc32(case.name.encode()), zlib.crc32(what.encode())])


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The nearest bf16 numbers, as fp64."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def parameter(case: Case, path: Path, shape: tuple[int, ...], rounded: bool = False) -> np.ndarray:
    """A parameter's value: kernels about fan-in scaled, norms about 1, biases about 0, none of them exactly.

    `rounded`: for a run in bf16 and its truth, in which units must keep away from zero.
    """
    if path[-1] == "expert_table" and case.moe is not None:
        experts = np.broadcast_to(np.arange(case.moe.num_experts), (shape[0], case.moe.num_experts))
        return generator(case, "table").permuted(experts, axis=-1)[:, : shape[1]]
    value = generator(case, "/".join(map(str, path))).normal(size=shape)
    name, in_router = path[-1], "router" in path
    if rounded and not isinstance(case.config, MoEConfig) and "experts" in path:
        before_relu = name in ("up", "up_bias") or "layer_norms" in path or "last_ln" in path
        if before_relu and str(name).endswith("bias"):
            return np.where(value > 0, 1.0, -1.0) + 0.2 * value
        if before_relu:
            return 0.25 * (1 + 0.2 * value) if name == "scale" else 0.25 * value * shape[-2] ** -0.5
    if in_router and case.logits != "free":
        return np.zeros(shape)
    if in_router and not isinstance(case.config, MoEConfig):  # see `draws`: here the noise spreads the logits
        return 0.05 * value
    if name == "scale":
        return 1 + 0.2 * value
    if len(shape) == 1 or str(name).endswith("bias"):
        return (0.3 * value).astype(np.float32).astype(np.float64)
    if name in ("phi", "embedding"):
        return value
    if "network" in path:  # so that tokens, not biases, decide their experts
        return 3 * value * shape[-2] ** -0.5
    if name in ("query", "key", "value", "qkv"):
        return value * shape[-1] ** -0.5
    return value * shape[-2] ** -0.5


def make_inputs(case: Case, router: Arrays | None = None, experts: Arrays | None = None) -> Arrays:
    """x_BTD or tokens_BT, and every array that the case gives. Margins are computed with the layer's parameters."""
    B, T = case.batch_size, case.num_positions
    rng = generator(case, "tokens")
    if isinstance(case.config, MakeMoEConfig):
        return {"tokens_BT": rng.integers(0, case.config.vocab_size, (B, T)), **draws(case)}
    D = case.config.model_dim if not isinstance(case.config, BlockConfig) else case.config.attention.model_dim
    if not isinstance(case.config, MoEConfig):
        return {"x_BTD": rng.normal(size=(B, T, D)), **draws(case)}
    assert router is not None and experts is not None
    pool = candidates(case, rng)
    clear = kink_free(case.config, experts, pool, case.margin)
    if case.logits == "free":
        clear &= tie_free(case.config, router, pool, case.margin)
    rows = np.flatnonzero(clear)[: B * T]
    if len(rows) < B * T:
        raise ValueError(
            f"{case.name}: {len(rows)} of {len(clear)} candidates are clear of ties and kinks, {B * T} are needed"
        )
    given = {name: value[rows] for name, value in pool.items()}
    return {**draws(case), **{name: value.reshape(B, T, -1) for name, value in given.items()}}


def candidates(case: Case, rng: np.random.Generator) -> Arrays:
    """Many tokens with the noise and jitter that go with each."""
    assert isinstance(case.config, MoEConfig)
    rows, config = POOL * case.batch_size * case.num_positions, case.config
    pool = {"x_BTD": rng.normal(size=(rows, config.model_dim))}
    if "noise" in case.draws:
        pool["noise_BTE"] = as_float32(rng.normal(size=(rows, config.num_experts)))
    if "jitter" in case.draws:
        eps = config.router.jitter_eps
        pool["jitter_BTD"] = as_float32(rng.uniform(1 - eps, 1 + eps, (rows, config.model_dim)))
    if config.router.takes_state:
        pool["router_state_BTI"] = as_float32(rng.normal(size=(rows, config.router.network_dim)))
    return pool


def as_float32(x: np.ndarray) -> np.ndarray:
    """The nearest fp32 numbers, as fp64."""
    return x.astype(np.float32).astype(np.float64)


def draws(case: Case) -> Arrays:
    """The arrays in place of random draws, with a leading L for a stack of layers."""
    B, T = case.batch_size, case.num_positions
    rng, stack, moe = generator(case, "draws"), (), case.moe
    attention = case.config.block.attention if isinstance(case.config, MakeMoEConfig) else case.config
    attention = attention.attention if isinstance(attention, BlockConfig) else attention
    if isinstance(case.config, MakeMoEConfig):
        stack = (case.config.num_layers,)
    given: Arrays = {}
    if "mask" in case.draws:
        given["mask_BT"] = padding(case)
    if moe is not None:
        E, K, D = moe.num_experts, moe.top_k, moe.model_dim
        if case.logits != "free":
            given["noise_BTE"] = given_logits(case, rng, (B, T, E))
        elif "noise" in case.draws:  # distinct steps: a model's routing cannot be made tie-free by choosing tokens
            ladder = rng.permuted(np.broadcast_to(2.0 * np.arange(E) - E, (*stack, B, T, E)), axis=-1)
            given["noise_BTE"] = ladder
        if "keep" in case.draws:
            given["keep_BTKD"] = rng.random((*stack, B, T, K, D)) >= moe.expert.dropout
        if "tokens" in case.draws:
            given["tokens_BT"] = rng.integers(0, moe.router.table_tokens, (B, T)).astype(np.int32)
        if "replay" in case.draws:
            order_BTE = rng.permuted(np.broadcast_to(np.arange(E), (B, T, E)), axis=-1)
            given["expert_BTK"] = order_BTE[..., :K].astype(np.int32)
    if "keep" in case.draws and isinstance(attention, AttentionConfig):
        shape = (*stack, B, attention.num_heads, T, T)
        given["attention_keep_BHTU"] = rng.random(shape) >= attention.dropout
        given["output_keep_BTD"] = rng.random((*stack, B, T, attention.model_dim)) >= attention.dropout
    return given


def padding(case: Case) -> np.ndarray:
    """False at padding."""
    mask_BT = np.ones((case.batch_size, case.num_positions), bool)
    if case.mask == "all":
        mask_BT[:] = False
    elif case.mask == "row":
        mask_BT[0] = False
    else:
        mask_BT[0, -2:] = False
        mask_BT[-1, :1] = False
    return mask_BT


def given_logits(case: Case, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Logits for the cases that fix them; see `Case.logits`."""
    if case.logits == "equal":
        return np.zeros(shape)
    if case.logits == "bfloat16":
        return 1 + rng.integers(0, 3, shape) / 128  # three neighbouring bf16 numbers: most rows hold a tie
    logits = to_bfloat16(rng.normal(size=shape))
    logits += np.arange(shape[-1]) / 16  # no accidental ties
    favourites, lift = {"unchosen": (slice(0, 1), -12.0), "one": (slice(0, 1), 6.0), "two": (slice(0, 2), 6.0)}[
        case.logits
    ]
    logits[..., favourites] += lift
    return as_float32(logits)


def tie_free(config: MoEConfig, router: Arrays, pool: Arrays, margin: float) -> np.ndarray:
    """Which candidates' scores keep `margin` between neighbours among the best K + 1, and between clusters."""
    score = choice_scores(config, router, pool)
    best = -np.sort(-score, axis=-1)[:, : config.top_k + 1]
    clear = (-np.diff(best, axis=-1) >= margin).all(axis=-1)
    if config.router.num_clusters > 1:
        wide = score.reshape(len(score), config.router.num_clusters, -1)
        take = 1 if config.router.cluster_score == "max" else 2
        cluster = -np.sort(-(-np.sort(-wide, axis=-1))[..., :take].sum(axis=-1), axis=-1)
        clear &= (-np.diff(cluster, axis=-1) >= margin).all(axis=-1)
    if config.router.order == "sparse_mixer":  # nor hangs it on rounding which experts are near
        for first in (best[:, :1], best[:, 1:2]):
            gap = (first - score) / np.maximum(np.maximum(np.abs(score), first), 1e-30)
            clear &= (np.abs(gap - 2 * config.router.mixer_eps) >= margin).all(axis=-1)
    return clear


def kink_free(config: MoEConfig, experts: Arrays, pool: Arrays, margin: float) -> np.ndarray:
    """Which candidates keep every expert's units `margin` from a ReLU's zero."""
    if config.expert.activation != "relu":
        return np.ones(len(pool["x_BTD"]), bool)
    unit = "gate" if config.expert.gated else "up"
    units = np.einsum("RD,EDF->REF", pool["x_BTD"], experts[unit])
    units += experts[f"{unit}_bias"] if config.expert.bias else 0.0
    return (np.abs(units) >= margin).all(axis=(1, 2))


def clean_logits(config: MoEConfig, router: Arrays, x: np.ndarray, state: np.ndarray | None) -> np.ndarray:
    """The logits [rows, E] before noise; of product keys as if each token's were its own."""
    if config.router.product_keys != "none":
        first, second = np.split(x @ router["keys"], 2, axis=-1)
        return (first[:, :, None] + second[:, None, :]).reshape(len(x), -1)
    if not config.router.network_dim:
        return x @ router["kernel"] + router.get("bias", 0.0)
    h = x @ router["down"] + router["down_bias"]
    h = h if state is None else h + state * router["state_scale"]
    h = h / np.sqrt((h**2).mean(axis=-1, keepdims=True) + config.router.network_norm_eps) * router["norm"]
    for name in ("first", "second"):
        h = h @ router[name] + router[f"{name}_bias"]
        h = h * np.vectorize(lambda v: (1 + math.erf(v / math.sqrt(2))) / 2)(h)
    return h @ router["out"]


def choice_scores(config: MoEConfig, router: Arrays, pool: Arrays) -> np.ndarray:
    """The scores [rows, E] by which experts are chosen, precise enough for margins only."""
    x = pool["x_BTD"] * pool.get("jitter_BTD", 1.0)
    logits = clean_logits(config, router, x, pool.get("router_state_BTI"))
    logits = logits[:, : config.num_experts]  # those of shared experts follow
    noise = pool.get("noise_BTE", 0.0)
    if "noise_kernel" in router:
        noise = noise * np.logaddexp(0, x @ router["noise_kernel"] + router.get("noise_bias", 0.0))
    logits = logits + noise
    if config.router.order != "score_then_select":
        return logits
    if config.router.selection == "logit":
        return logits + router.get("correction_bias", 0.0)
    if config.router.score == "softmax":
        exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return exp / exp.sum(axis=-1, keepdims=True)
    score = 1 / (1 + np.exp(-logits)) if config.router.score == "sigmoid" else np.sqrt(np.logaddexp(0, logits))
    return score + router.get("correction_bias", 0.0)
