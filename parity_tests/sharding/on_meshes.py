"""Ten AdamW steps on meshes of up to eight virtual devices against the same steps on one, in fp64.

`python -m parity_tests.sharding.on_meshes NAME ...` prints the name of each case and a line for each way to split it, a
mesh with an exchange: the worst relative error of the first step's answers, statistics and losses, of its gradients by
name, and of the weights after the last step; choices are compared exactly. A planted fault that is found has a line,
too. A process has as many devices as its first use of JAX found, so that it is a program. With `--every` before the
names (none: all cases) the ways are every split of 1, 2, 4 and 8 devices over the axes that divides experts and heads,
each with Auto axes and the exchange that `auto` takes, and with Explicit axes as XLA splits them; the worst errors come
last.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import jax_moe
from jax_moe import presets, sharding
from jax_moe.attention import attention_by
from jax_moe.attention.products import blockwise
from jax_moe.config.attention import RopeConfig
from jax_moe.config.products import Products
from jax_moe.losses import next_token_loss, pool_balance_loss
from jax_moe.optimizers import adamw_as_torch
from jax_moe.porting.families import FAMILIES
from jax_moe.sharding import expert_parallel
from jax_moe.sharding.inside import alone_together
from parity_tests.shared.compare import MismatchError, check_close, check_exact
from parity_tests.shared.filled import filled
from parity_tests.shared.quick import QUICK

STEPS = 10
OPTIMIZER = adamw_as_torch(1e-2)
FLAT, ALL, POSITIONS = "data=2,expert=4", "data=2,expert=2,tensor=2", "data=2,expert=2,sequence=2"
SIZES: dict[str, Any] = {
    "vocab_size": 11, "model_dim": 8, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4,
}
V3 = {
    "model_type": "deepseek_v3", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 6, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 2,
    "v_head_dim": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 6, "intermediate_size": 10, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5, "rope_scaling": None, "rope_theta": 100.0, "tie_word_embeddings": False,
}


class Way(NamedTuple):
    """How a case is split: the axes of its mesh, their kind, the exchange, and how attention is computed."""

    axes: str
    exchange: str = "xla"
    explicit: bool = False
    attention: Products = "auto"

    def __str__(self) -> str:
        attention = "" if self.attention == "auto" else f"/{self.attention}"
        return f"{self.axes}/{self.exchange}{'/explicit' if self.explicit else ''}{attention}"

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh of the first devices."""
        mesh = sharding.device_mesh(sharding.read_mesh(self.axes))
        kinds = (AxisType.Explicit,) * len(mesh.axis_names)
        return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=kinds) if self.explicit else mesh


def by(axes: str, *exchanges: str) -> tuple[Way, ...]:
    """One mesh with several exchanges."""
    return tuple(Way(axes, exchange) for exchange in exchanges)


class Case(NamedTuple):
    """What is trained: how it is made, how it is split, its inputs [B, T], and for a layer what else it is given."""

    make: Callable[[], Any]
    ways: tuple[Way, ...]
    batch_size: int = 8
    num_positions: int = 5
    choices: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] | None = None  # replayed
    dropout: str = ""  # masks "given" or "drawn"
    faults: tuple[tuple[str, Way, str], ...] = ()  # planted, where, and what the message must name

    @property
    def is_layer(self) -> bool:
        """Whether the inputs are vectors."""
        return isinstance(jax.eval_shape(self.make), jax_moe.MoE)


def layer(config: Any) -> Callable[[], Any]:
    """Makes a layer."""
    return lambda: jax_moe.MoE(config, rngs=nnx.Rngs(0))


def decoder(**settings: Any) -> Callable[[], Any]:
    """Makes a decoder with grouped attention."""
    config = jax_moe.DecoderConfig.grouped(**(SIZES | settings))
    return lambda: jax_moe.Decoder(config, rngs=nnx.Rngs(0))


MAKEMOE = jax_moe.MakeMoEConfig(
    vocab_size=11, block_size=5, model_dim=8, num_heads=4, num_layers=2, num_experts=4, dropout=0.0, noise=False,
)
MAKEMOE_LAYER = presets.makemoe(8, 6, 4, 2, noise=False, dropout=0.0)
DROPOUT = replace(MAKEMOE_LAYER, expert=replace(MAKEMOE_LAYER.expert, dropout=0.5))
ON_INPUT = replace(DROPOUT, num_experts=8, expert=replace(DROPOUT.expert, weight_on="input"))
CASES = {
    "layer, dropless": Case(
        layer(presets.mixtral(8, 6, 4, 2)),
        (Way(FLAT), *by(ALL, "padded", "ragged"), Way(ALL, explicit=True), Way(ALL, "ring", explicit=True)),
        batch_size=3, num_positions=7,
    ),
    "layer, half of the choices dropped": Case(
        layer(MAKEMOE_LAYER.with_capacity("0.5", priority="probability")),
        (*by(ALL, "xla", "all_to_all", "padded"), Way(ALL, "all_to_all", explicit=True),
         Way("expert=2,sequence=2,tensor=2", "auto")),
        num_positions=6,
        faults=(
            ("experts swapped", Way(ALL, "all_to_all"), "answers"),
            ("gradient scaled", Way(ALL, "all_to_all", explicit=True), "gradients: error 7 at router."),
            ("rows swapped in the exchange", Way(ALL, "all_to_all"), "answers"),
        ),
    ),
    # experts 0 and 1 stand on the same device of expert=2, and two or all but two of the others have nothing
    "layer, all tokens on one device": Case(
        layer(presets.glm4_moe(8, 6, 4, 2, shared_dim=4)), by(ALL, "padded", "ring", "ragged"),
        choices=lambda draw, shape: np.stack([draw.permutation(2) for _ in range(np.prod(shape))]).reshape(*shape, 2),
    ),
    "layer, one expert on a device, dropout given": Case(
        layer(ON_INPUT.with_capacity("1.0")), by("expert=8", "all_to_all", "padded", "ring", "ragged"), dropout="given",
    ),
    "layer, dropout drawn": Case(
        layer(DROPOUT.with_capacity("1.0")), by(ALL, "all_to_all", "ring"), dropout="drawn",
    ),
    "layer, identity experts": Case(
        layer(replace(presets.mixtral(8, 6, 6, 3), identity_experts=2)),
        (Way(FLAT, "ring"), Way(ALL, "padded")), batch_size=3,
    ),
    "makemoe": Case(lambda: jax_moe.MakeMoE(MAKEMOE, rngs=nnx.Rngs(0)),
                    (Way(ALL, explicit=True), Way(ALL, "all_to_all"))),
    "mixtral": Case(decoder(
        moe=presets.mixtral(8, 6, 4, 2), rope=RopeConfig(theta=1e3), sliding_window=3, sliding_layers=(0, 1),
        balance_loss_weight=0.1,
    ), (Way(ALL), Way(FLAT, "auto"), Way(ALL, "auto", explicit=True),  # padded, ring
        Way(POSITIONS, attention="blocks")), num_positions=6),
    "sigmoid scores and shared experts": Case(decoder(
        moe=presets.glm4_moe(8, 6, 4, 2, shared_dim=6), dense_layers=(0,), dense_dim=10, qk_norm="per_head",
        balance_loss_weight=0.1,
    ), by(ALL, "xla", "auto"), batch_size=4),  # ring
    "latent attention": Case(
        lambda: jax_moe.Decoder(FAMILIES["deepseek_v3"].config(V3), rngs=nnx.Rngs(0)),
        (Way(ALL, explicit=True), Way(POSITIONS, attention="plain")), num_positions=6,
    ),
}


def every_way(case: Case) -> list[Way]:
    """Every split of eight devices or fewer that divides the case's experts and heads, with Auto and Explicit axes."""
    arrays = jax_moe.declared(jax.eval_shape(case.make))
    ways = []
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(sharding.AXES)):
        mesh = jax.sharding.AbstractMesh(sizes, sharding.AXES)
        try:
            sharding.check_divides(mesh, arrays)
        except ValueError:
            continue
        if mesh.size <= 8:
            axes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "data=1"
            ways += [Way(axes, "auto"), Way(axes, explicit=True)]
    return ways


class Outcome(NamedTuple):
    """Arrays by name, on the host."""

    exact: dict[str, np.ndarray]
    answers: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


def objective(case: Case, module: Any, given: dict[str, Any]) -> tuple[jax.Array, tuple[dict[str, Any], Any]]:
    """What is minimised; and choices, answers and statistics."""
    if case.is_layer:
        key = jax.random.key(3) if case.dropout == "drawn" else None
        output = module.run(
            given["x"], key=key, expert_BTK=given.get("choices"), mask_BT=given["mask"], keep_BTKD=given.get("keep"),
        )
        loss = (output.y_BTD * given["probe"]).sum() + output.stats.load_balance_loss + output.stats.router_z_loss
        found = {"y": output.y_BTD}
    else:
        output = module.run(given["tokens"][:, :-1])
        moe = module.config.block.moe if isinstance(module, jax_moe.MakeMoE) else module.config.moe
        loss = next_token_loss(output.logits_BTV, given["tokens"][:, 1:]) + 0.1 * pool_balance_loss(output.stats, moe)
        found = {"logits": output.logits_BTV}
    experts = output.expert_BTK if case.is_layer else output.expert_LBTK
    return loss, ({"experts": experts}, {**found, "loss": loss, **output.stats._asdict()})


def inputs(case: Case) -> dict[str, np.ndarray]:
    """The batch, equal in every step."""
    draw = np.random.default_rng(7)
    shape = case.batch_size, case.num_positions
    if not case.is_layer:
        return {"tokens": draw.integers(0, 11, (shape[0], shape[1] + 1))}
    mask = np.ones(shape, bool)
    mask[0, -2:] = False
    given = {"x": draw.normal(size=(*shape, 8)), "probe": draw.normal(size=(*shape, 8)), "mask": mask}
    if case.dropout == "given":
        given["keep"] = draw.random((*shape, 2, 8)) < 0.5
    return given | ({"choices": case.choices(draw, shape)} if case.choices else {})


def ragged_on_cpu(
    rows: jax.Array, room: jax.Array, first: jax.Array, count: jax.Array, place: jax.Array, _: jax.Array, *,
    axis_name: str,
) -> jax.Array:
    """What `jax.lax.ragged_all_to_all` does, which XLA has not on CPU: from every device its rows for this one."""
    me, number = jax.lax.axis_index(axis_name), jnp.arange(rows.shape[0])
    sent = [jax.lax.all_gather(each, axis_name) for each in (rows, first, count, place)]
    for theirs, start, size, to in zip(*sent, strict=True):
        here = (number >= start[me]) & (number < start[me] + size[me])
        room = room.at[jnp.where(here, number - start[me] + to[me], room.shape[0])].set(theirs, mode="drop")
    return room


def wide(tree: Any) -> Any:
    """Floats as fp64."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def run(case: Case, way: Way | None, fault: str = "") -> Outcome:
    """The steps, split in that way or on one device."""
    module = filled(case.make)
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    arrays = jax_moe.declared(module)
    params, rest, given = wide(nnx.to_pure_dict(params)), wide(rest), inputs(case)
    state = jax.jit(OPTIMIZER.init, compiler_options=QUICK)(params)
    placed: Any = None
    mesh = None if way is None else way.mesh
    together = (lambda module: module) if way is None or way.explicit else alone_together
    if mesh is not None:
        sharding.check_divides(mesh, arrays)
        placed = (sharding.split_tree(mesh, params, arrays), sharding.split_tree(mesh, state, arrays))
        params, state = jax.device_put((params, state), placed)
        rest = jax.device_put(rest, sharding.replicated(mesh))
        given = {name: jax.device_put(x, sharding.batch_split(mesh, x.shape[0])) for name, x in given.items()}
    if fault == "experts swapped":
        params = jax.tree_util.tree_map_with_path(
            lambda keys, x: jnp.flip(x, axis=x.ndim - 3) if "experts" in str(keys) else x, params
        )

    def step(params: Any, state: Any, rest: Any, given: dict[str, Any]) -> Any:
        def loss(params: Any) -> Any:
            return objective(case, together(nnx.merge(graphdef, params, rest)), given)

        (_, (exact, answers)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        if fault == "gradient scaled" and mesh is not None:
            gradients = jax.tree_util.tree_map_with_path(
                lambda keys, x: x * mesh.size if "router" in str(keys) else x, gradients
            )
        updates, state = OPTIMIZER.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, exact, answers, gradients

    out = None if placed is None else (*placed, None, None, None)
    jitted = jax.jit(step, compiler_options=QUICK, out_shardings=out)
    first: Any = None
    for _ in range(STEPS):
        if way is None:
            params, state, *found = jitted(params, state, rest, given)
        else:
            with jax.set_mesh(mesh), sharding.exchange(way.exchange), attention_by(way.attention):
                params, state, *found = jitted(params, state, rest, given)
        first = first or found
    assert jitted._cache_size() == 1, "a step must not be compiled again"
    if way is not None and way.explicit:
        check_layout(first[1], given)
    exact, answers, gradients = (named(tree) for tree in first)
    answers |= {"dropped": answers.pop("dropped_fraction")}
    return Outcome(exact, answers, gradients, named(params))


def check_layout(answers: dict[str, Any], given: dict[str, Any]) -> None:
    """Asserts that answers are split over the sequences as the input is, and that all else is whole."""
    for name, value in answers.items():
        like = next(iter(given.values())).sharding.spec if name in ("y", "logits") else PartitionSpec()
        spec = jax.typeof(value).sharding.spec
        assert spec == PartitionSpec(*like, *(None,) * (value.ndim - len(like))), (name, spec)


def named(tree: Any) -> dict[str, np.ndarray]:
    """{path: array on the host}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="."): np.asarray(leaf) for keys, leaf in leaves}


def compared(found: Outcome, alone: Outcome, where: str) -> tuple[float, float, float]:
    """The errors of answers, gradients and weights.

    Raises MismatchError where choices differ, or an error is above what is promised.
    """
    check_exact(found.exact, alone.exact, f"{where}: choices")
    answers = check_close(found.answers, alone.answers, 1e-12, f"{where}: answers")
    gradients = check_close(found.gradients, alone.gradients, 1e-10, f"{where}: gradients")
    return answers, gradients, check_close(found.weights, alone.weights, 1e-10, f"{where}: weights")


def main(*words: str) -> None:
    """Prints the cases, each with a line a way and for each fault that is found. Raises MismatchError as `compared`."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.lax.ragged_all_to_all, expert_parallel.has_ragged = ragged_on_cpu, lambda: True
    blockwise.QUERIES = 4  # two of each of two devices: of their three positions the last block has one
    expert_parallel.SLACK = 1  # so that padded buffers are too small where all tokens are on one device
    every = words[:1] == ("--every",)
    errors = []
    for name in words[every:] or CASES:
        print(f"{name}:", flush=True)
        case = CASES[name]
        errors += show(name, case._replace(ways=tuple(every_way(case)), faults=()) if every else case)
    if every:
        print(len(errors), "ways, worst:", *(f"{max(kind):.1e}" for kind in zip(*errors, strict=True)))


def show(name: str, case: Case) -> list[tuple[float, float, float]]:
    """Prints a line a way and a fault; the errors of the ways."""
    alone, errors = run(case, None), []
    for way in case.ways:
        errors.append(compared(run(case, way), alone, f"{name}, {way}"))
        print(way, *errors[-1], flush=True)
    right = expert_parallel._to_and_fro
    for fault, way, names in case.faults:
        swapped = fault == "rows swapped in the exchange"
        expert_parallel._to_and_fro = (lambda x: jnp.flip(right(x), axis=0)) if swapped else right
        try:
            compared(run(case, way, fault), alone, fault)
        except MismatchError as error:
            assert names in str(error), error
            print("found:", fault, flush=True)
    expert_parallel._to_and_fro = right
    return errors


if __name__ == "__main__":
    main(*sys.argv[1:])
