"""Multi-head attention, causal or not, in a loop over the heads."""

import torch
from torch import nn

from jax_moe.config import AttentionConfig
from torch_ref.arrays import checked, checked_input, dims_of_settings
from torch_ref.dims import Bool, Float, Tensor, wide
from torch_ref.dropout import dropout
from torch_ref.experts import linear


def head_weights(
    q_BTA: Float[Tensor, "B T A"], k_BUA: Float[Tensor, "B U A"], config: AttentionConfig,
    mask_BU: Bool[Tensor, "B U"] | None = None, tril_TU: Tensor | None = None,
) -> Float[Tensor, "B T U"]:
    """A head's softmax(q k^T * scale) in fp32 or wider. Masked keys get the most negative finite number before the
    softmax.

    `tril_TU` is the stored causal mask (0 where a key is hidden); without it the mask is made here.
    """
    scores_BTU = (q_BTA @ k_BUA.transpose(1, 2) * config.score_scale).to(wide(q_BTA.dtype))
    lowest = torch.finfo(scores_BTU.dtype).min
    if config.causal:
        if tril_TU is None:
            tril_TU = torch.ones(scores_BTU.shape[1:], device=scores_BTU.device).tril()
        scores_BTU = scores_BTU.masked_fill(tril_TU == 0, lowest)
    if mask_BU is not None:
        scores_BTU = scores_BTU.masked_fill(~mask_BU[:, None, :], lowest)
    return scores_BTU.softmax(dim=-1)


class Head(nn.Module):
    """The projections of a head, without bias, and its causal mask, a buffer because makeMoE stores it."""

    tril: Tensor | None

    def __init__(self, config: AttentionConfig, block_size: int | None):
        super().__init__()
        self.key = nn.Linear(config.model_dim, config.head_dim, bias=False)
        self.query = nn.Linear(config.model_dim, config.head_dim, bias=False)
        self.value = nn.Linear(config.model_dim, config.head_dim, bias=False)
        tril = None if block_size is None or not config.causal else torch.ones(block_size, block_size).tril()
        self.register_buffer("tril", tril)


class Attention(nn.Module):
    """Self-attention. Parameters `heads.{h}.{key,query,value}` [A, D] or one `qkv` [3 D, D]; `proj`.

    The output has a bias, the other projections have none, as in makeMoE. The rows of `qkv` are all heads' queries,
    then their keys, then their values. With a `block_size` causal per-head attention stores makeMoE's `tril` buffers.
    """

    def __init__(self, config: AttentionConfig, *, block_size: int | None = None):
        super().__init__()
        self.config = config
        if config.projections == "per_head":
            self.heads = nn.ModuleList([Head(config, block_size) for _ in range(config.num_heads)])
        else:
            self.qkv = nn.Linear(config.model_dim, 3 * config.model_dim, bias=False)
        self.proj = nn.Linear(config.model_dim, config.model_dim)

    def projected(self, x_BTD: Float[Tensor, "B T D"]) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Query, key, value [B, T, A] and the stored causal mask [T, T], if any, of each head."""
        if self.config.projections == "fused":
            per_head = linear(x_BTD, self.qkv).split(self.config.head_dim, dim=-1)
            H = self.config.num_heads
            return [(*per_head[h::H], None) for h in range(H)]
        T = x_BTD.shape[1]
        result = []
        for head in self.heads:
            assert isinstance(head, Head)
            if head.tril is not None and len(head.tril) < T:
                raise ValueError(f"x_BTD has {T} positions: must have at most block_size={len(head.tril)}")
            tril_TU = None if head.tril is None else head.tril[:T, :T]
            result.append((linear(x_BTD, head.query), linear(x_BTD, head.key), linear(x_BTD, head.value), tril_TU))
        return result

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        *,
        mask_BT: Bool[Tensor, "B T"] | None = None,
        attention_keep_BHTU: Bool[Tensor, "B H T U"] | None = None,
        output_keep_BTD: Bool[Tensor, "B T D"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The answer in the input's dtype; attention has no statistics.

        Dropout is drawn when training, or given by masks (True where a value survives). Padding (mask_BT False) is
        not attended to. Raises ValueError for a tensor of another kind or shape.
        """
        sizes = checked_input("x_BTD", x_BTD, self.config.model_dim)
        sizes |= {"U": sizes["T"], **dims_of_settings(self.config, H="num_heads")}
        checked(sizes, mask_BT=mask_BT, attention_keep_BHTU=attention_keep_BHTU, output_keep_BTD=output_keep_BTD)
        rate, heads = self.config.dropout, []
        for h, (q_BTA, k_BUA, v_BUA, tril_TU) in enumerate(self.projected(x_BTD)):
            weights_BTU = head_weights(q_BTA, k_BUA, self.config, mask_BT, tril_TU).to(x_BTD.dtype)
            keep_BTU = None if attention_keep_BHTU is None else attention_keep_BHTU[:, h]
            heads.append(dropout(weights_BTU, rate, self.training, keep_BTU) @ v_BUA)
        return dropout(linear(torch.cat(heads, dim=-1), self.proj), rate, self.training, output_keep_BTD)
