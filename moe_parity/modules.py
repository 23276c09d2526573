"""A user's own PyTorch module against the user's own Flax module or JAX function: outputs and every gradient, by name.

PyTorch is imported when a comparison runs, never before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.config.checks import require
from jax_moe.porting.state_dict import flatten
from jax_moe.porting.torch_tensors import import_torch, numpy_to_tensor, tensor_to_numpy
from jax_moe.shapes import type_name
from moe_parity.mapping import Entry, check_names, entries_of, moved, our_weights
from moe_parity.stages import SMALL, Stage, StageResult, first_divergence, judge, norm

# By dtype of the parameters: outputs by their largest value, gradients by norm.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}


class ModulesDifferError(AssertionError):
    """The two modules do not agree; `report` says all, the message the first of it."""

    def __init__(self, report: "ModuleReport"):
        super().__init__(report.sentence())
        self.report = report


@dataclass(frozen=True)
class ModuleReport:
    """What was compared, in order: outputs, then gradients of inputs, then of parameters by their (PyTorch's) names."""

    results: tuple[StageResult, ...]

    @property
    def passed(self) -> bool:
        """Everything within tolerance."""
        return first_divergence(self.results) is None

    def sentence(self) -> str:
        """The first failure, or that there is none."""
        first, count = first_divergence(self.results), len(self.results)
        if first is None:
            worst = max(self.results, key=lambda one: one.error)
            return f"all {count} agree; the worst is {worst.name}, error {worst.error:.2g} where {worst.tolerance:.0e} is allowed"
        others = sum(not one.passed for one in self.results) - 1
        more = f"; {others} of the other {count - 1} fail too" if others else f"; the other {count - 1} agree"
        return f"{first.name}: error {first.error:.2g} where {first.tolerance:.0e} is allowed ({first.where}){more}"

    def __str__(self) -> str:
        lines = [
            f"{'ok' if one.passed else 'FAILED':7}{one.error:9.1e} of {one.tolerance:7.0e}  {one.name}" for one in self.results
        ]
        return "\n".join([*lines, self.sentence()])


def compare_modules(
    theirs: Any, ours: Any, mapping: Mapping[str, Any], inputs: Any, *, params: Any = None, tolerance: float | None = None,
    copy_weights: bool = True, fail: bool = True, seed: int = 0,
) -> ModuleReport:
    """Runs both on the same inputs, forward and backward, and compares outputs and every gradient.

    `theirs` is a torch.nn.Module; `ours` an nnx module, or with `params` (a nested dict) a function
    `ours(params, *inputs)`. `mapping` says of every name in their state dict where it is in ours: our path, or
    (our path, transform), or a list of those where one of theirs becomes several of ours; `stacked(path, i)` where
    several of theirs become one of ours; None for a buffer that ours does not have.
    `inputs` is an array or a tuple of arrays; those of floats get a gradient. Each side returns an array,
    or a tuple, list or dict of arrays; gradients are of all outputs weighed with the same random numbers.

    With `copy_weights` our module runs on their weights; without, on its own, and they are compared first.
    Raises ValueError for inputs that are no arrays of numbers or hold none, for names that the mapping leaves out on either
    side, all at once, and for shapes that do not fit.
    Raises ModulesDifferError with the report where something is beyond `tolerance` (default: `TOLERANCE` by the dtype of
    their parameters); with `fail=False` returns the report whatever it says. Modes are the caller's: call `eval()` to have
    dropout off.

    >>> import numpy as np, torch, jax
    >>> from flax import nnx
    >>> from moe_parity import compare_modules, transpose
    >>> class Ours(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, use_bias=False, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.down(jax.nn.gelu(self.up(x), approximate=False))
    >>> theirs = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4, bias=False))
    >>> mapping = {
    ...     "0.weight": ("up.kernel", transpose), "0.bias": "up.bias", "2.weight": ("down.kernel", transpose),
    ... }
    >>> x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    >>> report = compare_modules(theirs, Ours(nnx.Rngs(0)), mapping, x)
    >>> report.passed, [one.name for one in report.results]
    (True, ['output', 'gradient of input 0', 'gradient of 0.weight', 'gradient of 0.bias', 'gradient of 2.weight'])
    """
    torch = import_torch("compare_modules")
    given = _checked_inputs(inputs if isinstance(inputs, tuple | list) else (inputs,))
    table = {name: entries_of(value) for name, value in mapping.items()}
    state = {name: tensor_to_numpy(value) for name, value in theirs.state_dict().items()}
    function, held = _as_function(ours, params)
    check_names(table, set(state), {name for name, _ in theirs.named_parameters()}, set(held))
    dtype = next((str(value.dtype) for value in state.values() if value.dtype.kind not in "iub"), "float32")
    known = tolerance is not None or dtype in TOLERANCE
    require(known, "tolerance", tolerance, f"given for parameters of {dtype}; there is a default for {', '.join(TOLERANCE)}")
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    with jax.enable_x64(dtype == "float64" or any(one.dtype == np.float64 for one in given)):
        expected_weights = our_weights(table, state, {path: value.shape for path, value in held.items()})
        weights = expected_weights if copy_weights else held
        stages = [] if copy_weights else [
            Stage(f"weight {path}", None, "weight", _wide(weights[path]), _wide(value), limit)
            for path, value in expected_weights.items()
        ]
        expected = _run_torch(torch, theirs, given, seed)
        actual = _run_jax(function, {path: jnp.asarray(value) for path, value in weights.items()}, given, expected.cotangents)
        stages += _stages(actual, expected, table, limit)
    report = ModuleReport(tuple(judge(stage) for stage in stages))
    if fail and not report.passed:
        raise ModulesDifferError(report)
    return report


def _checked_inputs(inputs: Sequence[Any]) -> tuple[np.ndarray, ...]:
    """The inputs as numpy's. Raises ValueError for what is no array of numbers, or holds none: nothing is equal to nothing."""
    given = []
    for i, one in enumerate(inputs):
        array = hasattr(one, "dtype") and hasattr(one, "shape")
        kind = type_name(one)
        require(array, f"inputs[{i}]", kind, "an array; np.asarray([...]) of a list, and a tuple of arrays for several inputs")
        value = tensor_to_numpy(one) if kind.startswith("torch.") else np.asarray(one)
        numbers = value.dtype.kind in "biuf" or value.dtype.name in TOLERANCE
        require(numbers, f"inputs[{i}].dtype", str(value.dtype), "of numbers or booleans")
        require(value.size > 0, f"inputs[{i}].shape", value.shape, "of at least one number: nothing agrees with nothing")
        given.append(value)
    require(bool(given), "inputs", (), "at least one array")
    return tuple(given)


@dataclass(frozen=True)
class _Run:
    """One side's numbers: outputs by name, gradients of inputs by number, of parameters by that side's names."""

    outputs: dict[str, np.ndarray]
    inputs: dict[int, np.ndarray]
    parameters: dict[str, np.ndarray]
    cotangents: dict[str, np.ndarray]


def _as_function(ours: Any, params: Any) -> tuple[Callable, dict[str, np.ndarray]]:
    """(function of {path: array} and the inputs, its present weights)."""
    if params is not None:
        leaves, structure = jax.tree_util.tree_flatten(params)
        names = list(flatten(params))
        assert len(names) == len(leaves)
        rebuilt = lambda weights: jax.tree_util.tree_unflatten(structure, [weights[name] for name in names])  # noqa: E731
        return lambda weights, *inputs: ours(rebuilt(weights), *inputs), flatten(params)
    if not isinstance(ours, nnx.Module):
        raise ValueError(f"ours is a {type(ours).__name__}: must be an nnx module, or a function together with params=")
    graphdef, state = nnx.split(ours)
    flat = {".".join(map(str, keys)): (keys, leaf) for keys, leaf in nnx.to_flat_state(state)}
    held = {path: pair for path, pair in flat.items() if isinstance(pair[1], nnx.Param | nnx.BatchStat) or _is_array(pair[1])}

    def run(weights: Mapping[str, Any], *inputs: Any) -> Any:
        leaves = [(keys, leaf.replace(weights[path]) if path in held else leaf) for path, (keys, leaf) in flat.items()]
        return nnx.merge(graphdef, nnx.from_flat_state(leaves))(*inputs)

    return run, {path: np.asarray(leaf[...]) for path, (_, leaf) in held.items()}


def _is_array(leaf: Any) -> bool:
    """Whether a variable holds numbers to compare: random states of dropout are left alone."""
    return not isinstance(leaf, nnx.RngState)


def _named(outputs: Any) -> dict[str, Any]:
    """Outputs of either side by name: of a dict its keys, of a sequence its places."""
    if isinstance(outputs, Mapping):
        return {f"output {name}": value for name, value in outputs.items()}
    if isinstance(outputs, tuple | list):
        return {f"output {i}": value for i, value in enumerate(outputs) if value is not None}
    return {"output": outputs}


def _run_torch(torch: Any, module: Any, given: Sequence[np.ndarray], seed: int) -> _Run:
    """Their side, on the module's own mode and device; gradients it held before are put back."""
    parameters = dict(module.named_parameters())
    device = next((value.device for value in module.parameters()), None)
    tensors = [numpy_to_tensor(one).to(device) for one in given]
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.requires_grad_()
    outputs = _named(module(*tensors))
    generator = np.random.default_rng(seed)
    cotangents = {name: generator.normal(size=tuple(value.shape)) for name, value in outputs.items()}
    weighed = [
        (value * torch.from_numpy(cotangents[name]).to(value.dtype).to(value.device)).sum()
        for name, value in outputs.items() if value.is_floating_point() and value.requires_grad
    ]
    wanted = {**{f"input {i}": one for i, one in enumerate(tensors) if one.requires_grad}, **parameters}
    wanted = {name: value for name, value in wanted.items() if value.requires_grad}
    found = torch.autograd.grad(sum(weighed), list(wanted.values()), allow_unused=True) if weighed and wanted else ()
    gradients = {
        name: tensor_to_numpy(torch.zeros_like(value) if one is None else one)
        for (name, value), one in zip(wanted.items(), found, strict=True)
    }
    inputs = {i: gradients.pop(f"input {i}") for i in range(len(given)) if f"input {i}" in gradients}
    return _Run({name: tensor_to_numpy(value) for name, value in outputs.items()}, inputs, gradients, cotangents)


def _run_jax(function: Callable, weights: dict[str, Any], given: Sequence[np.ndarray], cotangents: dict[str, np.ndarray]) -> _Run:
    """Our side under the same weights of the outputs."""
    floats = {i: jnp.asarray(one) for i, one in enumerate(given) if one.dtype.kind not in "iub"}
    trained = {path: value for path, value in weights.items() if jnp.issubdtype(value.dtype, jnp.floating)}

    def weighed(trained: dict[str, Any], floats: dict[int, Any]) -> tuple[Any, Any]:
        inputs = [floats.get(i, jnp.asarray(one)) for i, one in enumerate(given)]
        outputs = _named(function({**weights, **trained}, *inputs))
        terms = [
            (value * jnp.asarray(cotangents[name], value.dtype)).sum() for name, value in outputs.items()
            if name in cotangents and cotangents[name].shape == value.shape and jnp.issubdtype(value.dtype, jnp.floating)
        ]
        return sum(terms, start=jnp.zeros(())), outputs

    with jax.default_matmul_precision("highest"):
        (parameters, inputs), outputs = jax.jit(jax.grad(weighed, argnums=(0, 1), has_aux=True))(trained, floats)
    as_numpy = lambda values: {name: np.asarray(value) for name, value in values.items()}  # noqa: E731
    return _Run(as_numpy(outputs), as_numpy(inputs), as_numpy(parameters), cotangents)


def _stages(ours: _Run, theirs: _Run, table: Mapping[str, list[Entry]], limit: float) -> list[Stage]:
    """Outputs, gradients of inputs, gradients of parameters; an output of one side alone has nothing on the other."""
    nothing = np.zeros(0)
    stages = [
        Stage(name, None, "output", _wide(ours.outputs.get(name, nothing)), _wide(theirs.outputs.get(name, nothing)), limit)
        for name in {**theirs.outputs, **ours.outputs}
    ]
    floor = SMALL * max((norm(value) for value in theirs.parameters.values()), default=0.0)
    stages += [
        Stage(f"gradient of input {i}", None, "gradient", _wide(ours.inputs[i]), _wide(value), limit, floor)
        for i, value in theirs.inputs.items()
    ]
    for name, value in theirs.parameters.items():
        for entry in table[name]:
            label = name if len(table[name]) == 1 else f"{name} ({entry.ours})"
            found = ours.parameters[entry.ours] if entry.place is None else ours.parameters[entry.ours][entry.place]
            target = _wide(moved(entry, value, name))
            stages.append(Stage(f"gradient of {label}", None, "gradient", _wide(found), target, limit, floor))
    return stages


def _wide(value: np.ndarray) -> np.ndarray:
    """bf16 has no comparison of its own in numpy: as fp32."""
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value
