"""A case run in JAX and in PyTorch, with the same weights, tokens and draws; both return numpy.

Long because it holds both sides, to be read next to each other.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import jax_moe
import torch_ref
from jax_moe.config.attention import AttentionConfig
from jax_moe.config.models import BlockConfig, MakeMoEConfig
from jax_moe.config.moe import MoEConfig, SoftMoEConfig
from jax_moe.losses import pool_balance_loss
from parity_tests.shared.quick import AS_USERS, QUICK
from parity_tests.table.cases import Case, kind_of_dispatch, kind_of_program, stands_for
from parity_tests.table.inputs import Arrays, generator, make_inputs, parameter, to_bfloat16

JAX_DTYPES = {name: jnp.dtype(name) for name in ("float64", "float32", "bfloat16")}
TORCH_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
JAX_MODULES = {
    MoEConfig: jax_moe.MoE, SoftMoEConfig: jax_moe.SoftMoE, AttentionConfig: jax_moe.Attention,
    BlockConfig: jax_moe.Block, MakeMoEConfig: jax_moe.MakeMoE,
}
TORCH_MODULES = {
    MoEConfig: torch_ref.MoE, SoftMoEConfig: torch_ref.SoftMoE, AttentionConfig: torch_ref.Attention,
    BlockConfig: torch_ref.Block, MakeMoEConfig: torch_ref.MakeMoE,
}
ROUTING = ("mask_BT", "noise_BTE", "jitter_BTD", "expert_BTK", "tokens_BT", "router_state_BTI")


@dataclass
class Outcome:
    """Everything that the columns compare, as numpy. Gradients have PyTorch's names; "x" is the input."""

    choices: Arrays = field(default_factory=dict)
    forward: Arrays = field(default_factory=dict)
    statistics: Arrays = field(default_factory=dict)
    input_gradient: Arrays = field(default_factory=dict)
    parameter_gradients: Arrays = field(default_factory=dict)
    loss_gradients: Arrays = field(default_factory=dict)


def precision(dtype: str) -> AbstractContextManager:
    """The context for a dtype: x64 for fp64; narrower dtypes run without it, as for users."""
    return jax.enable_x64(dtype == "float64")


def jax_module(case: Case, dtype: str, rounded: bool = False) -> nnx.Module:
    """The case's layer filled with the case's numbers, `rounded` to bf16 first."""
    with precision(dtype):
        make = lambda: JAX_MODULES[type(case.config)](  # noqa: E731
            case.config, rngs=nnx.Rngs(0), param_dtype=JAX_DTYPES[dtype]
        )
        graphdef, empty = nnx.split(nnx.eval_shape(make))

        def fill(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
            value = parameter(case, path, leaf.shape, rounded)
            value = to_bfloat16(value) if rounded and leaf.dtype != jnp.float32 else value
            return leaf.replace(jnp.asarray(value, leaf.dtype))

        filled = nnx.from_flat_state([(path, fill(path, leaf)) for path, leaf in nnx.to_flat_state(empty)])
        return nnx.merge(graphdef, filled)


def torch_module(case: Case, weights: Arrays) -> torch.nn.Module:
    """The PyTorch module, loaded strictly, each tensor in the dtype of its array."""
    module = TORCH_MODULES[type(case.config)](case.config)
    module.load_state_dict({name: tensor(value) for name, value in weights.items()}, strict=True, assign=True)
    return module.train(bool(case.draws))


def tensor(value: np.ndarray) -> torch.Tensor:
    """A tensor with the same bits."""
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(value))


def array(value: torch.Tensor) -> np.ndarray:
    """A tensor as numpy; bf16 is widened to fp32."""
    value = value.detach()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy().copy()


def case_inputs(case: Case, rounded: bool = False) -> Arrays:
    """The case's tokens and draws in fp64."""
    router: Arrays = {}
    experts: Arrays = {}
    if isinstance(case.config, MoEConfig):
        module = jax_module(case, "float64")
        router, experts = (
            {str(path[-1]): np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(nnx.state(part))}
            for part in (module.router, module.experts)
        )
    given = make_inputs(case, router, experts)
    if rounded and "x_BTD" in given:
        given["x_BTD"] = to_bfloat16(given["x_BTD"])
    return given


def probe(case: Case, shape: tuple[int, ...], step: int = 0) -> np.ndarray:
    """Random weights of the outputs; the compared gradients are those of sum(probe * output)."""
    return generator(case, f"probe {step}").normal(size=shape)


def output_shape(case: Case) -> tuple[int, ...]:
    """The shape of the output."""
    width = case.config.vocab_size if isinstance(case.config, MakeMoEConfig) else _width(case)
    return (case.batch_size, case.num_positions, width)


def _width(case: Case) -> int:
    config = case.config.attention if isinstance(case.config, BlockConfig) else case.config
    return config.model_dim  # type: ignore[union-attr]


def first_of(given: Mapping[str, Any]) -> str:
    """The name of the main input: a layer's vectors, or a model's tokens."""
    return "x_BTD" if "x_BTD" in given else "tokens_BT"


def arguments(case: Case, given: Mapping[str, Any], randomness: Any) -> dict[str, Any]:
    """Keyword arguments of a call: as they are, or the draws of a model packed into its Randomness."""
    first = "tokens_BT" if isinstance(case.config, MakeMoEConfig) else "x_BTD"
    rest = {name: value for name, value in given.items() if name != first}
    if not isinstance(case.config, MakeMoEConfig):
        return rest
    drawn = {name: rest.pop(name) for name in randomness._fields if name in rest}
    return rest | ({"randomness": randomness(**drawn)} if drawn else {})


def call(case: Case, module: Any, first: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    """(output, statistics) of either framework's module; attention has no statistics: None."""
    if isinstance(case.config, MakeMoEConfig):
        output = module.run(first, **given)
        return output.logits_BTV, output.stats
    answer = module(first, **given)
    return (answer, None) if isinstance(case.config, AttentionConfig) else answer


def total_loss(case: Case, stats: Any, pool: Callable) -> Any:
    """The losses that train a router, added up."""
    losses = (stats.router_z_loss, stats.importance_cv2, stats.router_entropy)
    return pooled_loss(case, stats, pool) + sum(loss.mean() for loss in losses)


def pooled_loss(case: Case, stats: Any, pool: Callable) -> Any:
    """The balance loss, pooled over the layers; that of Soft MoE is 0."""
    return stats.load_balance_loss if case.moe is None else pool(stats, case.moe)


def statistics(case: Case, stats: Any, as_numpy: Callable[[Any], np.ndarray]) -> Arrays:
    """What is compared of a layer's statistics.

    Soft MoE's loads are nearly equal, so the relative error of their squared CV is large: 1 + CV^2 is compared.
    """
    found = {name: as_numpy(value) for name, value in stats._asdict().items()}
    if case.moe is None:
        found |= {name: 1 + found[name] for name in ("importance_cv2", "load_cv2")}
    return found


# --- JAX


def jax_arrays(given: Arrays, dtype: str) -> dict[str, jax.Array]:
    """Tokens in the dtype, draws in fp32 or fp64, masks and indices unchanged."""
    draw = "float64" if dtype == "float64" else "float32"
    as_given = {name: dtype if name == "x_BTD" else draw for name in given}
    return {
        name: jnp.asarray(value, JAX_DTYPES[as_given[name]] if value.dtype.kind == "f" else None)
        for name, value in given.items()
    }


def jax_forward(case: Case, layer: nnx.Module, given: dict[str, jax.Array]) -> tuple:
    """(output, statistics, pooled balance loss, (experts, slots)); None for parts that the case lacks."""
    first, rest = given[first_of(given)], arguments(case, given, jax_moe.Randomness)
    routing = None
    if isinstance(case.config, MoEConfig):
        output = layer.run(first, **rest)
        y, stats = output.y_BTD, output.stats
        routing = (output.routing.expert_GSK, output.slots.slot_GSK)
    else:
        y, stats = call(case, layer, first, rest)
    pooled = None if stats is None else pooled_loss(case, stats, pool_balance_loss)
    return y, stats, pooled, routing


def jax_function(case: Case, graphdef: nnx.GraphDef) -> Callable:
    """(params, rest, arrays, probe, weight) -> output, statistics, pooled loss, routing, gradients, as one function.

    The gradients are those of sum(probe * output) + weight * losses: two calls separate them with one compilation.
    """

    def run(
        params: nnx.State, rest: nnx.State, given: dict[str, jax.Array], probe: jax.Array, weight: jax.Array
    ) -> tuple:
        def forward(params: nnx.State, moved: dict[str, jax.Array]) -> tuple:
            y, stats, pooled, routing = jax_forward(case, nnx.merge(graphdef, params, rest), given | moved)
            loss = jnp.zeros(()) if stats is None else total_loss(case, stats, pool_balance_loss)
            return (y, loss), (stats, pooled, routing)

        moved = {name: value for name, value in given.items() if name == "x_BTD"}
        (y, loss), pull, (stats, pooled, routing) = jax.vjp(forward, params, moved, has_aux=True)
        return y, stats, pooled, routing, pull((probe.astype(y.dtype), weight.astype(loss.dtype)))

    return run


class JaxSide:
    """A case's layer in a dtype, with its compiled function."""

    def __init__(self, case: Case, dtype: str, rounded: bool = False):
        self.case, self.dtype = case, dtype
        self.module = jax_module(case, dtype, rounded)
        self.use(self.module)

    def use(self, module: nnx.Module) -> None:
        """Replaces the case's module, such as by a faulty module."""
        self.module = module
        self.graphdef, self.params, self.rest = nnx.split(module, nnx.Param, ...)
        as_users = self.dtype == "float32" and stands_for(self.case, kind_of_program)
        options = AS_USERS if as_users else QUICK
        self.function = jax.jit(jax_function(self.case, self.graphdef), compiler_options=options)

    def raw(self, given: Arrays, probe: np.ndarray, weight: float, params: nnx.State | None = None) -> tuple:
        """The answer of the compiled function."""
        with precision(self.dtype):
            chosen, wide = (
                self.params if params is None else params,
                jax_arrays({"weight": np.float64(weight)}, self.dtype),
            )
            probed = jnp.asarray(probe, JAX_DTYPES[self.dtype])
            return self.function(chosen, self.rest, jax_arrays(given, self.dtype), probed, wide["weight"])

    def run(self, given: Arrays) -> Outcome:
        """The outcome under the case's first probe."""
        weights = probe(self.case, output_shape(self.case))
        *forward, (gradients, moved) = self.raw(given, weights, 0.0)
        outcome = self._forward(*forward)
        outcome.parameter_gradients = self.named(gradients)
        outcome.input_gradient = _moved(moved)
        if outcome.statistics:
            gradients, moved = self.raw(given, np.zeros_like(weights), 1.0)[-1]
            outcome.loss_gradients = self.named(gradients) | _moved(moved)
        return outcome

    def forward_eagerly(self, given: Arrays) -> Outcome:
        """The outcome without jit and without gradients; the answer and the statistics are those of a plain call."""
        with precision(self.dtype):
            arrays = jax_arrays(given, self.dtype)
            _, _, pooled, routing = jax_forward(self.case, self.module, arrays)
            rest = arguments(self.case, arrays, jax_moe.Randomness)
            y, stats = call(self.case, self.module, arrays[first_of(arrays)], rest)
            return self._forward(y, stats, pooled, routing)

    def _forward(self, y: jax.Array, stats: Any, pooled: Any, routing: Any) -> Outcome:
        outcome = Outcome(forward={"y": _numpy(y)})
        if routing is not None:
            outcome.choices = {"expert": _tokens(self.case, routing[0]), "slot": _tokens(self.case, routing[1])}
        if stats is not None:
            outcome.statistics = statistics(self.case, stats, _numpy)
            outcome.statistics["pooled_balance_loss"] = _numpy(pooled)
        return outcome

    def named(self, tree: nnx.State) -> Arrays:
        """A tree of parameters or gradients under PyTorch's names."""
        with precision(self.dtype):
            return {name: _numpy(value) for name, value in jax_moe.to_torch(self.module, tree).items()}


def _numpy(value: Any) -> np.ndarray:
    value = np.array(value)  # a copy, as jax's array is read-only
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


def _moved(gradients: Mapping[str, jax.Array]) -> Arrays:
    return {"x": _numpy(gradients["x_BTD"])} if gradients else {}


def _tokens(case: Case, choice_GSK: Any) -> np.ndarray:
    """[B*T, K] without the padding of the last group."""
    flat = np.asarray(choice_GSK)
    return flat.reshape(-1, flat.shape[-1])[: case.batch_size * case.num_positions].astype(np.int64)


# --- PyTorch


def torch_arrays(given: Arrays, dtype: str) -> dict[str, torch.Tensor]:
    """As `jax_arrays`."""
    draw = "float64" if dtype == "float64" else "float32"
    out = {}
    for name, value in given.items():
        chosen = TORCH_DTYPES[dtype if name == "x_BTD" else draw]
        out[name] = (
            torch.from_numpy(value.copy()).to(chosen) if value.dtype.kind == "f" else torch.from_numpy(value.copy())
        )
        if value.dtype.kind == "i":
            out[name] = out[name].long()
    return out


class TorchSide:
    """The PyTorch side: the weights of a JaxSide through `to_torch` and `load_state_dict`."""

    def __init__(self, case: Case, dtype: str, weights: Arrays):
        self.case, self.dtype = case, dtype
        self.module = torch_module(case, weights)

    def losses(self, given: Arrays, probe: np.ndarray) -> tuple:
        """(output, statistics, sum(probe * output), router losses or None, input tensor or None), with a graph."""
        arrays = torch_arrays(given, self.dtype)
        first = arrays.pop(first_of(arrays))
        if first.is_floating_point():
            first.requires_grad_()
        y, stats = call(self.case, self.module, first, arguments(self.case, arrays, torch_ref.Randomness))
        weighed = (y * torch.from_numpy(probe).to(y.dtype)).sum()
        loss = None if stats is None else total_loss(self.case, stats, torch_ref.losses.pool_balance_loss)
        return y, stats, weighed, loss, first if first.requires_grad else None

    def run(self, given: Arrays) -> Outcome:
        """The outcome under the case's first probe."""
        case = self.case
        y, stats, weighed, loss, x = self.losses(given, probe(case, output_shape(case)))
        outcome = Outcome(forward={"y": array(y)}, parameter_gradients=self._gradients(weighed, x))
        if x is not None:
            outcome.input_gradient = {"x": outcome.parameter_gradients.pop("x")}
        if stats is not None:
            outcome.statistics = statistics(case, stats, array)
            outcome.statistics["pooled_balance_loss"] = array(pooled_loss(case, stats, torch_ref.pool_balance_loss))
            outcome.loss_gradients = self._gradients(loss, x)
        if isinstance(case.config, MoEConfig):
            arrays = torch_arrays(given, self.dtype)
            routed = self.module.run(arrays["x_BTD"], **{key: arrays[key] for key in ROUTING if key in arrays})
            outcome.choices = {
                "expert": _tokens(case, routed.routing.expert_GSK),
                "slot": _tokens(case, routed.slots.slot_GSK),
            }
        return outcome

    def _gradients(self, loss: torch.Tensor, x: torch.Tensor | None) -> Arrays:
        wanted = dict(self.module.named_parameters()) | ({} if x is None else {"x": x})
        found = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True, allow_unused=True)
        pairs = zip(wanted.items(), found, strict=True)
        return {name: array(torch.zeros_like(value) if grad is None else grad) for (name, value), grad in pairs}


@dataclass
class Pair:
    """Both sides of a case in a dtype, and their outcomes on the case's inputs."""

    case: Case
    dtype: str
    inputs: Arrays
    jax: JaxSide
    torch: TorchSide

    @functools.cached_property
    def jax_outcome(self) -> Outcome:
        return self.jax.run(self.inputs)

    @functools.cached_property
    def torch_outcome(self) -> Outcome:
        return self.torch.run(self.inputs)


def smallest(case: Case, dtype: str) -> Case:
    """The row as it is where its dispatcher is what is checked; else a dropless layer by einsums, a third of the
    grouped program.
    """
    moe = case.config
    own = stands_for(case, kind_of_program) or (dtype == "float64" and stands_for(case, kind_of_dispatch))
    if own or not isinstance(moe, MoEConfig) or moe.dispatcher != "auto" or moe.capacity is not None:
        return case
    return dataclasses.replace(case, config=dataclasses.replace(moe, dispatcher="einsum"))


def make_pair(case: Case, dtype: str, rounded: bool = False) -> Pair:
    """Both sides with identical weights."""
    ours = JaxSide(smallest(case, dtype), dtype, rounded)
    with precision(dtype):
        weights = jax_moe.to_torch(ours.module)
    return Pair(case, dtype, case_inputs(case, rounded), ours, TorchSide(case, dtype, weights))
