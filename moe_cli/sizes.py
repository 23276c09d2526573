"""The size of a decoder: all parameters and those active for a token, bytes by dtype, memory on N devices."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import AbstractMesh

from jax_moe.config.decoder import DecoderConfig
from jax_moe.config.parameters import Declared
from jax_moe.porting.tensors import Header
from jax_moe.sharding.memory import numbers_on_device
from jax_moe.sharding.mesh import AXES
from jax_moe.sharding.rules import check_divides

ADAMW_BYTES = 16  # fp32: weight, gradient and two moments, 4 bytes each
GIB = 2**30


@dataclass(frozen=True)
class Parameters:
    """The numbers of all parameters, of those of routed experts, and of those active for a token."""

    total: int
    experts: int
    active: int


def count_parameters(arrays: Mapping[str, Declared], config: DecoderConfig) -> Parameters:
    """Active are all parameters but the E - K unchosen experts of every mixture; embedding and head count in full.

    Experts that return their input have no parameters: a token sent to them has fewer active ones.
    """
    total = sum(math.prod(array.shape) for array in arrays.values())
    experts = sum(math.prod(array.shape) for array in arrays.values() if array.role == "expert")
    E, K = config.moe.num_networks, config.moe.top_k
    return Parameters(total, experts, total - experts // E * (E - K))


def stored_in_words(tensors: Iterable[Header], scheme: str | None) -> str:
    """The bytes of tensors by dtype; of a quantised folder as they are stored and as they are computed."""
    computed = list(tensors)
    if scheme is None:
        return _in_words(computed)
    stored = [part for tensor in computed for part in tensor.parts or (tensor,)]
    return f"{_in_words(stored)} as stored ({scheme}), {_in_words(computed)} as computed"


def name_lines(tensors: Mapping[str, Any]) -> list[str]:
    """A line a tensor: name, dtype and shape, and of a quantised tensor those of what is stored."""
    width, lines = max(map(len, tensors), default=0), []
    for name, value in tensors.items():
        parts = " and ".join(f"{part.dtype} {list(part.shape)}" for part in getattr(value, "parts", ()))
        lines.append(f"{name:{width}}  {value.dtype}  {list(value.shape)}" + (f"  from {parts}" if parts else ""))
    return lines


def _in_words(tensors: Iterable[Any]) -> str:
    return ", ".join(f"{readable(size)} {dtype}" for dtype, size in bytes_by_dtype(tensors).items())


def bytes_by_dtype(tensors: Iterable[Any]) -> dict[str, int]:
    """{dtype: bytes} of tensors, the largest first."""
    found: dict[str, int] = {}
    for tensor in tensors:
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        found[tensor.dtype.name] = found.get(tensor.dtype.name, 0) + size
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def expert_share(num_experts: int, num_devices: int) -> float:
    """The share of all experts on the device that holds the most, of N devices."""
    return -(-num_experts // num_devices) / num_experts


def memory_rows(
    parameters: Parameters, stored: int, stored_experts: int, config: DecoderConfig, devices: Iterable[int]
) -> dict[str, list[float]]:
    """{what is held: bytes on each device, for each number of devices}, without activations and caches."""
    shares = [expert_share(config.moe.num_networks, n) for n in devices]
    other, training = parameters.total - parameters.experts, ADAMW_BYTES
    return {
        "weights, on every device": [float(stored)] * len(shares),
        "weights, experts split": [stored - stored_experts + stored_experts * share for share in shares],
        "training, on every device": [float(training * parameters.total)] * len(shares),
        "training, experts split": [training * (other + parameters.experts * share) for share in shares],
    }


def memory_on_mesh(
    arrays: Mapping[str, Declared], itemsizes: Mapping[str, int], axes: Mapping[str, int]
) -> dict[str, int]:
    """{what is held: bytes on each device of the mesh}, without activations and caches.

    Raises ValueError for a mesh that does not divide the experts or the attention heads.
    """
    mesh = AbstractMesh(tuple(axes.get(axis, 1) for axis in AXES), AXES)
    check_divides(mesh, arrays)
    parts = numbers_on_device(mesh, arrays)
    weights = sum(number * itemsizes[name] for name, number in parts.items())
    return {"weights": weights, "training": ADAMW_BYTES * sum(parts.values())}


def readable(size: int | float) -> str:
    """A number of bytes, as "1.5 GiB"."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:,.0f} bytes"
