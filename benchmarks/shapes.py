"""The shapes that the benchmarks of a layer time, and the numbers of each, drawn on the device of jax."""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

import jax_moe
from jax_moe.config.checks import require
from jax_moe.config.moe import MoEConfig

# Least gap between the router logits of the last chosen and the first unchosen expert: more than the rounding error of
# a logit of up to 4 (in fp32 a choice with a gap of 8e-7 was seen to flip).
MARGIN = {"float32": 2**-16, "bfloat16": 2**-5}
Numbers = dict[str, jax.Array]


class UnavailableError(Exception):
    """A contestant cannot run here; the message says why."""


@dataclass(frozen=True)
class Shape:
    """T tokens of width D, E experts of width F, K experts per token."""

    T: int
    D: int
    F: int
    E: int
    K: int

    @property
    def name(self) -> str:
        """T,D,F,E,K, as on the command line."""
        return f"{self.T},{self.D},{self.F},{self.E},{self.K}"

    def flops(self, kind: str) -> int:
        """FLOPs of the experts' matrix products: three per token and choice, and six more for the gradients."""
        return 6 * self.T * self.K * self.D * self.F * (3 if kind == "both" else 1)

    def config(self, dispatcher: str = "auto") -> MoEConfig:
        """The contract."""
        mixtral = jax_moe.presets.mixtral(self.D, self.F, self.E, self.K)
        return dataclasses.replace(mixtral, dispatcher=dispatcher)  # type: ignore[arg-type]

    def numbers(self, dtype: str) -> Numbers:
        """Input, probe and weights, the routers spread as at initialisation.

        Tokens whose choice could flip by rounding to the dtype are replaced by other tokens, so that all contestants
        do the same work.
        """
        T, D, F, E = self.T, self.D, self.F, self.E
        sizes = {"x": (T, D), "probe": (T, D), "router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
        keys = jax.random.split(jax.random.key(0, impl="rbg"), len(sizes))  # threefry needs gigabytes of counters
        numbers = {
            name: draw(key, size, dtype, 1.0 if name in ("x", "probe") else size[-2] ** -0.5)
            for key, (name, size) in zip(keys, sizes.items(), strict=True)
        }
        if MARGIN[dtype] and self.K < self.E:
            numbers["x"], sure = _without_ties(numbers["x"], numbers["router"], self.K, MARGIN[dtype])
            if not sure:
                raise UnavailableError(f"all {self.T} tokens are near ties in {dtype}: take more tokens")
        return numbers


@partial(jax.jit, static_argnums=(1, 2, 3))
def draw(key: jax.Array, size: tuple[int, ...], dtype: str, scale: float = 1.0) -> jax.Array:
    """Normal numbers with this standard deviation, on the device of jax."""
    return (jax.random.normal(key, size) * scale).astype(dtype)


@partial(jax.jit, static_argnums=(2, 3))
def _without_ties(x: jax.Array, router: jax.Array, K: int, margin: float) -> tuple[jax.Array, jax.Array]:
    """(the tokens whose choice is sure, repeated until there are as many as before; how many they are)."""
    logits = jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32), precision="highest")
    largest = jax.lax.top_k(logits, K + 1)[0]
    near = largest[:, K - 1] - largest[:, K] <= margin
    sure = (~near).sum()
    return x[jnp.argsort(near, stable=True)[jnp.arange(x.shape[0]) % jnp.maximum(sure, 1)]], sure


def weights_of(numbers: Numbers) -> Numbers:
    """Those that a layer learns."""
    return {name: numbers[name] for name in ("router", "gate", "up", "down")}


SHAPES = {
    "cpu": [Shape(2048, 512, 1792, 8, 2), Shape(2048, 512, 256, 64, 8), Shape(8192, 256, 128, 128, 8)],
    "mixtral-8x7b": [Shape(T, 4096, 14336, 8, 2) for T in (8192, 32768)],
    "qwen3-30b": [Shape(32768, 2048, 768, 128, 8)],
    "fine-grained": [Shape(16384, 2560, 1280, 64, 4), Shape(32768, 4096, 1024, 128, 8)],
}
SHAPES["gpu"] = sorted(
    [shape for name in ("mixtral-8x7b", "qwen3-30b", "fine-grained") for shape in SHAPES[name]],
    key=lambda shape: shape.flops("both"),
)


def read_shape(text: str) -> list[Shape]:
    """The shapes that `T,D,F,E,K` or a name stands for. Raises ValueError if it is neither."""
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split(",")
    whole = len(sizes) == 5 and all(size.isdecimal() and int(size) for size in sizes)
    require(whole, "shape", text, f"T,D,F,E,K, five integers of at least 1, or one of {', '.join(SHAPES)}")
    shape = Shape(*map(int, sizes))
    require(shape.K <= shape.E, "shape", text, f"of K={shape.K} at most E={shape.E}")
    return [shape]
