"""The columns: what is compared of one model type, on both shapes, and what is measured."""

import functools
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import jax_moe
import torch_ref
from jax_moe.config import MoEConfig
from jax_moe.config.as_json import config_from_json, config_to_json
from jax_moe.porting.families import mixture_of
from jax_moe.porting.mixture import open_mixtures
from jax_moe.porting.state_dict import abstract_module
from jax_moe.stored import stored_state
from parity_tests.families.cases import Case
from parity_tests.families.reference import (
    Answer,
    Layer,
    as_file,
    balance_loss,
    configuration,
    inputs,
    make_layer,
    run,
    save_model,
    without_spare,
)
from parity_tests.shared.compare import check_close, check_exact
from parity_tests.shared.quick import QUICK


@functools.cache
def graph(config: MoEConfig, dtype: str) -> Any:
    """The layer without its numbers."""
    return nnx.split(abstract_module(jax_moe.MoE, config, np.dtype(dtype)))[0]


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def ours(config: MoEConfig, dtype: str, weights: Any, read: dict[str, jax.Array], cotangent: jax.Array) -> Any:
    """Output, choices, balance loss; and the gradients of the weighted sum of the output."""

    def loss(weights: Any, read: dict[str, jax.Array]) -> Any:
        output = nnx.merge(graph(config, dtype), weights).run(read["x"], router_state_BTI=read.get("state"))
        chosen = jnp.sort(output.routing.expert_GSK.reshape(-1, config.top_k), axis=-1)
        state = () if "state" not in read else (output.router_state_BTI,)
        y = jnp.concatenate([output.y_BTD, *state], axis=-1)
        return (y * cotangent).sum(), (y, chosen, output.stats.load_balance_loss)

    (_, found), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, read)
    return *found, *gradients


class Runs:
    """A case on both sides, made when a column asks for it."""

    def __init__(self, case: Case, room: Path):
        self.case, self.room, self.family = case, room, mixture_of(case.model_type)
        assert self.family.mixture is not None
        self.disk, self.memory = self.family.mixture.on_disk, self.family.mixture.in_memory

    @functools.cache  # noqa: B019
    def contract(self, shape: int) -> MoEConfig:
        """As config.json says it."""
        return self.family.mixture_config(as_file(configuration(self.case, shape)), 1)

    @functools.cache  # noqa: B019
    def layer(self, shape: int, dtype: str) -> Layer:
        """The reference."""
        return make_layer(self.case, shape, dtype)

    @functools.cache  # noqa: B019
    def theirs(self, shape: int, dtype: str) -> Answer:
        """The reference's answer."""
        found = run(self.layer(shape, dtype), shape, dtype)
        E = self.contract(shape).num_experts
        assert len(np.unique(found.experts)) == E, f"{self.case.model_type}: some expert was never chosen"
        return found

    def moe(self, shape: int, dtype: str) -> jax_moe.MoE:
        """Our layer with the reference's weights."""
        config = replace(self.contract(shape), dispatcher="einsum")
        layer = self.layer(shape, dtype)
        state = layer.named((name, value.to(layer_dtype(value, dtype))) for name, value in layer.state_dict().items())
        with jax.enable_x64(dtype == "float64"):
            moe = abstract_module(jax_moe.MoE, config, np.dtype(dtype))
            return jax_moe.from_torch(moe, state, layout=self.memory.layer, cast=True)

    @functools.cache  # noqa: B019
    def ours(self, shape: int, dtype: str) -> tuple[Answer, float]:
        """Our answer, its gradients by their names on disk, and the balance loss."""
        moe = self.moe(shape, dtype)
        with jax.enable_x64(dtype == "float64"):
            read, cotangent = jax.tree.map(jnp.asarray, inputs(self.case, shape, dtype))
            y, experts, balance, gradients, of = ours(moe.config, dtype, stored_state(moe), read, cotangent)
            named = jax_moe.to_torch(moe, nnx.filter_state(gradients, nnx.Param), layout=self.disk.layer)
        named |= jax.tree.map(np.asarray, of)
        return Answer(np.asarray(experts), np.asarray(y), named, None), float(balance)

    def on_disk(self, shape: int, dtype: str) -> dict[str, np.ndarray]:
        """The reference's gradients by their names on disk."""
        gradients = dict(self.theirs(shape, dtype).gradients)
        of_inputs = {name: gradients.pop(name) for name in ("x", "state") if name in gradients}
        moe = self.moe(shape, dtype)
        with jax.enable_x64(dtype == "float64"):
            tree = jax_moe.from_torch_tree(moe, gradients, layout=self.memory.layer)
            return {**of_inputs, **jax_moe.to_torch(moe, tree, layout=self.disk.layer)}


def layer_dtype(value: torch.Tensor, dtype: str) -> torch.dtype:
    """Floats as `dtype`."""
    return getattr(torch, dtype) if value.is_floating_point() else value.dtype


def choices(runs: Runs) -> float:
    """The chosen experts of every token, in fp64 and fp32: exact."""
    for shape, dtype in RUNS:
        mine, theirs = runs.ours(shape, dtype)[0].experts, runs.theirs(shape, dtype).experts
        where = f"{runs.case.model_type}, shape {shape}, {dtype}"
        check_exact({"experts": mine}, {"experts": theirs.astype(mine.dtype)}, where)
    return 0.0


def output(runs: Runs, tolerance: float, dtype: str = "float64") -> float:
    """The answer."""
    where = f"{runs.case.model_type}: output"
    pairs = ((runs.ours(shape, dtype)[0].y, runs.theirs(shape, dtype).y) for shape in runs_in(dtype))
    return max(check_close({"y": mine}, {"y": theirs}, tolerance, where) for mine, theirs in pairs)


def gradients(runs: Runs, tolerance: float, dtype: str = "float64") -> float:
    """The gradient of the input and of every parameter, by its name on disk."""
    where = f"{runs.case.model_type}: gradients"
    pairs = ((runs.ours(shape, dtype)[0].gradients, runs.on_disk(shape, dtype)) for shape in runs_in(dtype))
    return max(check_close(mine, theirs, tolerance, where) for mine, theirs in pairs)


def in_torch(runs: Runs, tolerance: float) -> float:
    """`torch_ref` with the same weights by the same rows."""
    moe = runs.moe(1, "float64")
    layer = torch_ref.MoE(runs.contract(1)).double().eval()
    layer.load_state_dict({name: torch.from_numpy(np.asarray(v)) for name, v in jax_moe.to_torch(moe).items()})
    with torch.no_grad():
        read = {name: torch.from_numpy(value) for name, value in inputs(runs.case, 1, "float64")[0].items()}
        found = layer.run(read["x"], router_state_BTI=read.get("state"))
        y = torch.cat([found.y_BTD, *([found.router_state_BTI] if "state" in read else [])], dim=-1).numpy()
    return check_close({"y": y}, {"y": runs.theirs(1, "float64").y}, tolerance, f"{runs.case.model_type}: torch_ref")


def balance(runs: Runs, tolerance: float) -> float:
    """The balance loss of one layer, as transformers counts it."""
    errors = []
    for shape in (0, 1):
        logits = runs.theirs(shape, "float64").logits
        assert logits is not None
        expected = balance_loss(runs.case, logits, shape, runs.contract(shape).top_k)
        found = {"balance": np.float64(runs.ours(shape, "float64")[1])}
        where = f"{runs.case.model_type}: balance loss"
        errors.append(check_close(found, {"balance": np.float64(expected)}, tolerance, where))
    return max(errors)


def round_trip(runs: Runs) -> float:
    """The contract to config.json and back; the weights to their names on disk and back, bit for bit."""
    for shape in (0, 1):
        contract, mixture = runs.contract(shape), runs.family.mixture
        assert mixture is not None
        in_own_folder = json.loads(json.dumps(config_to_json(contract)))
        assert config_from_json(MoEConfig, in_own_folder, "config") == contract, f"{runs.case.model_type}: as JSON"
        values = {**mixture.write(contract), "model_type": runs.case.model_type}
        for word in reversed(mixture.types.get(runs.case.model_type, "").split(".")):
            if not word:
                continue
            values = {word: values, "model_type": runs.case.model_type}
        again = runs.family.mixture_config(values, 1)
        assert again == contract, f"{runs.case.model_type}: {again} is not {contract}"
        layer = runs.layer(shape, "float32")
        state = {name: value.numpy() for name, value in layer.named(layer.state_dict().items()).items()}
        moe = runs.moe(shape, "float32")
        written = jax_moe.to_torch(moe, layout=runs.disk.layer)
        other = jax_moe.from_torch(jax_moe.MoE(moe.config), written, layout=runs.disk.layer)
        check_exact(jax_moe.to_torch(other, layout=runs.memory.layer), state, f"{runs.case.model_type}: round trip")
    return 0.0


def folder(runs: Runs) -> float:
    """What the model's own save_pretrained wrote: read to the module's weights, bit for bit, and put back the same."""
    place, where = runs.room / runs.case.model_type, f"{runs.case.model_type}: a folder"
    model = save_model(runs.case, place)
    found = open_mixtures(place)
    assert found.layers == jax_moe.moe_layers(place)
    last = {found.placed(layer)[0]: layer for layer in found.layers}
    assert len(last) == len(found.stacks), f"{where}: a stack without a mixture"
    for layer in last.values():
        one_layer(runs, model, place, layer, where)
    return 0.0


def one_layer(runs: Runs, model: Any, place: Path, layer: int, where: str) -> None:
    """Raises unless the folder's layer is read to the model's weights, and put back the same."""
    moe, (stack, number) = jax_moe.load_moe(place, layer), open_mixtures(place).placed(layer)
    whole = without_spare(runs.case, {name: value.numpy() for name, value in model.state_dict().items()})
    mixture = runs.family.mixture
    assert mixture is not None
    within = (runs.memory.within if stack is None else stack.within).format(l=number)
    for root in mixture.roots:
        prefix = within.replace("model.", root, 1) if within.startswith("model.") else within
        written = {f"{prefix}{name}": value for name, value in jax_moe.to_torch(moe, layout=runs.memory.layer).items()}
        if written.keys() <= whole.keys():
            break
    check_exact(written, {name: whole[name] for name in written if name in whole}, where)
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    jax_moe.save_moe(moe, place, layer)
    assert before == {file.name: file.read_bytes() for file in place.iterdir()}, f"{where}: put back"


RUNS = ((0, "float64"), (1, "float64"), (1, "float32"))


def runs_in(dtype: str) -> list[int]:
    """The shapes that are run in it."""
    return [shape for shape, name in RUNS if name == dtype]


@dataclass(frozen=True)
class Column:
    """One check: its name, how it measures, and the most it may measure; `lacks` says in words why a type has none."""

    name: str
    limit: float
    measure: Callable[..., float]
    lacks: Callable[[Case], str] = lambda case: ""

    def __call__(self, runs: Runs) -> float:
        """The measured error. Raises MismatchError if it is above the limit."""
        return self.measure(runs, self.limit) if self.limit else self.measure(runs)


def no_model(case: Case) -> str:
    """Why the folder of a whole model is not written."""
    return "" if case.model else case.reason or "no whole model is made"


def no_balance(case: Case) -> str:
    """Why a balance loss is not compared."""
    if case.balance:
        return ""
    named = f"transformers.models.{case.model_type}.modeling_{case.model_type}"
    spec = importlib.util.find_spec(named)
    assert spec is not None and spec.origin is not None
    has = "def load_balancing_loss_func" in Path(spec.origin).read_text(encoding="utf-8")
    return "not yet: transformers counts the best logits, not the choices" if has else "transformers has none"


COLUMNS = (
    Column("choices", 0, choices),
    Column("output fp64", 6e-15, output),  # measured: 1.4e-15
    Column("gradients fp64", 1e-14, gradients),  # measured: 6.4e-15
    Column("output fp32", 3e-6, functools.partial(output, dtype="float32")),  # measured: 4.7e-7
    Column("gradients fp32", 8e-6, functools.partial(gradients, dtype="float32")),  # measured: 1.7e-6
    Column("torch_ref fp64", 4e-15, in_torch),  # measured: 4.9e-16
    Column("balance loss", 3e-15, balance, no_balance),  # measured: 3.5e-16
    Column("round trip", 0, round_trip),
    Column("own folder", 0, folder, no_model),
)
