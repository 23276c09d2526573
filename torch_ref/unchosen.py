"""PyTorch's optimizers do not move a parameter whose gradient is None, such as that of an expert without tokens.

The layers here call every expert, so that such a gradient is zeros, as in `jax_moe`: decay and momentum then move the
expert, unless `skip_unchosen` sets the gradient to None.
"""

from torch import nn

from torch_ref.dims import Bool, Tensor


def expert_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The experts of every sparse mixture, in the order of the layers; in a Soft MoE every expert sees every token."""
    mixtures = (layer for layer in module.modules() if hasattr(layer, "router") or hasattr(layer, "gate"))
    found = [getattr(layer, "experts", None) for layer in mixtures]
    return [experts for experts in found if isinstance(experts, nn.ModuleList)]


def skip_unchosen(module: nn.Module, chosen_LE: Bool[Tensor, "*L E"]) -> None:
    """Sets the gradients of experts without tokens to None; `chosen_LE` is `chosen_experts(stats)`. Call it after
    backward.

    With accumulated gradients an expert is chosen if any part chose it: join the masks of the parts by `|`. Raises
    ValueError for a mask that does not fit the mixtures of the module.
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
