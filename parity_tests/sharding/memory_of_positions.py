"""The temporary memory of a device for a decoder's gradient, by the compiler: with one device, with the positions
split over four, and with a planted fault: blocks of queries in turn over the dim that is split.

`python -m parity_tests.sharding.memory_of_positions` prints the bytes, a line for each.
"""

from unittest import mock

import jax
from flax import nnx

import jax_moe
from jax_moe import presets, sharding
from jax_moe.attention import attention_by
from jax_moe.attention.products import blockwise
from jax_moe.losses import next_token_loss
from jax_moe.sharding.inside import as_batch

T = 1024


def memory(devices: int) -> int:
    """Bytes on each of so many devices."""
    config = jax_moe.DecoderConfig.grouped(
        vocab_size=64, model_dim=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
        moe=presets.mixtral(32, 16, 4, 2),
    )
    model = nnx.eval_shape(lambda: jax_moe.Decoder(config, rngs=nnx.Rngs(0)))

    def loss(model: jax_moe.Decoder, tokens_BT1: jax.Array) -> jax.Array:
        return next_token_loss(model(as_batch(tokens_BT1[:, :-1])), as_batch(tokens_BT1[:, 1:]))

    with jax.set_mesh(sharding.device_mesh({"sequence": devices})), attention_by("blocks"):
        lowered = jax.jit(jax.grad(loss)).lower(model, jax.ShapeDtypeStruct((2, T + 1), "int32"))
        return lowered.compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    """Prints three lines."""
    print(memory(1), memory(4), sep="\n")
    with mock.patch.object(blockwise, "devices_of_positions", lambda num_positions: 1):
        print(memory(4))


if __name__ == "__main__":
    main()
