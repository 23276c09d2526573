"""The makeMoE character language model (AviSoori1x/makeMoE), under its own state-dict names."""

from typing import ClassVar

import torch
from torch import nn

from jax_moe.config import ExpertConfig, MakeMoEConfig, MoEConfig
from jax_moe.config.parameters import Role
from torch_ref.arrays import check_token_range, checked, checked_input, dims_of_settings
from torch_ref.attention.multihead import Attention
from torch_ref.dims import Bool, Float, Int, Tensor
from torch_ref.experts import expert_ffn
from torch_ref.losses import MoEStats
from torch_ref.models.block import Randomness, block_forward, checked_draws
from torch_ref.moe import Parts, moe_forward
from torch_ref.norms import normed
from torch_ref.remat import Remat, rematerialised


def kaiming_normal(module: nn.Module) -> None:
    """Weights of a linear map ~ N(0, 2 / fan_in); biases are unchanged. For `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight)


class NoisyTopkRouter(nn.Module):
    """`topkroute_linear` and, unless the noise is off, `noise_linear`."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.topkroute_linear = nn.Linear(config.model_dim, config.num_experts)
        learned = config.router.noise == "learned_gaussian"
        self.noise_linear = nn.Linear(config.model_dim, config.num_experts) if learned else None


class MakeMoEExpert(nn.Module):
    """`net.0` [4 D, D] and `net.2` [D, 4 D], which makeMoE stores in an nn.Sequential around a ReLU."""

    def __init__(self, model_dim: int, expert_dim: int, config: ExpertConfig):
        super().__init__()
        self.config = config
        self.net = nn.ModuleDict({"0": nn.Linear(model_dim, expert_dim), "2": nn.Linear(expert_dim, model_dim)})

    def forward(self, x_RD: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        """The answer before dropout."""
        up, down = self.net["0"], self.net["2"]
        assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        return expert_ffn(x_RD, up, down, None, self.config)


class SparseMoE(nn.Module):
    """`torch_ref.MoE` under makeMoE's names."""

    roles: ClassVar[dict[str, Role]] = {"router": "router", "experts": "expert"}

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.router = NoisyTopkRouter(config)
        self.experts = nn.ModuleList(
            [MakeMoEExpert(config.model_dim, config.expert_dim, config.expert) for _ in range(config.num_experts)]
        )

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        *,
        mask_BT: Bool[Tensor, "B T"] | None = None,
        noise_BTE: Float[Tensor, "B T E"] | None = None,
        keep_BTKD: Bool[Tensor, "B T K D"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], MoEStats]:
        """As `torch_ref.MoE`."""
        parts = Parts(self.config, self.router.topkroute_linear, self.router.noise_linear, None, list(self.experts))
        output = moe_forward(
            x_BTD, parts, training=self.training, mask_BT=mask_BT, noise_BTE=noise_BTE, keep_BTKD=keep_BTKD
        )
        return output.y_BTD, output.stats


class MakeMoEBlock(nn.Module):
    """`torch_ref.Block` under makeMoE's names: `ln1`, `sa`, `ln2`, `smoe`."""

    def __init__(self, config: MakeMoEConfig):
        super().__init__()
        block = config.block
        self.sa = Attention(block.attention, block_size=config.block_size)
        self.smoe = SparseMoE(config.moe)
        self.ln1 = nn.LayerNorm(config.model_dim, eps=block.norm_eps)
        self.ln2 = nn.LayerNorm(config.model_dim, eps=block.norm_eps)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        *,
        mask_BT: Bool[Tensor, "B T"] | None = None,
        randomness: Randomness | None = None,
    ) -> tuple[Float[Tensor, "B T D"], MoEStats]:
        """The block's answer and its MoE's statistics."""
        x_BTD, stats = block_forward(x_BTD, self.ln1, self.sa, self.ln2, self.smoe, mask_BT, randomness)
        assert stats is not None
        return x_BTD, stats


class MakeMoE(nn.Module):
    """Token and position embeddings, blocks, a final norm and a head."""

    def __init__(self, config: MakeMoEConfig | None = None):
        super().__init__()
        self.config = config = MakeMoEConfig() if config is None else config
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.model_dim)
        self.position_embedding_table = nn.Embedding(config.block_size, config.model_dim)
        self.blocks = nn.ModuleList([MakeMoEBlock(config) for _ in range(config.num_layers)])
        self.ln_f = nn.LayerNorm(config.model_dim)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size)
        self.apply(kaiming_normal)

    def forward(
        self,
        tokens_BT: Int[Tensor, "B T"],
        *,
        mask_BT: Bool[Tensor, "B T"] | None = None,
        randomness: Randomness | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits; arguments as in `logits_and_stats`."""
        return self.logits_and_stats(tokens_BT, mask_BT=mask_BT, randomness=randomness)[0]

    def logits_and_stats(
        self,
        tokens_BT: Int[Tensor, "B T"],
        *,
        mask_BT: Bool[Tensor, "B T"] | None = None,
        randomness: Randomness | None = None,
        remat: Remat = "none",
    ) -> tuple[Float[Tensor, "B T V"], MoEStats]:
        """Logits of the next character, and the statistics of every layer (leading L).

        Noise and dropout follow `self.training` and the contract, unless `randomness` gives the draws, each with a
        leading L. `remat`: which values each layer keeps for the backward. Raises ValueError for T above block_size, a
        token outside the vocabulary, or a tensor of another kind or shape.
        """
        self.check_tokens(tokens_BT)
        sizes = checked_input("tokens_BT", tokens_BT) | dims_of_settings(self.config, L="num_layers")
        checked(sizes, mask_BT=mask_BT)
        if randomness is not None:
            randomness = checked_draws(randomness, self.config.block, sizes, "L")
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.token_embedding_table(tokens_BT.long()) + self.position_embedding_table(positions_T)
        layers = []
        for i, block in enumerate(self.blocks):
            draws = None
            if randomness is not None:
                draws = Randomness(*(None if draw is None else draw[i] for draw in randomness))
            x_BTD, stats = rematerialised(block, remat)(x_BTD, mask_BT=mask_BT, randomness=draws)
            layers.append(stats)
        logits_BTV = self.lm_head(normed(x_BTD, self.ln_f))
        return logits_BTV, MoEStats(*(torch.stack(values) for values in zip(*layers, strict=True)))

    def check_tokens(self, tokens_BT: Int[Tensor, "B T"]) -> None:
        """Raises ValueError unless this is a tensor of integers [B, T] with at most block_size positions, all of them
        in the vocabulary."""
        config = self.config
        checked_input("tokens_BT", tokens_BT)
        if not 1 <= tokens_BT.shape[1] <= config.block_size:
            allowed = f"1 to block_size={config.block_size}"
            raise ValueError(f"tokens_BT has {tokens_BT.shape[1]} positions: must be {allowed}")
        if tokens_BT.numel():
            check_token_range(int(tokens_BT.min()), int(tokens_BT.max()), config.vocab_size)
