"""How attention's products are computed; `jax_moe/attention/products` says what each way does."""

from typing import Literal

Products = Literal["auto", "plain", "blocks", "kernel"]
