"""Rotary position embeddings (RoFormer, arXiv 2104.09864): frequencies by kind, and the rotation of halves.

Frequencies are computed in numpy while tracing, in fp64, and rounded once where they meet the positions.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jax_moe.config.attention import Pairs, RopeConfig, RopeKind, yarn_mscale
from jax_moe.dims import Array, Float, Int, wide


def default(config: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """theta^(-2i/A) for the A/2 pairs."""
    return powers(config.theta, head_dim)


def linear(config: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """All frequencies divided by factor."""
    return powers(config.theta, head_dim) / config.factor


def dynamic(config: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Beyond max_positions the base grows with the text's length (NTK-aware scaling).

    A function of this text alone, where Hugging Face keeps the longest text's until a shorter one resets it.
    """
    stretch = config.factor * max(length, config.max_positions) / config.max_positions - (config.factor - 1)
    return powers(config.theta * stretch ** (head_dim / (head_dim - 2)), head_dim)


def yarn(config: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Slow pairs divided by factor, fast ones kept, a ramp between (YaRN, arXiv 2309.00071, section 3.2)."""
    assert config.original_max_positions is not None
    kept = powers(config.theta, head_dim)
    bounds = [_pair_that_turns(turns, config, head_dim) for turns in (config.beta_fast, config.beta_slow)]
    if config.truncate:
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    low, high = max(bounds[0], 0), min(bounds[1], head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return kept / config.factor * ramp + kept * (1 - ramp)


def llama3(config: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Long waves divided by factor, short ones kept, interpolated between (Llama 3.1)."""
    assert config.original_max_positions is not None
    kept, low, high = powers(config.theta, head_dim), config.low_freq_factor, config.high_freq_factor
    turns = config.original_max_positions * kept / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * kept / config.factor + smooth * kept


def longrope(config: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Each pair divided by a factor of its own, in texts beyond the trained length by another (arXiv 2402.13753)."""
    factors = config.long_factors if _is_long(config, length) else config.short_factors
    return powers(config.theta, head_dim) / np.asarray(factors)


def proportional(config: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """The whole head's frequencies for the first pairs, a `fraction` of all, and no turn for the others (Gemma 4)."""
    turned = np.arange(head_dim // 2) < int(config.fraction * head_dim // 2)
    return np.where(turned, powers(config.theta, head_dim) / config.factor, 0)


FREQUENCIES: dict[RopeKind, Callable[[RopeConfig, int, int], np.ndarray]] = {
    "default": default, "linear": linear, "dynamic": dynamic, "yarn": yarn, "llama3": llama3,
    "longrope": longrope,
    "proportional": proportional,
}


def powers(theta: float, head_dim: int) -> np.ndarray:
    """theta^(-2i/A), i = 0 to A/2 - 1."""
    return theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def attention_factor(config: RopeConfig, length: int = 0) -> float:
    """What cos and sin are multiplied with: 1, YaRN's 0.1 ln(factor) + 1 in its variants, or longrope's two numbers."""
    if config.kind == "longrope":
        return config.long_mscale if _is_long(config, length) else config.short_mscale
    if config.kind != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return yarn_mscale(config.factor, config.mscale) / yarn_mscale(config.factor, config.mscale_all_dim)
    return yarn_mscale(config.factor, 1.0)


def _is_long(config: RopeConfig, length: int) -> bool:
    assert config.original_max_positions is not None
    return length > config.original_max_positions


def _pair_that_turns(turns: float, config: RopeConfig, head_dim: int) -> float:
    assert config.original_max_positions is not None
    return head_dim * math.log(config.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(config.theta))


def rotations(
    position_BT: Int[Array, "B T"], config: RopeConfig, head_dim: int, dtype: jnp.dtype,
    length: Int[Array, ""] | None = None, longest: int = 0,
) -> tuple[Float[Array, "B T A"], Float[Array, "B T A"]]:
    """cos and sin of every pair's angle, each pair twice (as the pairs stand), computed in fp32 or wider; A counts the
    entries of a head that turn.

    Frequencies of "dynamic" and "longrope" are those of a text of T positions, padding included, or of `length`, at
    most `longest`: in generation that of the longest text, as in transformers. A key keeps the turn it was cached with
    ("longrope" lets no text grow to where it would change); texts generated together stretch together.
    """
    frequencies, head_dim = FREQUENCIES[config.kind], config.width(head_dim)
    T = position_BT.shape[1]
    factor: float | Array = attention_factor(config, T)
    if config.kind == "dynamic" and length is not None:
        table = np.stack([frequencies(config, head_dim, number) for number in range(longest + 1)])
        frequency = jnp.asarray(table, wide(dtype))[length]
    elif config.kind == "longrope" and length is not None:
        most = config.original_max_positions or 0
        sides = (most, most + 1)
        both = [(frequencies(config, head_dim, number), attention_factor(config, number)) for number in sides]
        place = (length > most).astype(jnp.int32)
        frequency, factor = (jnp.asarray(np.stack(pair), wide(dtype))[place] for pair in zip(*both, strict=True))
    else:
        frequency = jnp.asarray(frequencies(config, head_dim, T), wide(dtype))
    half_BTA = position_BT[..., None].astype(wide(dtype)) * frequency
    beside = config.pairs == "neighbours"
    angle_BTA = jnp.repeat(half_BTA, 2, axis=-1) if beside else jnp.concatenate([half_BTA, half_BTA], axis=-1)
    kept = wide(dtype) if config.dtype == "float32" else dtype
    return (jnp.cos(angle_BTA) * factor).astype(kept), (jnp.sin(angle_BTA) * factor).astype(kept)


def rotate(
    x_BTHA: Float[Array, "B T H A"], cos_BTA: Float[Array, "B T _"], sin_BTA: Float[Array, "B T _"],
    pairs: Pairs = "halves",
) -> Float[Array, "B T H A"]:
    """Of the first W entries, as many as there are angles, pair i turned; the others pass. Its entries are i and
    i + W/2, or the neighbours 2i and 2i + 1. Products and sum have the wider dtype of x and the angles, the answer that
    of x.
    """
    width = cos_BTA.shape[-1]
    if width < x_BTHA.shape[-1]:
        x_BTHW, rest = jnp.split(x_BTHA, [width], axis=-1)
        return jnp.concatenate([rotate(x_BTHW, cos_BTA, sin_BTA, pairs), rest], axis=-1)
    if pairs == "neighbours":
        turned_BTHA = jnp.stack([-x_BTHA[..., 1::2], x_BTHA[..., ::2]], axis=-1).reshape(x_BTHA.shape)
    else:
        first, second = jnp.split(x_BTHA, 2, axis=-1)
        turned_BTHA = jnp.concatenate([-second, first], axis=-1)
    answer_BTHA = x_BTHA * cos_BTA[:, :, None, :] + turned_BTHA * sin_BTA[:, :, None, :]
    return answer_BTHA.astype(x_BTHA.dtype)
