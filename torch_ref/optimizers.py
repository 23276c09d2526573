"""One step of training as PyTorch loops take it; `jax_moe.optimizers` makes optax take the same."""

import torch


def clipped_step(optimizer: torch.optim.Optimizer, learning_rate: float, max_norm: float | None = None) -> None:
    """Steps with this learning rate in every group, after `clip_grad_norm_` over all parameters given `max_norm`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(
            [weight for group in optimizer.param_groups for weight in group["params"]], max_norm
        )
    optimizer.step()
