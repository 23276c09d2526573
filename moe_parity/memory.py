"""Checks that both sides fit into memory, before anything is loaded."""

from typing import Literal

from jax_moe.guarded import available_memory

Work = Literal["outputs", "gradients", "training"]
# Estimated copies of the weights at the peak. Outputs: the weights of one side, and room to load them. Gradients: the
# reference's gradients are kept while JAX holds weights, gradients, and its gradients again under PyTorch's names.
# Training holds both sides, each with weights, gradients and two moments. JAX also accumulates gradients and keeps its
# initial weights (twice) and moments.
COPIES: dict[Work, int] = {"outputs": 2, "gradients": 5, "training": 13}


def needed(parameters: int, itemsize: int, stored_bytes: int, work: Work) -> int:
    """Bytes at the peak: twice the checkpoint while it is compared with its file, or what the run holds."""
    return max(2 * stored_bytes, COPIES[work] * parameters * itemsize)


def check_memory(parameters: int, itemsize: int, stored_bytes: int, work: Work) -> None:
    """Raises ValueError if the comparison would not fit into memory."""
    need, have = needed(parameters, itemsize, stored_bytes, work), available_memory()
    if have is not None and need > have:
        narrower, fewer = itemsize > 4 and work != "training", work == "gradients"
        advice = [word for word, useful in (("with --dtype float32", narrower), ("without --grads", fewer)) if useful]
        instead = f"; less is needed {' and '.join(advice)}" if advice else ""
        raise ValueError(
            f"not enough memory for both sides: {parameters:,} parameters need about {need / 1e9:,.1f} GB, "
            f"{have / 1e9:,.1f} GB are available{instead}"
        )
