"""Dropout by a given mask or by a drawn mask."""

from torch.nn import functional as F

from torch_ref.dims import Bool, Float, Tensor


def dropout(
    x: Float[Tensor, "*any"], rate: float, training: bool, keep: Bool[Tensor, "*any"] | None
) -> Float[Tensor, "*any"]:
    """Dropout by the given mask, else by a mask drawn when training, else none."""
    if rate == 0:
        return x
    return F.dropout(x, rate, training) if keep is None else apply_keep(x, keep, rate)


def apply_keep(x: Float[Tensor, "*any"], keep: Bool[Tensor, "*any"], rate: float) -> Float[Tensor, "*any"]:
    """Kept entries divided by 1 - rate, the others 0."""
    return (x / (1 - rate)).masked_fill(~keep, 0)
