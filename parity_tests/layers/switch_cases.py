"""Switch Transformers' sparse layer told twice more: transformers' own, and the papers' equations token by token.

The second is a third judge: no batching, no masks, no queue arithmetic. Names are those of transformers on disk.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import Tensor
from transformers.models.switch_transformers import modeling_switch_transformers as hf

import jax_moe
import torch_ref
from jax_moe import presets
from jax_moe.config.moe import MoEConfig
from jax_moe.porting.torch_tensors import numpy_to_tensor, tensor_to_numpy
from parity_tests.shared.quick import QUICK

State = dict[str, np.ndarray]
FP32 = 5e-6  # measured: 6.0e-7
WIDE = 1e-14  # measured: 2.0e-15
BALANCE, Z = 0.7, 0.3  # large, so that a wrong loss shows in the gradient


@dataclass(frozen=True)
class Sizes:
    """B, T, D, F, E and the slots of an expert in one sequence."""

    batch: int
    length: int
    width: int
    expert_width: int
    experts: int
    slots: int

    def tokens(self, seed: int = 0) -> np.ndarray:
        """Inputs [B, T, D] in fp64."""
        return np.random.default_rng(seed).normal(size=(self.batch, self.length, self.width))

    def theirs(self, **settings: Any) -> hf.SwitchTransformersSparseMLP:
        """transformers' layer with weights that spread tokens over the experts, unevenly."""
        config = hf.SwitchTransformersConfig(**{
            "d_model": self.width, "d_ff": self.expert_width, "num_experts": self.experts,
            "expert_capacity": self.slots, "router_jitter_noise": 0.0, "dropout_rate": 0.0, **settings,
        })
        layer = hf.SwitchTransformersSparseMLP(config)
        generator = np.random.default_rng(1)
        with torch.no_grad():
            for name, value in sorted(layer.named_parameters()):
                scale = 2.0 if name.startswith("router") else 1.0
                value.copy_(
                    torch.from_numpy(scale * generator.normal(size=tuple(value.shape)) * value.shape[-1] ** -0.5)
                )
        return layer


SIZES = [Sizes(2, 9, 6, 10, 4, 2), Sizes(3, 16, 8, 20, 3, 4), Sizes(1, 31, 12, 7, 7, 3), Sizes(4, 1, 5, 8, 2, 1)]


def state_of(layer: torch.nn.Module) -> State:
    """The state dict as numpy."""
    return {name: tensor_to_numpy(value) for name, value in layer.state_dict().items()}


def ours(config: MoEConfig, state: State) -> jax_moe.MoE:
    """Our layer with these weights, loaded strictly."""
    dtype = next(iter(state.values())).dtype
    empty = nnx.eval_shape(lambda: jax_moe.MoE(config, param_dtype=dtype))  # nothing is drawn to be overwritten
    return jax_moe.from_torch(empty, state)


@partial(jax.jit, compiler_options=QUICK)
def call(layer: jax_moe.MoE, x_BTD: Any, **arrays: Any) -> Any:
    """Answer and statistics."""
    return layer(x_BTD, **arrays)


def mirror(layer: jax_moe.MoE) -> torch_ref.MoE:
    """torch_ref's layer with the weights of ours."""
    state = {name: numpy_to_tensor(value) for name, value in jax_moe.to_torch(layer).items()}
    copy = torch_ref.MoE(layer.config).to(next(iter(state.values())).dtype)
    copy.load_state_dict(state, strict=True)
    return copy.eval()


def paper(
    weights: dict[str, Tensor], x_RD: Tensor, groups: list[list[int]], slots: int, balance: str
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Answers [R, D], balance loss, z-loss and dropped tokens, one token after the other.

    arXiv 2101.03961: eq. 1-2 (p = softmax(W x), y = p_i(x) E_i(x) for the likeliest i), eq. 3 (`slots` a group, in
    token order; an overflowing token "is passed directly to the next layer through the residual connection", so the
    layer adds nothing), eq. 4-6 without alpha (N * sum f_i P_i over `balance`: all tokens, or the mean over groups).
    arXiv 2202.08906, eq. 5: the mean of logsumexp squared.
    """
    logits_RE = x_RD @ weights["router.classifier.weight"].T
    prob_RE = torch.exp(logits_RE) / torch.exp(logits_RE).sum(dim=1, keepdim=True)
    answers, dropped = {}, []
    for tokens in groups:
        taken = [0] * prob_RE.shape[1]
        for token in tokens:
            expert = max(range(len(taken)), key=lambda e, token=token: prob_RE[token, e].item())
            if taken[expert] < slots:
                taken[expert] += 1
                hidden = (weights[f"experts.expert_{expert}.wi.weight"] @ x_RD[token]).clamp(min=0)
                answers[token] = prob_RE[token, expert] * (weights[f"experts.expert_{expert}.wo.weight"] @ hidden)
            else:
                answers[token] = torch.zeros_like(x_RD[token])
                dropped.append(token)
    counted = groups if balance == "group" else [[token for tokens in groups for token in tokens]]
    losses = []
    for tokens in counted:
        best = prob_RE[tokens].argmax(dim=1)
        share = [(best == e).double().mean() for e in range(prob_RE.shape[1])]
        losses.append(len(share) * sum(f * prob_RE[tokens, e].mean() for e, f in enumerate(share)))
    z_loss = (torch.log(torch.exp(logits_RE).sum(dim=1)) ** 2).mean()
    answer_RD = torch.stack([answers[token] for token in range(len(x_RD))])
    return answer_RD, torch.stack(losses).mean(), z_loss, dropped


def numbers(y: Tensor, balance: Tensor, z_loss: Tensor, x: Tensor, named: dict[str, Tensor]) -> State:
    """Outputs, losses and the gradients of one scalar that mixes them, by name."""
    probe = torch.from_numpy(np.random.default_rng(9).normal(size=tuple(y.shape))).to(y.dtype)
    ((y * probe).sum() + BALANCE * balance + Z * z_loss).backward()
    found = {"y": y, "balance": balance, "z": z_loss, "x.grad": x.grad}
    found |= {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in named.items()}
    return {name: value.detach().double().numpy() for name, value in found.items()}


def our_numbers(layer: jax_moe.MoE, x_BTD: np.ndarray) -> tuple[State, Any]:
    """The same of our layer under transformers' names, and its statistics."""
    graphdef, params = nnx.split(layer)
    probe = np.random.default_rng(9).normal(size=x_BTD.shape).astype(x_BTD.dtype)

    @partial(jax.jit, compiler_options=QUICK)
    def run(params: Any, x_BTD: jax.Array) -> Any:
        def total(params: Any, x_BTD: jax.Array) -> Any:
            y_BTD, stats = nnx.merge(graphdef, params)(x_BTD)
            mixed = (y_BTD * probe).sum() + BALANCE * stats.load_balance_loss + Z * stats.router_z_loss
            return mixed, (y_BTD, stats)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x_BTD)

    (_, (y_BTD, stats)), (gradient, x_gradient) = run(params, jnp.asarray(x_BTD))
    found = {"y": y_BTD, "balance": stats.load_balance_loss, "z": stats.router_z_loss, "x.grad": x_gradient}
    found |= jax_moe.to_torch(layer, gradient, layout="switch")
    return {name: np.asarray(value, np.float64) for name, value in found.items()}, stats


def mirror_numbers(layer: jax_moe.MoE, x_BTD: np.ndarray) -> State:
    """The same of torch_ref's layer."""
    copy = mirror(layer)
    x = torch.from_numpy(x_BTD).requires_grad_()
    y, stats = copy(x)
    named = dict(copy.named_parameters())
    found = numbers(y, stats.load_balance_loss, stats.router_z_loss, x, named)
    tree = jax_moe.porting.from_torch_tree(layer, {name: found.pop(name).astype(x_BTD.dtype) for name in named})
    return found | jax_moe.to_torch(layer, tree, layout="switch")


def contract(sizes: Sizes, **settings: Any) -> MoEConfig:
    """The preset at these sizes, by default as transformers has it: constant capacity, loss a sequence."""
    settings = {"expert_capacity": sizes.slots, "balance_per_sequence": True, "jitter_eps": 0.0, **settings}
    return presets.switch(sizes.width, sizes.expert_width, sizes.experts, **settings)


def their_numbers(layer: Any, x_BTD: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs, both losses by transformers' own functions, and gradients."""
    x = torch.from_numpy(x_BTD).requires_grad_()
    logits = layer.router(x)[2]
    z_loss = hf.router_z_loss_func(logits)
    balance = hf.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    return numbers(layer(x), balance, z_loss, x, dict(layer.named_parameters()))


def paper_numbers(
    state: dict[str, np.ndarray], x_BTD: np.ndarray, slots: int, group: str, balance: str
) -> tuple[dict[str, np.ndarray], list[int]]:
    """The papers' equations in fp64, and the tokens they drop."""
    B, T, D = x_BTD.shape
    weights = {name: torch.from_numpy(value.astype(np.float64)).requires_grad_() for name, value in state.items()}
    x = torch.from_numpy(x_BTD).requires_grad_()
    groups = [list(range(b * T, (b + 1) * T)) for b in range(B)] if group == "sequence" else [list(range(B * T))]
    y_RD, balance_loss, z_loss, dropped = paper(weights, x.reshape(-1, D), groups, slots, balance)
    return numbers(y_RD.reshape(B, T, D), balance_loss, z_loss, x, weights), dropped
