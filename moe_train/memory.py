"""The least memory that a run needs, in bytes, before any of its arrays is allocated."""

from jax_moe.config.checks import shorten
from jax_moe.config.models import MakeMoEConfig
from jax_moe.guarded import require_memory
from moe_train.configs.settings import TrainConfig

STATE = 16  # bytes a parameter: weight, gradient and two moments, in fp32


def num_parameters(model: MakeMoEConfig) -> int:
    """The exact number of parameters of `jax_moe.MakeMoE`."""
    D, E, F, V = model.model_dim, model.num_experts, 4 * model.model_dim, model.vocab_size
    router = (D + 1) * E * (2 if model.noise else 1)
    layer = 3 * D * D + (D * D + D) + 4 * D + router + E * (2 * D * F + F + D)
    return (V + model.block_size) * D + model.num_layers * layer + 2 * D + (D + 1) * V


def check_memory(config: TrainConfig, parameters: int, num_layers: int, width: int, vocab_size: int) -> None:
    """Raises ValueError if the run cannot fit: its state, and what a batch keeps for the backward pass.

    A batch keeps each layer's input, with `remat` too, and the logits. On a GPU or TPU the limit is the device's.
    """
    import jax

    tokens, word = config.batch_size * config.model.block_size, 2 if config.precision == "mixed" else 4
    batch = tokens * (num_layers * width * word + 4 * vocab_size)
    host = 12 * config.batch_size * (config.model.block_size + 1)  # the batch and its positions in the text
    sizes = f"{config.batch_size:,} x {config.model.block_size:,}"
    what = f"training {parameters:,} parameters on batches of {sizes} tokens"
    if jax.default_backend() == "cpu":
        require_memory((STATE * parameters + batch) // jax.process_count() + host, what)
        return
    require_memory(host, what)
    from moe_train.learners.jax_learner import choose_mesh

    mesh = choose_mesh(config)
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in mesh.local_devices]
    needed, limit = (STATE * parameters + batch) // mesh.size, min(limits, default=0)
    if limit and needed > limit:
        raise ValueError(f"{shorten(what)} needs about {needed:,} bytes a device: must be at most {limit:,}")
