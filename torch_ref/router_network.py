"""A router that is a network, and may read the state of the router of the mixture before it (ZAYA1)."""

import torch
from torch import nn
from torch.nn import functional as F

from jax_moe.config import MoEConfig
from torch_ref.dims import Float, Tensor, wide


class RouterNetwork(nn.Module):
    """The maps of such a router: `down` [D, I], `first` and `second` [I, I], `out` [I, E]; the scales `norm` [I] and,
    where the router takes a state, `state_scale` [I]. I is `network_dim`.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        router, width = config.router, config.router.network_dim
        self.eps, self.in_fp32 = router.network_norm_eps, router.dtype == "float32"
        self.down = nn.Linear(config.model_dim, width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, config.num_experts, bias=False)
        self.norm = nn.Parameter(torch.ones(width))
        self.state_scale = nn.Parameter(torch.ones(width)) if router.takes_state else None

    def forward(
        self, x_BTD: Float[Tensor, "B T D"], state_BTI: Float[Tensor, "B T I"] | None
    ) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "B T I"]]:
        """The logits, in fp32 or wider, and the state for the router of the next mixture, in the input's dtype."""
        compute = wide(x_BTD.dtype) if self.in_fp32 else x_BTD.dtype

        def mapped(layer: nn.Linear, h: Tensor) -> Tensor:
            return F.linear(h, layer.weight.to(compute), None if layer.bias is None else layer.bias.to(compute))

        read = mapped(self.down, x_BTD.to(compute))
        if state_BTI is not None and self.state_scale is not None:
            read = torch.addcmul(read, state_BTI.to(compute), self.state_scale.to(compute))
        wide_read = read.to(wide(compute))
        rms = wide_read.pow(2).mean(-1, keepdim=True).add(self.eps).sqrt()
        h = (wide_read / rms).to(compute) * self.norm.to(compute)
        h = F.gelu(mapped(self.second, F.gelu(mapped(self.first, h))))
        return mapped(self.out, h).to(wide(x_BTD.dtype)), read.to(x_BTD.dtype)
