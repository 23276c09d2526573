"""The makeMoE character language model (AviSoori1x/makeMoE), under its own state-dict names."""

from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import nn

from jax_moe.config import ExpertConfig, MakeMoEConfig, MoEConfig
from jax_moe.config.parameters import Role
from torch_ref.arrays import check_choices, check_vocabulary, checked, checked_input, dims_of_settings
from torch_ref.attention.multihead import Attention
from torch_ref.dims import Bool, Float, Int, Tensor
from torch_ref.experts import expert_ffn
from torch_ref.losses import MoEStats
from torch_ref.models.block import block_forward
from torch_ref.moe import MoEArrays, MoEOutput, Parts, moe_forward
from torch_ref.norms import normed
from torch_ref.remat import Remat, rematerialised


class Randomness(NamedTuple):
    """The draws of every layer, given as tensors. None: drawn as mode and contract say."""

    noise_BTE: Float[Tensor, "L B T E"] | None = None  # unit Gaussians for the router
    jitter_BTD: Float[Tensor, "L B T D"] | None = None  # factors on the router's input
    keep_BTKD: Bool[Tensor, "L B T K D"] | None = None  # True where dropout lets an expert's answer through
    attention_keep_BHTU: Bool[Tensor, "L B H T U"] | None = None
    output_keep_BTD: Bool[Tensor, "L B T D"] | None = None  # of attention's answer


class ModelOutput(NamedTuple):
    """What one call of a model computes."""

    logits_BTV: Float[Tensor, "B T V"]  # in the weights' dtype
    stats: MoEStats  # each field with a leading L
    expert_LBTK: Int[Tensor, "L B T K"]  # the experts every token was sent to, best first
    stages: dict[str, Tensor] | None = None  # every intermediate value by name, where asked for; a layer's with an L


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
        watch: bool = False,
        **arrays: Unpack[MoEArrays],
    ) -> MoEOutput:
        """As `torch_ref.MoE.run`: the answer, statistics and choices."""
        parts = Parts(self.config, self.router.topkroute_linear, self.router.noise_linear, None, list(self.experts))
        return moe_forward(x_BTD, parts, training=self.training, mask_BT=mask_BT, watch=watch, **arrays)


class MakeMoEBlock(nn.Module):
    """`torch_ref.Block` under makeMoE's names: `ln1`, `sa`, `ln2`, `smoe`."""

    def __init__(self, config: MakeMoEConfig):
        super().__init__()
        block = config.block
        self.sa = Attention(block.attention, block_size=config.block_size)
        self.smoe = SparseMoE(config.moe)
        self.ln1 = nn.LayerNorm(config.model_dim, eps=block.norm_eps)
        self.ln2 = nn.LayerNorm(config.model_dim, eps=block.norm_eps)

    def forward(self, x_BTD: Float[Tensor, "B T D"], **arrays: Any) -> tuple[Float[Tensor, "B T D"], MoEOutput]:
        """The block's answer, and all that its mixture computed, to its stages those of the block. Arguments as in
        `torch_ref.Block`, and `watch`.
        """
        y_BTD, answer, own = block_forward(x_BTD, self.ln1, self.sa, self.ln2, self.smoe, **arrays)
        return y_BTD, answer if answer.stages is None else answer._replace(stages=answer.stages | own)


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
        expert_LBTK: Int[Tensor, "L B T K"] | None = None,
        remat: Remat = "none",
    ) -> Float[Tensor, "B T V"]:
        """Logits; arguments as in `run`."""
        return self.run(
            tokens_BT, mask_BT=mask_BT, randomness=randomness, expert_LBTK=expert_LBTK, remat=remat
        ).logits_BTV

    def run(
        self,
        tokens_BT: Int[Tensor, "B T"],
        *,
        mask_BT: Bool[Tensor, "B T"] | None = None,
        randomness: Randomness | None = None,
        expert_LBTK: Int[Tensor, "L B T K"] | None = None,
        remat: Remat = "none",
        watch: bool = False,
    ) -> ModelOutput:
        """All that a call computes: logits of the next character, and of every layer (leading L) statistics and
        choices.

        Noise and dropout follow `self.training` and the contract, unless `randomness` gives the draws, each with a
        leading L; `expert_LBTK` replays choices. `remat`: which values each layer keeps for the backward. `watch`
        also hands out every intermediate stage. Raises ValueError for T above block_size, a token outside the
        vocabulary, an expert that is not there, or a tensor of another kind or shape.
        """
        self.check_tokens(tokens_BT)
        sizes = checked_input("tokens_BT", tokens_BT)
        sizes |= {"U": sizes["T"], **dims_of_settings(
            self.config, L="num_layers", H="num_heads", D="model_dim", E="num_experts", K="top_k"
        )}
        checked(sizes, mask_BT=mask_BT, expert_LBTK=expert_LBTK)
        if expert_LBTK is not None:
            check_choices("expert_LBTK", expert_LBTK, self.config.num_experts, mask_BT)
        draws = {} if randomness is None else randomness._asdict()
        checked(sizes, "L", **draws)
        each = {name: value for name, value in {**draws, "expert_BTK": expert_LBTK}.items() if value is not None}
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.token_embedding_table(tokens_BT.long()) + self.position_embedding_table(positions_T)
        embedded_BTD, layers = x_BTD, list[MoEOutput]()
        for i, block in enumerate(self.blocks):
            given = {name: value[i] for name, value in each.items()}
            x_BTD, mixture = rematerialised(block, remat)(x_BTD, mask_BT=mask_BT, watch=watch, **given)
            layers.append(mixture)
        stats = MoEStats(*(torch.stack(values) for values in zip(*(each.stats for each in layers), strict=True)))
        normed_BTD, expert_LBTK = normed(x_BTD, self.ln_f), torch.stack([each.expert_BTK for each in layers])
        output = ModelOutput(self.lm_head(normed_BTD), stats, expert_LBTK)
        if not watch:
            return output
        handed_out = [each.stages or {} for each in layers]
        stages = {name: torch.stack([each[name] for each in handed_out]) for name in handed_out[0]}
        return output._replace(stages={"embedding": embedded_BTD, **stages, "final_norm": normed_BTD})

    def check_tokens(self, tokens_BT: Int[Tensor, "B T"]) -> None:
        """Raises ValueError unless this is a tensor of integers [B, T] with at most block_size positions, all of them
        in the vocabulary."""
        config = self.config
        checked_input("tokens_BT", tokens_BT)
        if not 1 <= tokens_BT.shape[1] <= config.block_size:
            allowed = f"1 to block_size={config.block_size}"
            raise ValueError(f"tokens_BT has {tokens_BT.shape[1]} positions: must be {allowed}")
        check_vocabulary(tokens_BT, config.vocab_size)
