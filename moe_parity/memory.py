"""Whether both sides fit into memory, said before anything is loaded."""

from typing import Literal

from jax_moe.guarded import available_memory

Work = Literal["outputs", "gradients", "training"]
# Copies of the weights at the worst moment, an estimate. Outputs: one side's weights and room to load them. Gradients: theirs,
# which wait, and our weights, gradients and the gradients again under their names. Training holds both sides at once: each
# has weights, gradients and two moments, ours sums the gradients apart and keeps where it began (weights twice, moments).
COPIES: dict[Work, int] = {"outputs": 2, "gradients": 5, "training": 13}


def needed(parameters: int, itemsize: int, stored_bytes: int, work: Work) -> int:
    """Bytes at the worst moment: the checkpoint twice while it is compared with its file, or what the run holds."""
    return max(2 * stored_bytes, COPIES[work] * parameters * itemsize)


def check_memory(parameters: int, itemsize: int, stored_bytes: int, work: Work) -> None:
    """Raises ValueError, one line, if the comparison would not fit."""
    need, have = needed(parameters, itemsize, stored_bytes, work), available_memory()
    if have is not None and need > have:
        narrower, fewer = itemsize > 4 and work != "training", work == "gradients"
        advice = [word for word, useful in (("--dtype float32", narrower), ("no --grads", fewer)) if useful]
        instead = f"; less would do with {' and '.join(advice)}" if advice else ""
        raise ValueError(
            f"not enough memory for both sides: {parameters:,} parameters need about {need / 1e9:,.1f} GB, "
            f"{have / 1e9:,.1f} GB are available{instead}"
        )
