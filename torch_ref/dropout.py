"""Dropout whose mask can be given."""


from torch.nn import functional as F

from torch_ref.dims import Bool, Float, Tensor


def dropout(
    x: Float[Tensor, "*any"], rate: float, training: bool, keep: Bool[Tensor, "*any"] | None
) -> Float[Tensor, "*any"]:
    """Dropout by the given mask, else drawn when training, else none."""
    if rate == 0:
        return x
    return F.dropout(x, rate, training) if keep is None else apply_keep(x, keep, rate)


def apply_keep(x: Float[Tensor, "*any"], keep: Bool[Tensor, "*any"], rate: float) -> Float[Tensor, "*any"]:
    """Dropout with a given mask: kept entries divided by 1 - rate, the others 0."""
    return (x / (1 - rate)).masked_fill(~keep, 0)
