"""The exchange of tokens between expert devices: one `jax.shard_map` region, with the signature of a dispatcher.

Every device of the mesh holds n of the tokens. A choice's row goes to the device of its expert and its answer comes
back, among the X devices of the expert axis that share their place on the other axes. Slots are those of one device:
capacity and drops are decided before, so answers do not depend on the exchange. What differs is what travels:

- all_to_all: buffers of every expert, as long as the capacity allows; for contracts with a capacity
- padded: buffers of every device, twice its even share; if one is too small, a second, larger program runs
- ring: all tokens to all expert devices, and the sums of their answers back (all-gather and reduce-scatter)
- ragged: the rows alone (`jax.lax.ragged_all_to_all`, which XLA does not have on CPU)

"xla", the default, has no region: XLA splits the program of one device. "auto" is the one of all_to_all, ring and
padded that moves the fewest rows (`fewest_rows`). The experts' weights are whole on the tensor axis inside the region,
where each of its devices takes its share of the tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jax_moe.config.checks import require
from jax_moe.config.exchange import Exchange
from jax_moe.config.moe import MoEConfig, RouterConfig
from jax_moe.dims import Array, Bool, Float, Int
from jax_moe.dispatch import Moves, Slots, queue_positions, with_identity
from jax_moe.experts import Weights, expert_ffn, take_experts
from jax_moe.kernels import dropless_dispatch
from jax_moe.kernels.moves import choice_of_place, combine_choices, places_to_choices, rows_at, tokens_to_places
from jax_moe.routing import Routing
from jax_moe.sharding.mesh import AXES, EXPERT_AXIS, SEQUENCE_AXIS
from jax_moe.sharding.rules import batch_split

SLACK = 2  # a padded buffer over the even share of a device
_chosen = jax.make_user_context("xla")  # part of the keys of jit's caches


def exchange(name: str) -> Any:
    """A context in which layers exchange tokens in this way: xla, all_to_all, padded, ring, ragged or auto.

    It has an effect where `jax.set_mesh` has set a mesh with more than one device on its expert axis.
    Raises ValueError for an unknown name.
    """
    return _chosen(check_exchange(name))


def check_exchange(name: str) -> str:
    """The name. Raises ValueError for an unknown one."""
    known = get_args(Exchange)
    require(name in known, "exchange", name, f"one of {', '.join(known)}")
    return name


def exchange_in_use(config: MoEConfig) -> Callable | None:
    """The dispatcher that exchanges tokens, or None where XLA splits the program.

    Raises ValueError for a mesh that does not divide the experts or whose axes are not Auto, and for an exchange that
    cannot run the contract or does not exist here.
    """
    mesh, name = jax.sharding.get_abstract_mesh(), _chosen.value
    X = 1 if mesh.empty else mesh.shape.get(EXPERT_AXIS, 1)
    if name == "xla" or X == 1:
        return None
    E = config.num_networks
    if name == "auto" and (E % X or any(kind != AxisType.Auto for kind in mesh.axis_types)):
        return None
    require(E % X == 0, f"mesh {EXPERT_AXIS}", X, f"a divisor of {E}, the experts of the layer")
    auto = all(kind == AxisType.Auto for kind in mesh.axis_types)
    require(auto, "exchange", name, "'xla' on a mesh with axes that are not Auto")
    fits = name != "all_to_all" or config.capacity is not None
    require(fits, "exchange", name, "padded, ring, ragged, xla or auto for a contract without a capacity")
    without = "all_to_all, padded, ring, xla or auto on CPU, where XLA has no ragged all-to-all"
    require(name != "ragged" or has_ragged(), "exchange", name, without)
    dispatch = exchanged(name)
    return with_identity(dispatch) if config.identity_experts else dispatch


def has_ragged() -> bool:
    """Whether XLA has a ragged all-to-all for the devices here."""
    return jax.default_backend() != "cpu"


def fewest_rows(config: MoEConfig, num_devices: int, num_tokens: int, longest: int) -> str:
    """The exchange that moves the fewest rows from each of X devices with n tokens, of those that can run the contract.

    `longest` is the most choices of an expert that n tokens and the capacity allow.
    """
    rows = {"ring": num_devices * num_tokens, "padded": num_devices * _room(config, num_devices, num_tokens)[0]}
    if config.capacity is not None:
        rows = {"all_to_all": config.num_experts * longest, **rows}
    return min(rows, key=rows.__getitem__)


def _room(config: MoEConfig, num_devices: int, num_tokens: int) -> tuple[int, int]:
    """The rows of a padded buffer for one device: `SLACK` times its even share, and all that can come."""
    most = num_tokens * min(config.top_k, config.num_experts // num_devices)
    return min(most, -(-SLACK * num_tokens * config.top_k // num_devices)), most


def exchanged(name: str) -> Callable:
    """The dispatcher that exchanges every device's share of the tokens in this way, or by `fewest_rows` for "auto"."""

    def dispatch(
        x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves
    ) -> Float[Array, "G S D"]:
        mesh = jax.sharding.get_abstract_mesh()
        axes = tuple(axis for axis in AXES if mesh.shape.get(axis, 1) > 1)
        G, S, D = x_GSD.shape
        N = G * S
        short = -N % mesh.size

        def put_together(x: Array) -> Array:
            whole = mesh.shape.get(SEQUENCE_AXIS, 1) == 1
            return x if whole else jax.lax.with_sharding_constraint(x, batch_split(mesh, N).spec)

        def rows(x: Array | None) -> Array | None:
            if x is None:
                return None
            x = put_together(x.reshape(N, *x.shape[2:]))
            return jnp.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1)) if short else x

        kept_GSK = slots.slot_GSK < moves.capacity
        keep_GSKD = _masks(routing, slots, moves, D)
        tokens = [rows(x) for x in (x_GSD, routing.expert_GSK, slots.weight_GSK, kept_GSK, keep_GSKD)]
        n = (N + short) // mesh.size
        groups = min(G, (n + S - 2) // S + 1 if n % S and S % n else -(-n // S))
        longest = min(n, moves.capacity * groups)
        few = fewest_rows(moves.config, mesh.shape[EXPERT_AXIS], n, longest)
        inside = EXCHANGES[few if name == "auto" else name]

        def share(tokens: list, weights: Weights) -> Array:
            x_ND, expert_NK, weight_NK, kept_NK, keep_NKD = tokens
            slots = Slots(jnp.where(kept_NK, 0, 1)[None], weight_NK[None])
            keep = None if keep_NKD is None else keep_NKD[None]
            routing = Routing(expert_NK[None], weight_NK[None], weight_NK[None], expert_NK[None])
            config = moves.config
            there = replace(
                config, num_experts=config.num_experts // mesh.shape[EXPERT_AXIS], capacity=None, router=RouterConfig(),
                top_k=1, dispatcher="auto",
            )

            def apply(x_ECD: Array, expert_E: Array | None) -> Array:
                return expert_ffn(x_ECD, take_experts(weights, expert_E), config.expert)

            own = moves._replace(capacity=1, dropout_key=None, keep_GSKD=keep, apply=apply, weights=weights)
            return inside(x_ND[None], routing, slots, own, there, longest)[0]

        split = PartitionSpec(axes)
        # check_vma: the dispatchers' own backwards carry sums that are not declared as varying over axes
        y_ND = jax.shard_map(
            share, mesh=mesh, in_specs=(split, PartitionSpec(EXPERT_AXIS)), out_specs=split, check_vma=False,
        )(tokens, dict(moves.weights))
        return put_together(y_ND[:N]).reshape(G, S, D)

    return dispatch


def _masks(routing: Routing, slots: Slots, moves: Moves, width: int) -> Bool[Array, "G S K D"] | None:
    """The dropout mask of every choice, drawn as on one device: with a capacity, as `gather` does, for every place."""
    G, S, K = routing.expert_GSK.shape
    E, C = moves.config.num_experts, moves.capacity
    if moves.dropout_key is None or moves.config.capacity is None or C == 0:
        return moves.keep((G, S, K, width))
    keep_EGCD = moves.keep((E, G, C, width))
    if keep_EGCD is None:
        return None
    return keep_EGCD[routing.expert_GSK, jnp.arange(G)[:, None, None], jnp.minimum(slots.slot_GSK, C - 1)]


def _to_and_fro(x: Array) -> Array:
    """[X, ...]: part i goes to expert device i, whose part for this device comes back. Its own inverse."""
    return jax.lax.all_to_all(x, EXPERT_AXIS, 0, 0, tiled=True)


def _ranks(queue_NK: Array, kept_NK: Array, num_queues: int) -> Int[Array, "N K"]:
    """The number of kept choices of this device before each one in its queue."""
    queue = jnp.where(kept_NK, queue_NK, num_queues)
    return queue_positions(queue[None], jnp.zeros(queue[None].shape), num_queues + 1, "token")[0]


def _weighed(x_NKD: Array, place_NK: Array, slots: Slots, moves: Moves, num_places: int) -> Array:
    """The rows of all places, times their weights where these act on the input."""
    choice_P = choice_of_place(place_NK.reshape(-1), num_places)
    x_PD = tokens_to_places(x_NKD, choice_P, place_NK)
    if moves.config.expert.weight_on == "input":
        x_PD = (x_PD * rows_at(slots.weight_GSK.reshape(-1), choice_P)[:, None]).astype(x_PD.dtype)
    return x_PD


def _returned(y_PD: Array, place_NK: Array, slots: Slots, moves: Moves) -> Float[Array, "1 N D"]:
    """The weighted sums of the answers of each token's places."""
    y_NKD = places_to_choices(y_PD, choice_of_place(place_NK.reshape(-1), y_PD.shape[0]), place_NK)
    return combine_choices(y_NKD[None], slots, moves)


def all_to_all(
    x: Float[Array, "1 N D"], routing: Routing, slots: Slots, moves: Moves, there: MoEConfig, longest: int
) -> Float[Array, "1 N D"]:
    """Buffers [E, c, D], where c is the most choices of an expert that n tokens and the capacity allow."""
    expert_NK, kept_NK = routing.expert_GSK[0], slots.slot_GSK[0] == 0
    E, e, c, D = moves.config.num_experts, there.num_experts, longest, x.shape[-1]
    if c == 0:
        return jnp.zeros_like(x)
    place_NK = jnp.where(kept_NK, expert_NK * c + _ranks(expert_NK, kept_NK, E), E * c)
    x_PD = _weighed(x[0], place_NK, slots, moves, E * c)
    x_ECD = _to_and_fro(x_PD.reshape(-1, e, c, D)).swapaxes(0, 1).reshape(e, -1, D)
    y_XECD = moves.apply(x_ECD, None).reshape(e, -1, c, D).swapaxes(0, 1)
    return _returned(_to_and_fro(y_XECD).reshape(E * c, D), place_NK, slots, moves)


def padded(
    x: Float[Array, "1 N D"], routing: Routing, slots: Slots, moves: Moves, there: MoEConfig, longest: int
) -> Float[Array, "1 N D"]:
    """Buffers [X, r, D] of `SLACK` times the even share; where any device needs more, of all that can come."""
    expert_NK, kept_NK = routing.expert_GSK[0], slots.slot_GSK[0] == 0
    n = expert_NK.shape[0]
    e = there.num_experts
    X = moves.config.num_experts // e
    usual, most = _room(moves.config, X, n)
    rank_NK = _ranks(expert_NK // e, kept_NK, X)

    def with_rows(r: int) -> Callable:
        def program(x: Array, weight: Array, weights: Weights) -> Array:
            place_NK = jnp.where(kept_NK, expert_NK // e * r + rank_NK, X * r)
            given = slots._replace(weight_GSK=weight)
            x_PD = _weighed(x[0], place_NK, given, moves, X * r)
            expert_P = jnp.full((X * r,), e, jnp.int32).at[place_NK].set((expert_NK % e).astype(jnp.int32), mode="drop")
            x_RD = _to_and_fro(x_PD.reshape(X, r, -1)).reshape(X * r, -1)
            y_RD = _answered(x_RD, _to_and_fro(expert_P.reshape(X, r)).reshape(-1), weights, moves, there)
            return _returned(_to_and_fro(y_RD.reshape(X, r, -1)).reshape(X * r, -1), place_NK, given, moves)

        return program

    arguments = x, slots.weight_GSK, dict(moves.weights)
    if usual == most:
        return with_rows(most)(*arguments)
    axes = tuple(jax.sharding.get_abstract_mesh().axis_names)  # all devices run the same program
    fits = jax.lax.pmax(jnp.where(kept_NK, rank_NK, -1).max(), axes) < usual
    return jax.lax.cond(fits, with_rows(usual), with_rows(most), *arguments)


def _answered(x_RD: Array, expert_R: Array, weights: Weights, moves: Moves, there: MoEConfig) -> Float[Array, "R D"]:
    """The answers of rows with an expert of this device each; the number after the last expert's marks an empty row."""
    inside = replace(there, expert=replace(there.expert, weight_on="output"))
    empty = (expert_R >= there.num_experts)[None, :, None]
    expert = jnp.where(empty, 0, expert_R[None, :, None])
    weight = jnp.where(empty, 0, 1).astype(jnp.promote_types(x_RD.dtype, jnp.float32))
    slots, capacity = _queued(expert, weight, ~empty, there.num_experts)

    def apply(x_ECD: Array, expert_E: Array | None) -> Array:
        return expert_ffn(x_ECD, take_experts(weights, expert_E), inside.expert)

    own = moves._replace(config=inside, capacity=capacity, keep_GSKD=None, weights=weights, apply=apply)
    routing = Routing(expert, weight, weight, expert)
    return dropless_dispatch(x_RD[None], routing, slots, own)[0]


def _queued(expert: Array, weight: Array, here: Array, num_experts: int) -> tuple[Slots, int]:
    """The places of the choices that are here in the queues of this device, and the room of a queue."""
    room = expert.size
    rank_NK = _ranks(expert[0], here[0], num_experts)
    return Slots(jnp.where(here, rank_NK[None], room), weight), room


def ring(
    x: Float[Array, "1 N D"], routing: Routing, slots: Slots, moves: Moves, there: MoEConfig, longest: int
) -> Float[Array, "1 N D"]:
    """All tokens of the expert axis on each of its devices, which adds up its own experts' answers."""

    def of_all(part: Array) -> Array:
        return jax.lax.all_gather(part, EXPERT_AXIS, axis=1, tiled=True)

    e = there.num_experts
    expert = of_all(routing.expert_GSK) - jax.lax.axis_index(EXPERT_AXIS) * e
    here = (expert >= 0) & (expert < e) & (of_all(slots.slot_GSK) == 0)
    expert, weight = jnp.where(here, expert, 0), jnp.where(here, of_all(slots.weight_GSK), 0)
    keep: Bool[Array, "1 N K D"] | None = None if moves.keep_GSKD is None else of_all(moves.keep_GSKD)
    # a token's choices on other devices are dropped here, so that its K may be more than this device's experts
    inside = replace(moves.config, capacity=None, router=RouterConfig(), dispatcher="auto")
    slots, capacity = _queued(expert, weight, here, e)
    own = moves._replace(config=_Sized(inside, e), keep_GSKD=keep, capacity=capacity)  # type: ignore[arg-type]
    y = dropless_dispatch(of_all(x), Routing(expert, weight, weight, expert), slots, own)
    return jax.lax.psum_scatter(y, EXPERT_AXIS, scatter_dimension=1, tiled=True)


class _Sized:
    """A contract with another number of experts, which may be fewer than K: dispatchers only read it."""

    def __init__(self, config: MoEConfig, num_experts: int):
        self.config, self.num_experts, self.num_networks = config, num_experts, num_experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def ragged(
    x: Float[Array, "1 N D"], routing: Routing, slots: Slots, moves: Moves, there: MoEConfig, longest: int
) -> Float[Array, "1 N D"]:
    """The kept rows alone, sorted by device; a receiver has room for all that can come."""
    expert_NK, kept_NK = routing.expert_GSK[0], slots.slot_GSK[0] == 0
    n, K = expert_NK.shape
    e = there.num_experts
    X, R = moves.config.num_experts // e, n * K
    device_NK, rank_NK = expert_NK // e, _ranks(expert_NK // e, kept_NK, X)
    count_X = jnp.zeros(X + 1, jnp.int32).at[jnp.where(kept_NK, device_NK, X)].add(1)[:X]
    count_XX = jax.lax.all_gather(count_X, EXPERT_AXIS)  # [from, to]
    me = jax.lax.axis_index(EXPERT_AXIS)
    first_X, first_XX = jnp.cumsum(count_X) - count_X, jnp.cumsum(count_XX, axis=0) - count_XX
    here_XX = jnp.cumsum(count_XX, axis=1) - count_XX  # where rows for each device start on their sender
    place_NK = jnp.where(kept_NK, first_X[device_NK] + rank_NK, R)
    x_PD = _weighed(x[0], place_NK, slots, moves, R)
    expert_P = jnp.zeros(R, jnp.int32).at[place_NK].set((expert_NK % e).astype(jnp.int32), mode="drop")
    there_sizes = first_X, count_X, first_XX[me], count_XX[:, me]
    back_sizes = first_XX[:, me], count_XX[:, me], here_XX[:, me], count_X

    def sent(rows: Array, room: Array, sizes: tuple) -> Array:
        return jax.lax.ragged_all_to_all(rows, room, *sizes, axis_name=EXPERT_AXIS)

    most = X * n * min(K, e)
    x_RD = sent(x_PD, jnp.zeros((most, x.shape[-1]), x.dtype), there_sizes)
    expert_R = sent(expert_P, jnp.full((most,), e, jnp.int32), there_sizes)
    y_RD = _answered(x_RD, expert_R, moves.weights, moves, there)
    return _returned(sent(y_RD, jnp.zeros_like(x_PD), back_sizes), place_NK, slots, moves)


EXCHANGES: dict[str, Callable] = {"all_to_all": all_to_all, "padded": padded, "ring": ring, "ragged": ragged}
