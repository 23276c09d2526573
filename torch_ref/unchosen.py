"""What PyTorch's optimizers do to an expert without tokens: leave it alone, if its gradient is None.

The layers here call every expert, so that such a gradient is zeros, as in `jax_moe`: decay and momentum then move it.
"""

from torch import nn

from torch_ref.dims import Bool, Tensor


def expert_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The experts of every mixture, in the order of the layers; those of a Soft MoE, which all see every token, are none."""
    found = [getattr(layer, "experts", None) for layer in module.modules() if hasattr(layer, "router") or hasattr(layer, "gate")]
    return [experts for experts in found if isinstance(experts, nn.ModuleList)]


def skip_unchosen(module: nn.Module, chosen_LE: Bool[Tensor, "*L E"]) -> None:
    """Sets to None the gradients of the experts that `chosen_experts(stats)` leaves out; call it after backward.

    With accumulated gradients an expert was chosen if any part chose it: give all parts' masks joined by `|`. Raises
    ValueError for a mask that does not fit the module's mixtures.
    """
    lists = expert_lists(module)
    rows = chosen_LE.reshape(-1, chosen_LE.shape[-1])
    sizes = [len(experts) for experts in lists]
    if sizes != [rows.shape[1]] * rows.shape[0]:
        shape = tuple(chosen_LE.shape)
        raise ValueError(f"chosen_LE={shape}: must be [L, E] of the module's mixtures, which have {sizes} experts")
    for experts, chosen_E in zip(lists, rows.tolist(), strict=True):
        for expert, chosen in zip(experts, chosen_E, strict=True):
            if not chosen:
                for parameter in expert.parameters():
                    parameter.grad = None
