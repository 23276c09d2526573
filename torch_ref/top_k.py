"""The largest entries of a row, ties to the lower index."""

import torch

from torch_ref.dims import Float, Int, Tensor


def best_first(score: Float[Tensor, "*any X"], count: int) -> Int[Tensor, "*any Y"]:
    """Indices of the `count` highest scores, best first; on equal scores the lower index wins (torch.topk: any)."""
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :count]
