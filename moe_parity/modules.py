"""A user's own PyTorch module against the user's own Flax module or JAX function: outputs and every gradient, by name.

`ours` is the JAX side, `theirs` the PyTorch side. PyTorch is imported only when a comparison runs.
"""

from collections import defaultdict
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
from moe_parity.relative import norm
from moe_parity.stages import SMALL, Stage, StageResult, first_divergence, judge

# By the parameters' dtype; the error of an output is relative to its largest value, that of a gradient by norm.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}


class ModulesDifferError(AssertionError):
    """The two modules disagree: `report` holds every comparison, the message names the first failure."""

    def __init__(self, report: "ModuleReport"):
        super().__init__(report.sentence())
        self.report = report


@dataclass(frozen=True)
class ModuleReport:
    """Every comparison: outputs, then gradients of inputs, then gradients of parameters by their PyTorch names."""

    results: tuple[StageResult, ...]

    @property
    def passed(self) -> bool:
        """Whether everything is within tolerance."""
        return first_divergence(self.results) is None

    def sentence(self) -> str:
        """The first failure, or the largest error if there is no failure."""
        first, count = first_divergence(self.results), len(self.results)
        if first is None:
            worst = max(self.results, key=lambda result: result.error)
            allowed = f"error {worst.error:.2g} where {worst.tolerance:.0e} is allowed"
            return f"all {count} comparisons agree; the largest error is that of {worst.name}, {allowed}"
        others = sum(not result.passed for result in self.results) - 1
        more = f"{others} of the other {count - 1} comparisons fail too" if others else f"the other {count - 1} agree"
        return f"{first.name}: error {first.error:.2g} where {first.tolerance:.0e} is allowed ({first.where}); {more}"

    def __str__(self) -> str:
        lines = [
            f"{'ok' if result.passed else 'FAILED':7}{result.error:9.1e} of {result.tolerance:7.0e}  {result.name}"
            for result in self.results
        ]
        return "\n".join([*lines, self.sentence()])


def compare_modules(
    theirs: Any, ours: Any, mapping: Mapping[str, Any], inputs: Any, *, params: Any = None,
    tolerance: float | None = None, copy_weights: bool = True, fail: bool = True, seed: int = 0,
) -> ModuleReport:
    """Runs both modules on the same inputs, forward and backward, and compares outputs and every gradient.

    `theirs` is a torch.nn.Module; `ours` is an nnx module or, with `params` (a nested dict), a function
    `ours(params, *inputs)`. `mapping` gives for each name of the PyTorch state dict the JAX path, or (path, transform),
    or a list of those if the tensor becomes several JAX arrays; `stacked(path, i)` if several tensors become one JAX
    array; None for a buffer that JAX does not have.
    `inputs` is an array or a tuple of arrays; each array of floats gets a gradient. Each side returns an array, or a
    tuple, list or dict of arrays. The gradients are those of the sum of all outputs times the same random numbers.

    With `copy_weights` the JAX module runs on the PyTorch weights; without, on its own, which are compared first.
    Raises ValueError for inputs that are not arrays of numbers or are empty, for names that the mapping leaves out on
    either side (all at once), and for shapes that do not fit.
    Raises ModulesDifferError with the report if something is beyond `tolerance` (default: `TOLERANCE` by the dtype of
    the PyTorch parameters); with `fail=False` the report is returned in any case. The caller sets the mode of both
    modules: call `eval()` to turn dropout off.

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
    >>> report.passed, [result.name for result in report.results]
    (True, ['output', 'gradient of input 0', 'gradient of 0.weight', 'gradient of 0.bias', 'gradient of 2.weight'])
    """
    torch = import_torch("compare_modules")
    given = _checked_inputs(inputs if isinstance(inputs, tuple | list) else (inputs,))
    table = {name: entries_of(value) for name, value in mapping.items()}
    state = {name: tensor_to_numpy(value) for name, value in theirs.state_dict().items()}
    function, held = _as_function(ours, params)
    check_names(table, set(state), {name for name, _ in theirs.named_parameters()}, set(held))
    dtype = next((str(value.dtype) for value in state.values() if value.dtype.kind not in "iub"), "float32")
    allowed = f"given for parameters of {dtype}; there is a default for {', '.join(TOLERANCE)}"
    require(tolerance is not None or dtype in TOLERANCE, "tolerance", tolerance, allowed)
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    with jax.enable_x64(dtype == "float64" or any(value.dtype == np.float64 for value in given)):
        expected_weights = our_weights(table, state, {path: value.shape for path, value in held.items()})
        weights = expected_weights if copy_weights else held
        stages = [] if copy_weights else [
            Stage(f"weight {path}", None, "weight", _wide(weights[path]), _wide(value), limit)
            for path, value in expected_weights.items()
        ]
        expected = _run_torch(torch, theirs, given, seed)
        on_device = {path: jnp.asarray(value) for path, value in weights.items()}
        actual = _run_jax(function, on_device, given, expected.cotangents)
        stages += _stages(actual, expected, table, limit)
    report = ModuleReport(tuple(judge(stage) for stage in stages))
    if fail and not report.passed:
        raise ModulesDifferError(report)
    return report


def _checked_inputs(inputs: Sequence[Any]) -> tuple[np.ndarray, ...]:
    """The inputs as numpy arrays. Raises ValueError for anything but arrays of numbers, and for an empty array."""
    given = []
    for i, array in enumerate(inputs):
        kind, is_array = type_name(array), hasattr(array, "dtype") and hasattr(array, "shape")
        allowed = "an array; np.asarray([...]) of a list, and a tuple of arrays for several inputs"
        require(is_array, f"inputs[{i}]", kind, allowed)
        value = tensor_to_numpy(array) if kind.startswith("torch.") else np.asarray(array)
        numbers = value.dtype.kind in "biuf" or value.dtype.name in TOLERANCE
        require(numbers, f"inputs[{i}].dtype", str(value.dtype), "of numbers or booleans")
        require(value.size > 0, f"inputs[{i}].shape", value.shape, "of at least one number: empty arrays always agree")
        given.append(value)
    require(bool(given), "inputs", (), "at least one array")
    return tuple(given)


@dataclass(frozen=True)
class _Run:
    """What one side computed: outputs by name, gradients of inputs by position, of parameters by that side's names."""

    outputs: dict[str, np.ndarray]
    inputs: dict[int, np.ndarray]
    parameters: dict[str, np.ndarray]
    cotangents: dict[str, np.ndarray]


def _as_function(ours: Any, params: Any) -> tuple[Callable, dict[str, np.ndarray]]:
    """(function of {path: array} and the inputs, its present weights by path)."""
    if params is not None:
        leaves, structure = jax.tree_util.tree_flatten(params)
        names = list(flatten(params))
        assert len(names) == len(leaves)
        rebuilt = lambda weights: jax.tree_util.tree_unflatten(  # noqa: E731
            structure, [weights[name] for name in names]
        )
        return lambda weights, *inputs: ours(rebuilt(weights), *inputs), flatten(params)
    if not isinstance(ours, nnx.Module):
        raise ValueError(f"ours={type(ours).__name__}: must be an nnx module, or a function together with params=")
    graphdef, state = nnx.split(ours)
    flat = {".".join(map(str, keys)): (keys, leaf) for keys, leaf in nnx.to_flat_state(state)}
    held = {path: pair for path, pair in flat.items() if not isinstance(pair[1], nnx.RngState)}  # not dropout's keys

    def run(weights: Mapping[str, Any], *inputs: Any) -> Any:
        leaves = [(keys, leaf.replace(weights[path]) if path in held else leaf) for path, (keys, leaf) in flat.items()]
        return nnx.merge(graphdef, nnx.from_flat_state(leaves))(*inputs)

    return run, {path: np.asarray(leaf[...]) for path, (_, leaf) in held.items()}


def _named(outputs: Any) -> dict[str, Any]:
    """The outputs of a side by name: the keys of a dict, the positions of a sequence."""
    if isinstance(outputs, Mapping):
        return {f"output {name}": value for name, value in outputs.items()}
    if isinstance(outputs, tuple | list):
        return {f"output {i}": value for i, value in enumerate(outputs) if value is not None}
    return {"output": outputs}


def _run_torch(torch: Any, module: Any, given: Sequence[np.ndarray], seed: int) -> _Run:
    """The PyTorch side, in the module's own mode and on its device; the module's `grad` fields are left alone."""
    parameters = dict(module.named_parameters())
    device = next((value.device for value in module.parameters()), None)
    tensors = [numpy_to_tensor(value).to(device) for value in given]
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
    wanted = {**{f"input {i}": tensor for i, tensor in enumerate(tensors) if tensor.requires_grad}, **parameters}
    wanted = {name: value for name, value in wanted.items() if value.requires_grad}
    found = torch.autograd.grad(sum(weighed), list(wanted.values()), allow_unused=True) if weighed and wanted else ()
    gradients = {
        name: tensor_to_numpy(torch.zeros_like(value) if gradient is None else gradient)
        for (name, value), gradient in zip(wanted.items(), found, strict=True)
    }
    inputs = {i: gradients.pop(f"input {i}") for i in range(len(given)) if f"input {i}" in gradients}
    return _Run({name: tensor_to_numpy(value) for name, value in outputs.items()}, inputs, gradients, cotangents)


def _run_jax(
    function: Callable, weights: dict[str, Any], given: Sequence[np.ndarray], cotangents: dict[str, np.ndarray]
) -> _Run:
    """The JAX side, with the cotangents of the PyTorch side."""
    floats = {i: jnp.asarray(value) for i, value in enumerate(given) if value.dtype.kind not in "iub"}
    trained = {path: value for path, value in weights.items() if jnp.issubdtype(value.dtype, jnp.floating)}

    def weighed(trained: dict[str, Any], floats: dict[int, Any]) -> tuple[Any, Any]:
        inputs = [floats.get(i, jnp.asarray(value)) for i, value in enumerate(given)]
        outputs = _named(function({**weights, **trained}, *inputs))
        terms = [
            (value * jnp.asarray(cotangents[name], value.dtype)).sum() for name, value in outputs.items()
            if jnp.issubdtype(value.dtype, jnp.floating)
            and name in cotangents and cotangents[name].shape == value.shape
        ]
        return sum(terms, start=jnp.zeros(())), outputs

    with jax.default_matmul_precision("highest"):
        (parameters, inputs), outputs = jax.jit(jax.grad(weighed, argnums=(0, 1), has_aux=True))(trained, floats)
    as_numpy = lambda values: {name: np.asarray(value) for name, value in values.items()}  # noqa: E731
    return _Run(as_numpy(outputs), as_numpy(inputs), as_numpy(parameters), cotangents)


def _stages(ours: _Run, theirs: _Run, table: Mapping[str, list[Entry]], limit: float) -> list[Stage]:
    """Outputs, gradients of inputs, gradients of parameters; an output that one side lacks is an empty array there."""
    our_outputs, their_outputs = (defaultdict(lambda: np.zeros(0), side.outputs) for side in (ours, theirs))
    stages = [
        Stage(name, None, "output", _wide(our_outputs[name]), _wide(their_outputs[name]), limit)
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
    """bf16 as fp32: numpy has no arithmetic for bf16."""
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value
