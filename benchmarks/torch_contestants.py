"""Contestants in PyTorch. They share the memory of jax's arrays, on the same device."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.contestant import Contestant, Values
from benchmarks.shapes import Numbers, Shape, UnavailableError, weights_of


def to_torch(array: jax.Array) -> Any:
    """The same memory as a torch tensor, on the same device. Raises UnavailableError if torch does not see the GPU."""
    import torch

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise UnavailableError(f"torch {torch.__version__} sees no GPU")
    return torch.from_dlpack(jax.block_until_ready(array))


def from_torch(tensor: Any) -> jax.Array:
    """The same memory as an array of jax, on the same device; not contiguous tensors are copied."""
    finish_torch()
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


def finish_torch() -> None:
    """Waits for the GPU, if jax uses one."""
    import torch

    if jax.default_backend() == "gpu":
        torch.cuda.synchronize()


@jax.jit
def _as_mixtral(numbers: Numbers) -> dict[str, jax.Array]:
    """The state of a `MixtralSparseMoeBlock`: weights lie transposed, gate and up are stacked."""
    return {
        "gate.weight": numbers["router"].T, "experts.down_proj": numbers["down"].mT,
        "experts.gate_up_proj": jnp.concatenate([numbers["gate"].mT, numbers["up"].mT], axis=1),
    }


@jax.jit
def _from_mixtral(router: jax.Array, gate_up: jax.Array, down: jax.Array) -> Values:
    """Our names and layout for arrays of a `MixtralSparseMoeBlock`."""
    gate, up = jnp.split(gate_up.mT, 2, axis=2)
    return {"router": router.T, "gate": gate, "up": up, "down": down.mT}


def mixtral_block(shape: Shape, numbers: Numbers, implementation: str) -> Any:
    """transformers' `MixtralSparseMoeBlock` with these weights, on the device of jax."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.D, intermediate_size=shape.F, num_local_experts=shape.E, num_experts_per_tok=shape.K
    )
    config._experts_implementation = implementation
    state = {name: to_torch(array) for name, array in _as_mixtral(weights_of(numbers)).items()}
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.load_state_dict(state, assign=True)
    return block


def transformers_block(shape: Shape, numbers: Numbers, implementation: str) -> Contestant:
    """`mixtral_block`, forward and backward."""
    import torch

    block = mixtral_block(shape, numbers, implementation)
    x, probe = (to_torch(numbers[name])[None] for name in ("x", "probe"))
    x.requires_grad_()
    inputs = block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj, x

    def forward() -> Any:
        with torch.no_grad():
            answer = block(x)
        finish_torch()
        return answer

    def forget() -> None:
        for tensor in inputs:
            tensor.grad = None

    def both() -> None:
        forget()
        (block(x) * probe).sum().backward()
        finish_torch()

    def values() -> Values:
        both()
        router, gate_up, down, g_x = (from_torch(tensor.grad) for tensor in inputs)
        forget()
        return {"answer": from_torch(forward()[0]), "x": g_x[0], **_from_mixtral(router, gate_up, down)}

    def peak() -> int | None:  # the weights, the input and the probe lie in memory of jax, which torch does not count
        if x.device.type != "cuda":
            return None
        forget()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        forget()
        shared = sum(tensor.nbytes for tensor in (*inputs, probe))
        return int(torch.cuda.max_memory_allocated() - before + shared)

    return Contestant(forward, both, values, peak)
