"""Kernels that hold the scores of a tile alone, where one covers what is asked: cuDNN's flash attention through
`jax.nn.dot_product_attention` on an NVIDIA GPU, and on a TPU the splash attention that jax ships
(`jax.experimental.pallas.ops.tpu.splash_attention`).
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jax_moe.attention.masks import Scope
from jax_moe.attention.products.plain import Softmax
from jax_moe.dims import Array, Float
from jax_moe.sharding.inside import devices_of_positions
from jax_moe.sharding.mesh import SEQUENCE_AXIS, TENSOR_AXIS
from jax_moe.sharding.rules import batch_split

LANES, TILE = 128, 512  # of a TPU; the most queries and keys of a tile of the splash kernel


def missing(
    q_BTHA: Float[Array, "B T H A"], k_BUJA: Float[Array, "B U J A"], v_BUJM: Float[Array, "B U J M"], scope: Scope,
    softmax: Softmax,
) -> str:
    """What keeps the kernel of the devices here from computing this; empty: nothing."""
    if softmax.sinks_H is not None or softmax.drops:
        return "sinks" if softmax.sinks_H is not None else "dropout of attention's weights"
    if devices_of_positions(q_BTHA.shape[1]) > 1:
        return f"positions that devices of the axis {SEQUENCE_AXIS!r} share"
    if not (scope.whole and scope.causal):
        return "queries that are not the keys' positions" if scope.causal else "attention to later positions"
    backend = jax.default_backend()
    if backend == "gpu":
        return _missing_on_gpu(q_BTHA, v_BUJM, scope)
    return _missing_on_tpu(q_BTHA, scope) if backend == "tpu" else f"the device {backend}"


def _missing_on_gpu(q_BTHA: Array, v_BUJM: Array, scope: Scope) -> str:
    A, capability = q_BTHA.shape[-1], str(getattr(jax.devices()[0], "compute_capability", ""))
    generation = int(capability.partition(".")[0]) if capability.partition(".")[0].isdecimal() else 0
    if generation < 8:
        return "a GPU before NVIDIA's Ampere"
    if q_BTHA.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q_BTHA.dtype} (only 16-bit floats)"
    M, most = v_BUJM.shape[-1], 256 if generation >= 9 else 128
    if A != M or A % 8 or most < A:
        return f"heads of width {A} and values of width {M}"
    if scope.mask_BU is not None or scope.chunk is not None:
        return "chunks" if scope.mask_BU is None else "padding"
    return ""


def _missing_on_tpu(q_BTHA: Array, scope: Scope) -> str:
    if q_BTHA.dtype not in (jnp.bfloat16, jnp.float32):
        return str(q_BTHA.dtype)
    if scope.chunk is not None and (scope.mask_BU is not None or scope.window is not None):
        return "chunks with padding or a window"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return "" if jax.device_count() == 1 else "several devices without jax.set_mesh"
    kinds = {kind for size, kind in zip(mesh.shape.values(), mesh.axis_types, strict=True) if size > 1}
    return "" if kinds in (set(), {AxisType.Auto}, {AxisType.Manual}) else "a mesh with axes that are not Auto"


def kernel(
    q_BTHA: Float[Array, "B T H A"], k_BUJA: Float[Array, "B U J A"], v_BUJM: Float[Array, "B U J M"], scope: Scope,
    softmax: Softmax,
) -> Float[Array, "B T H M"]:
    """The answer of the kernel of the devices here, for what `missing` says nothing about."""
    if jax.default_backend() == "gpu":
        return cudnn(q_BTHA, k_BUJA, v_BUJM, scope, softmax)
    return split_splash(q_BTHA, k_BUJA, v_BUJM, scope, softmax)


def cudnn(
    q_BTHA: Array, k_BUJA: Array, v_BUJM: Array, scope: Scope, softmax: Softmax, implementation: str = "cudnn"
) -> Float[Array, "B T H M"]:
    """By `jax.nn.dot_product_attention`."""
    return jax.nn.dot_product_attention(
        q_BTHA, k_BUJA, v_BUJM, scale=softmax.scale, is_causal=True, implementation=implementation,  # type: ignore
        local_window_size=None if scope.window is None else (scope.window - 1, 0),
    )


def split_splash(q_BTHA: Array, k_BUJA: Array, v_BUJM: Array, scope: Scope, softmax: Softmax) -> Array:
    """`splash` on each device's sequences and heads: XLA does not split a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(kind == AxisType.Manual or mesh.shape[axis] == 1 for axis, kind in _kinds(mesh)):
        return splash(q_BTHA, k_BUJA, v_BUJM, scope, softmax)
    spec, heads = batch_split(mesh, q_BTHA.shape[0]).spec, mesh.shape.get(TENSOR_AXIS, 1)
    batch = spec[0] if spec else None
    along = TENSOR_AXIS if heads > 1 and k_BUJA.shape[2] % heads == 0 else None

    def part(q_BTHA: Array, k_BUJA: Array, v_BUJM: Array, mask_BU: Array | None) -> Array:
        return splash(q_BTHA, k_BUJA, v_BUJM, scope._replace(mask_BU=mask_BU), softmax)

    whole = PartitionSpec(batch, None, along)
    return jax.shard_map(
        part, mesh=mesh, in_specs=(whole, whole, whole, PartitionSpec(batch)), out_specs=whole, check_vma=False,
    )(q_BTHA, k_BUJA, v_BUJM, scope.mask_BU)


def _kinds(mesh: jax.sharding.AbstractMesh) -> list[tuple[str, AxisType]]:
    return list(zip(mesh.axis_names, mesh.axis_types, strict=True))


def splash(
    q_BTHA: Array, k_BUJA: Array, v_BUJM: Array, scope: Scope, softmax: Softmax, interpret: bool = False
) -> Float[Array, "B T H M"]:
    """By splash attention; at padding, where answers mean nothing, they are other than `plain`'s.

    `interpret` runs the kernel in Pallas' interpreter, on any device.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    T, H = q_BTHA.shape[1:3]
    tile = min(TILE, -(-T // LANES) * LANES)
    short = -T % tile
    size = (T + short, T + short)
    if scope.chunk is not None:
        rule: splash_attention_mask.Mask = splash_attention_mask.ChunkedCausalMask(size, scope.chunk)
    elif scope.window is not None:
        rule = splash_attention_mask.LocalMask(size, (scope.window - 1, 0), 0)
    else:
        rule = splash_attention_mask.CausalMask(size)
    run = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([rule] * H), head_shards=1, q_seq_shards=1, interpret=interpret,
        block_sizes=splash_attention_kernel.BlockSizes(
            tile, tile, tile, tile, tile, tile, tile, tile
        ),
    )
    segments = None
    if scope.mask_BU is not None:
        real_BU = jnp.pad(scope.mask_BU.astype(jnp.int32), ((0, 0), (0, short)))
        segments = splash_attention_kernel.SegmentIds(real_BU, real_BU)
    heads_first = [
        jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0))).swapaxes(1, 2)
        for x in (q_BTHA * jnp.asarray(softmax.scale, q_BTHA.dtype), k_BUJA, v_BUJM)
    ]
    return jax.vmap(run)(*heads_first, segments).swapaxes(1, 2)[:, :T]
