"""One checkpoint in both frameworks: weights, outputs and every gradient by name, on a seeded batch.

Needs PyTorch (`torch_ref`), which is imported when `compare` runs. Noise and dropout are off on both sides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.models.makemoe import MakeMoE
from jax_moe.moe import MoE
from jax_moe.porting.api import from_torch, to_torch
from jax_moe.porting.checkpoint import Checkpoint, abstract_module
from jax_moe.porting.files import same_bits
from jax_moe.porting.torch_files import import_torch, numpy_to_tensor

# Largest |difference| / largest |value| of a tensor. Measured on the published makeMoE size, untrained:
# outputs 1.5e-15 and 7.5e-7, the worst of 1,800 gradients 6.4e-15 and 3.9e-6.
OUTPUT_TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
GRADIENT_TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
CPU = "cpu"


@dataclass(frozen=True)
class Check:
    """One comparison: its worst error and what is allowed."""

    name: str
    error: float
    tolerance: float
    where: str = ""

    @property
    def passed(self) -> bool:
        """False for NaN as well."""
        return self.error <= self.tolerance


def compare(checkpoint: Checkpoint, *, batch_size: int = 2, num_tokens: int | None = None, seed: int = 0) -> list[Check]:
    """The checks, in fp64 and fp32. Raises ValueError if PyTorch is absent."""
    import_torch("parity")
    checks = [_there_and_back(checkpoint)]
    with jax.enable_x64(True), jax.default_device(jax.devices(CPU)[0]), jax.default_matmul_precision("highest"):
        for dtype in ("float64", "float32"):
            weights = {name: np.asarray(value, dtype) for name, value in _names(checkpoint.module).items()}
            x = _inputs(checkpoint, batch_size, num_tokens, seed).astype("int64" if checkpoint.family == "makemoe" else dtype)
            answers = _run_jax(checkpoint, weights, x, seed), _run_torch(checkpoint, weights, x, seed)
            checks += _errors(dtype, *answers)
    return checks


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |ours - theirs| / max |theirs|; infinite if theirs is all zero and ours is not, or a value is not finite."""
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    difference, scale = np.abs(ours - theirs).max(initial=0), np.abs(theirs).max(initial=0)
    if difference == 0:
        return 0.0
    return float(difference / scale) if scale > 0 else float("inf")


def _names(module: nnx.Module) -> dict[str, np.ndarray]:
    """Weights under `torch_ref`'s names."""
    return to_torch(module)


def _there_and_back(checkpoint: Checkpoint) -> Check:
    state = _names(checkpoint.module)
    dtype = jnp.dtype(next(iter(checkpoint.weights.values())).dtype)
    copy = from_torch(abstract_module(checkpoint.family, checkpoint.config, dtype), state)
    before, after = checkpoint.weights, Checkpoint(checkpoint.family, copy).weights
    differ = [name for name in before if not same_bits(before[name], after[name])]
    return Check("weights there and back", float(len(differ)), 0.0, ", ".join(differ[:1]))


def _inputs(checkpoint: Checkpoint, batch_size: int, num_tokens: int | None, seed: int) -> np.ndarray:
    config, draw = checkpoint.config, np.random.default_rng(seed)
    if checkpoint.family == "makemoe":
        return draw.integers(0, config.vocab_size, (batch_size, num_tokens or config.block_size))
    return draw.standard_normal((batch_size, num_tokens or 16, config.model_dim))


def _cotangent(shape: tuple[int, ...], seed: int, dtype: Any) -> np.ndarray:
    return np.random.default_rng([seed, 1]).standard_normal(shape).astype(dtype)


def _run_jax(
    checkpoint: Checkpoint, weights: Mapping[str, np.ndarray], x: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Output, expert load (empty for Soft MoE), and gradients of sum(output * cotangent) by name."""
    dtype = next(iter(weights.values())).dtype
    module = from_torch(abstract_module(checkpoint.family, checkpoint.config, dtype), weights, cast=True)
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def loss(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        model = nnx.merge(graphdef, params, rest)
        if isinstance(model, MakeMoE):
            y, stats = model.logits_and_stats(jnp.asarray(x), training=False)
            load = stats.expert_load_E
        elif isinstance(model, MoE):
            y, stats = model(jnp.asarray(x), training=False)
            load = stats.expert_load_E
        else:
            y, load = model(jnp.asarray(x)), jnp.zeros(0)  # type: ignore[operator]
        return (y * _cotangent(y.shape, seed, y.dtype)).sum(), (y, load)

    gradients, (y, load) = jax.jit(jax.grad(loss, has_aux=True))(params)
    return np.asarray(y), np.asarray(load), to_torch(module, gradients)


def _run_torch(
    checkpoint: Checkpoint, weights: Mapping[str, np.ndarray], x: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The same from `torch_ref`, its weights loaded with strict=True."""
    import torch_ref

    torch = import_torch("parity")
    config, family = checkpoint.config, checkpoint.family
    kind = {"makemoe": torch_ref.MakeMoE, "soft_moe": torch_ref.SoftMoE}.get(family, torch_ref.MoE)
    tensors = {name: numpy_to_tensor(value) for name, value in weights.items()}
    module = kind(config).to(next(iter(tensors.values())).dtype).eval()
    module.load_state_dict(tensors, strict=True)
    inputs = torch.from_numpy(x)
    if family == "makemoe":
        silence = torch.zeros(config.num_layers, *x.shape, config.num_experts)
        y, stats = module.logits_and_stats(inputs, randomness=torch_ref.Randomness(noise_BTE=silence))
    elif family == "soft_moe":
        y, stats = module(inputs), None
    else:
        learned = config.router.noise == "learned_gaussian"
        y, stats = module(inputs, noise_BTE=torch.zeros(*x.shape[:2], config.num_experts) if learned else None)
    (y * torch.from_numpy(_cotangent(tuple(y.shape), seed, weights[next(iter(weights))].dtype))).sum().backward()
    gradients = {
        name: np.zeros(tuple(value.shape)) if value.grad is None else value.grad.numpy()
        for name, value in module.named_parameters()
    }
    load = np.zeros(0) if stats is None else stats.expert_load_E.detach().numpy()
    return y.detach().numpy(), load, gradients


def _errors(dtype: str, ours: tuple, theirs: tuple) -> list[Check]:
    (y, load, gradients), (their_y, their_load, their_gradients) = ours, theirs
    checks = [Check(f"output, {dtype}", relative_error(y, their_y), OUTPUT_TOLERANCE[dtype])]
    if load.size:
        checks.append(Check(f"expert load, {dtype}", relative_error(load, their_load), 1e-6))
    if gradients.keys() != their_gradients.keys():
        odd = sorted(gradients.keys() ^ their_gradients.keys())
        where = f"names differ: {', '.join(odd[:5])}"
        return [*checks, Check(f"gradients, {dtype}", float("inf"), GRADIENT_TOLERANCE[dtype], where)]
    errors = {name: relative_error(gradients[name], their_gradients[name]) for name in gradients}
    worst = max(errors, key=lambda name: errors[name])
    return [*checks, Check(f"gradients, {dtype}", errors[worst], GRADIENT_TOLERANCE[dtype], worst)]
