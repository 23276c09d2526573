"""Named contracts, each that of a published model. Sizes default to the model's and can be overridden.

Standard library only. Each docstring names its sources; "HF" is Hugging Face transformers 5.23.
"""

from jax_moe.config.moe import (
    BalanceConfig,
    CapacityConfig,
    ExpertConfig,
    MoEConfig,
    Priority,
    RouterConfig,
    makemoe,
)

__all__ = [
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "granite_moe",
    "makemoe",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "switch",
    "vmoe",
]

_HF_BALANCE = BalanceConfig(f_sums_to="k", pooled="over_layers")


def mixtral(
    model_dim: int = 4096, expert_dim: int = 14336, num_experts: int = 8, top_k: int = 2, jitter_eps: float = 0.0
) -> MoEConfig:
    """Mixtral (arXiv 2401.04088; HF): softmax over all experts in fp32, top-2, renormalised, SwiGLU, dropless."""
    router = RouterConfig(
        renormalise="sum", dtype="input", noise="input_jitter" if jitter_eps else "none", jitter_eps=jitter_eps,
        jitter_scope="block",
    )
    return MoEConfig(
        model_dim=model_dim, expert_dim=expert_dim, num_experts=num_experts, top_k=top_k, router=router,
        balance=_HF_BALANCE
    )


def switch(
    model_dim: int = 768, expert_dim: int = 3072, num_experts: int = 8, top_k: int = 1,
    capacity_factor: float | None = 1.25, jitter_eps: float = 0.01, expert_capacity: int | None = None,
    balance_per_sequence: bool = False,
) -> MoEConfig:
    """Switch Transformer (arXiv 2101.03961, section 2): top-1 by softmax probability, which is also the weight.

    Capacity ceil(S/E * factor) per sequence in token order (eq. 3), or `expert_capacity` slots for any length (HF).
    Only the router sees the input jitter; its fp32 weights are rounded to the input's dtype. The balance loss is over
    the whole batch (eq. 4-6), or with `balance_per_sequence` over each sequence (Mesh TensorFlow's groups; HF). In that
    case, without a capacity, each sequence is a group with a slot for every token, so that nothing is dropped.
    """
    router = RouterConfig(noise="input_jitter" if jitter_eps else "none", jitter_eps=jitter_eps, weight_dtype="input")
    capacity = None
    if capacity_factor is not None or expert_capacity is not None or balance_per_sequence:
        factor = float(num_experts) if capacity_factor is None else capacity_factor  # of E: all S tokens fit
        capacity = CapacityConfig(
            factor=factor, rounding="ceil", group="sequence", counts_top_k=False, slots=expert_capacity
        )
    expert = ExpertConfig(activation="relu", gated=False)
    return MoEConfig(
        model_dim=model_dim, expert_dim=expert_dim, num_experts=num_experts, top_k=top_k, router=router,
        capacity=capacity,
        expert=expert, balance=BalanceConfig(counted_in="group" if balance_per_sequence else "batch"),
    )


def vmoe(
    model_dim: int = 768, expert_dim: int = 3072, num_experts: int = 8, top_k: int = 2,
    capacity_factor: float | None = 1.05, batch_priority: bool = False,
) -> MoEConfig:
    """V-MoE (arXiv 2106.05974; google-research/vmoe): softmax over all, top-k, weights not renormalised.

    Capacity ceil(S*K*factor/E) per sequence, rounded up to a multiple of 4; all first choices in token order come
    before all second choices, as in the released configurations. With `batch_priority` tokens with the highest weight
    come first (section 4). V-MoE trains with Gaussian noise of std 1/E on the logits: give it as `noise_BTE`.
    """
    capacity = None
    if capacity_factor is not None:
        priority: Priority = "batch" if batch_priority else "choice"
        capacity = CapacityConfig(
            factor=capacity_factor, rounding="ceil", multiple=4, group="sequence", priority=priority
        )
    expert = ExpertConfig(activation="gelu_tanh", gated=False, bias=True)
    return MoEConfig(
        model_dim=model_dim, expert_dim=expert_dim, num_experts=num_experts, top_k=top_k, capacity=capacity,
        expert=expert
    )


def qwen2_moe(
    model_dim: int = 2048, expert_dim: int = 1408, num_experts: int = 60, top_k: int = 4, shared_dim: int = 5632,
    renormalise: bool = False,
) -> MoEConfig:
    """Qwen2-MoE (HF): softmax over all experts, top-k, optionally renormalised; a shared expert with a sigmoid gate."""
    router = RouterConfig(renormalise="sum" if renormalise else "none", dtype="input", weight_dtype="input")
    expert = ExpertConfig(shared_dim=shared_dim, shared_gate=shared_dim > 0)
    return MoEConfig(
        model_dim=model_dim, expert_dim=expert_dim, num_experts=num_experts, top_k=top_k, router=router, expert=expert,
        balance=_HF_BALANCE,
    )


def qwen3_moe(
    model_dim: int = 2048, expert_dim: int = 768, num_experts: int = 128, top_k: int = 8, renormalise: bool = True
) -> MoEConfig:
    """Qwen3-MoE (HF): Qwen2-MoE without a shared expert; the released models renormalise."""
    return qwen2_moe(model_dim, expert_dim, num_experts, top_k, shared_dim=0, renormalise=renormalise)


def olmoe(model_dim: int = 2048, expert_dim: int = 1024, num_experts: int = 64, top_k: int = 8) -> MoEConfig:
    """OLMoE (arXiv 2409.02060; HF): softmax over all experts, top-8 of 64, not renormalised, dropless."""
    return qwen2_moe(model_dim, expert_dim, num_experts, top_k, shared_dim=0, renormalise=False)


def deepseek_v3(
    model_dim: int = 7168, expert_dim: int = 2048, num_experts: int = 256, top_k: int = 8,
    shared_dim: int | None = None, num_clusters: int = 8, top_clusters: int = 4, scale: float = 2.5,
    balance_per_sequence: bool = False,
) -> MoEConfig:
    """DeepSeek-V3 (arXiv 2412.19437, eq. 12-16; HF): sigmoid scores, correction bias for selection, 4 of 8 clusters.

    Weights are 2.5 * score / (sum of scores + 1e-20), without the bias. One shared expert, as wide as a routed expert.
    `balance_per_sequence`: the balance loss is the paper's (eq. 17-20), in place of the loss over all tokens.
    """
    router = RouterConfig(
        score="sigmoid", correction_bias=True, num_clusters=num_clusters, top_clusters=top_clusters,
        renormalise="eps", scale=scale,
    )
    expert = ExpertConfig(shared_dim=expert_dim if shared_dim is None else shared_dim)
    return MoEConfig(
        model_dim=model_dim, expert_dim=expert_dim, num_experts=num_experts, top_k=top_k, router=router, expert=expert,
        balance=BalanceConfig(of="scores", counted_in="sequence") if balance_per_sequence else BalanceConfig(),
    )


def glm4_moe(
    model_dim: int = 4096, expert_dim: int = 1408, num_experts: int = 128, top_k: int = 8,
    shared_dim: int | None = None, scale: float = 1.0,
) -> MoEConfig:
    """GLM4-MoE (HF): DeepSeek-V3 with a single cluster."""
    sizes = model_dim, expert_dim, num_experts, top_k, shared_dim
    return deepseek_v3(*sizes, num_clusters=1, top_clusters=1, scale=scale)


def gpt_oss(model_dim: int = 2880, expert_dim: int = 2880, num_experts: int = 32, top_k: int = 4) -> MoEConfig:
    """gpt-oss (HF): biased router, top-4 of the logits, softmax over these; clamped (up + 1) * g * sigmoid(1.702 g)."""
    router = RouterConfig(order="select_then_softmax", bias=True, dtype="input", weight_dtype="input")
    expert = ExpertConfig(activation="quick_gelu", bias=True, clamp=7.0, up_offset=1.0)
    return MoEConfig(
        model_dim=model_dim, expert_dim=expert_dim, num_experts=num_experts, top_k=top_k, router=router, expert=expert,
        balance=_HF_BALANCE,
    )


def granite_moe(model_dim: int = 1536, expert_dim: int = 512, num_experts: int = 40, top_k: int = 8) -> MoEConfig:
    """Granite-MoE (HF): top-k of the logits, fp32 softmax over these, SwiGLU."""
    router = RouterConfig(order="select_then_softmax", dtype="input", weight_dtype="input")
    return MoEConfig(
        model_dim=model_dim, expert_dim=expert_dim, num_experts=num_experts, top_k=top_k, router=router,
        balance=_HF_BALANCE
    )
