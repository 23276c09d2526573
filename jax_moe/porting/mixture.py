"""The mixture of one layer, from a Hugging Face folder and back into it: of every model type whose mixture is known.

Only config.json and the files that hold the layer's tensors are opened.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_moe.arrays import check_choices
from jax_moe.config.checks import is_int, shorten
from jax_moe.config.moe import MoEConfig
from jax_moe.disk import check_space, same_bits, writing
from jax_moe.guarded import read_object
from jax_moe.moe import MoE
from jax_moe.parameters import declared
from jax_moe.porting.errors import PortError
from jax_moe.porting.families import mixture_of
from jax_moe.porting.families.family import Family, Names, Stack
from jax_moe.porting.formats.hf_folder import check_weights_name, is_hf
from jax_moe.porting.formats.quantised import Scheme, parts_of, read_scheme
from jax_moe.porting.formats.safetensors import copy_with
from jax_moe.porting.formats.shards import open_tensors, tensor_files
from jax_moe.porting.pretrained import float_dtype
from jax_moe.porting.state_dict import abstract_module
from jax_moe.porting.table.arrays import place_all, theirs_from
from jax_moe.porting.table.plan import Plan, check, make_plan
from jax_moe.porting.table.rows import Table, under
from jax_moe.porting.tensors import Header
from jax_moe.sharding.mesh import mesh_in_use
from jax_moe.stored import kept_paths, stored_state, stored_variables

TABLE = "router.expert_table"
Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class Mixtures:
    """A folder whose layers' mixtures can be read: config.json and the names of its tensors, no weight."""

    path: Path
    family: Family
    values: dict[str, Any]  # of config.json
    text: dict[str, Any]  # the text model's settings among them
    files: dict[str, str]  # {stored tensor: file}
    scheme: Scheme | None  # how they are quantised
    tensors: dict[str, dict[str, str]]  # {tensor: {part: stored tensor}}

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers that have a mixture, those of multi-token prediction left out.

        The layers of a second stack, such as a decoder's after an encoder's, are numbered on.
        """
        found, before = list[int](), 0
        for stack, count in self.stacks:
            patterns = self._patterns("experts.", stack)
            numbers = {int(m[1]) for pattern in patterns for name in self.tensors if (m := pattern.match(name))}
            found += sorted(before + i for i in numbers if count is None or i < count)
            before += count or 0
        return tuple(found)

    @property
    def stacks(self) -> list[tuple[Stack | None, int | None]]:
        """The stacks of layers, None for the only one, each with its number of layers where config.json says it.

        Raises ValueError where a model of several does not say it.
        """
        mixture, found = self.family.mixture, list[tuple[Stack | None, int | None]]()
        assert mixture is not None
        for stack in mixture.stacks or (None,):
            names = ("num_hidden_layers",) if stack is None else stack.count
            count: Any = next((self.text[name] for name in names if self.text.get(name) is not None), None)
            if stack is not None and not (is_int(count) and count >= 0):
                said = f"{names[0]}={shorten(repr(count))}: must be a number of layers"
                raise ValueError(f"{self.path / 'config.json'}: {said}")
            found.append((stack, count if is_int(count) else None))
        return found

    def placed(self, layer: int) -> tuple[Stack | None, int]:
        """The stack of a layer, and its number there."""
        for stack, count in self.stacks[:-1]:
            if layer < (count or 0):
                return stack, layer
            layer -= count or 0
        return self.stacks[-1][0], layer

    @property
    def in_words(self) -> str:
        """The numbers of the layers that have a mixture; of several stacks, whose they are, and their numbers there."""
        found: dict[str, list[tuple[int, int]]] = {}
        for layer in self.layers:
            stack, number = self.placed(layer)
            found.setdefault("" if stack is None else stack.name, []).append((layer, number))
        parts = []
        for name, pairs in found.items():
            numbers, own = (", ".join(map(str, each)) for each in zip(*pairs, strict=True))
            parts.append(f"{numbers} (the {name}'s {own})" if name else numbers)
        return ", ".join(parts)

    def config(self, layer: int) -> MoEConfig:
        """The contract of the layer's mixture. Raises ValueError if it has none, or for an unsupported setting."""
        if layer not in self.layers:
            count = sum(number or 0 for _, number in self.stacks)
            dense = f"; layer {layer} has no mixture" if is_int(layer) and 0 <= layer < count else ""
            none = f"a layer with experts: no names here are those of {self.family.name}"
            listed = self.in_words or none
            raise ValueError(f"{self.path}: layer={layer!r}: must be one of {listed}{dense}")
        try:
            stack, number = self.placed(layer)
            return self.family.mixture_config(self.values, number, stack)
        except ValueError as error:
            raise ValueError(f"{self.path / 'config.json'}: {error}") from None

    def plan(self, layer: int, config: MoEConfig, there: Mapping[str, Header]) -> Plan:
        """How the layer's tensors and ours go together, by the names and shapes nearest to those that are there."""
        ours = declared(abstract_module(MoE, config, np.dtype(np.float32)))
        tables = (Table(names.layer, under(names.rows, within, "")) for within, names in self._sides(layer))

        def distance(plan: Plan) -> tuple[int, int]:
            shapes = (there[name].shape != shape for name, shape in plan.their_shapes.items() if name in there)
            return len(plan.names ^ there.keys()), sum(shapes)

        return min((make_plan(table, ours) for table in tables), key=distance)

    def names(self, layer: int, config: MoEConfig) -> set[str]:
        """The tensors of the layer's mixture; where it is a module of its own, all that are in that module but those
        that the family leaves alone.
        """
        mixture = self.family.mixture
        assert mixture is not None
        found: set[str] = set()
        for within, names in self._sides(layer):
            own = {re.match(r"[^.]*", row.theirs)[0] for row in names.rows}  # type: ignore[index]
            whole = not names.within.endswith("layers.{l}.")
            below = ((name, name.removeprefix(within)) for name in self.tensors if name.startswith(within))
            inside = ((name, rest) for name, rest in below if whole or rest.partition(".")[0] in own)
            found |= {name for name, rest in inside if not mixture.is_beside(rest, config)}
        return found

    def headers(self, layer: int, config: MoEConfig) -> dict[str, Header]:
        """The layer's tensors, to be read: no other file is opened."""
        stored = {part for name in self.names(layer, config) for part in self.tensors[name].values()}
        sides = self._sides(layer)
        tables = {within + row.theirs for within, names in sides for row in names.rows if row.ours == TABLE}
        return open_tensors(self.path, self.files, stored, self.scheme, tables)

    def _sides(self, layer: int) -> list[tuple[str, Names]]:
        mixture = self.family.mixture
        assert mixture is not None
        sides = (mixture.on_disk, mixture.in_memory)
        stack, number = self.placed(layer)
        return [(within.format(l=number), names) for names in sides for within in self._within(names, stack)]

    def _within(self, names: Names, stack: Stack | None) -> list[str]:
        """Where such a module may stand, the layer's number left open."""
        assert self.family.mixture is not None
        within = names.within if stack is None else stack.within
        rest = within.removeprefix("model.")
        return [root + rest for root in (self.family.mixture.roots if rest != within else ("",))]

    def _patterns(self, ours: str, stack: Stack | None) -> list[re.Pattern[str]]:
        """Of the tensors that hold our paths which begin so, the layer's number as a group."""
        assert self.family.mixture is not None
        found = []
        for names in (self.family.mixture.on_disk, self.family.mixture.in_memory):
            for row in names.rows:
                for within in self._within(names, stack) if row.ours.startswith(ours) else ():
                    name = re.escape(within + row.theirs).replace(r"\{l\}", r"(\d+)").replace(r"\{e\}", r"\d+")
                    found.append(re.compile(name + "$"))
        return found


def open_mixtures(directory: Folder, values: Mapping[str, Any] | None = None) -> Mixtures:
    """The mixtures of a folder; `values` is its config.json, if that was read. Raises ValueError for an unknown model
    type, before any weight is read.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ValueError(f"{path}: must be a folder" if path.exists() else f"{path}: no such folder")
    try:
        values = read_object(path / "config.json") if values is None else dict(values)
    except FileNotFoundError:
        raise ValueError(f"{path}: must be a checkpoint folder, has no config.json") from None
    try:
        family = mixture_of(values.get("model_type"))
        check_weights_name(values)
        text = family.text_settings(values)
        scheme = read_scheme({**values, **text})
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    files = tensor_files(path)
    return Mixtures(path, family, values, text, files, scheme, parts_of(scheme, files))


def moe_layers(directory: Folder) -> tuple[int, ...]:
    """The numbers of the layers that have a mixture of experts; a decoder's after an encoder's are numbered on.

    Raises ValueError for a folder of no known model type.
    """
    return open_mixtures(directory).layers


def load_moe(
    directory: Folder, layer: int, *, dtype: Any = None, mesh: Mesh | None = None, allow_nonfinite: bool = False
) -> MoE:
    """The mixture of one layer of a Hugging Face folder, with its shared experts; of other layers nothing is read.

    Weights keep the dtype they are stored in, unless `dtype` names another (a correction bias keeps its own all the
    same). On a `mesh` experts are split over its expert axis. Raises ValueError (PortError for weights) for a layer
    without a mixture, a setting that is not supported and tensors that are missing, too many, misshapen or not finite.
    """
    return read_mixture(open_mixtures(directory), layer, dtype, mesh, allow_nonfinite)


def read_mixture(
    found: Mixtures, layer: int, dtype: Any = None, mesh: Mesh | None = None, allow_nonfinite: bool = False
) -> MoE:
    """As `load_moe`, of a folder that was opened."""
    target = None if dtype is None else float_dtype(dtype)
    config = found.config(layer)
    headers = found.headers(layer, config)
    plan = found.plan(layer, config, headers)
    where = f"{found.path}, layer {layer} (layout {plan.table.name})"
    check(plan, headers, where)
    moe = abstract_module(MoE, config, np.dtype(np.float32))
    arrays = place_all(plan, headers, target, mesh or mesh_in_use(), allow_nonfinite, where, kept_paths(moe))
    filled = [(keys, v.replace(arrays[".".join(map(str, keys))])) for keys, v in nnx.to_flat_state(stored_state(moe))]
    nnx.update(moe, nnx.from_flat_state(filled))
    if config.router.table_tokens and TABLE in arrays:
        try:
            check_choices("the table of tokens", arrays[TABLE], config.num_experts)
        except ValueError as error:
            raise PortError(where, wrong=[str(error)]) from None
    return moe


def save_moe(moe: MoE, directory: Folder, layer: int, *, cast: bool = False) -> None:
    """Puts a layer's weights back into the Hugging Face folder that they came from, or a copy of it.

    Whole or not at all. The folder's names, files and dtypes stay: the layer's tensors are replaced, under per-expert
    names or fused as they are there, all others keep their bits. `cast` converts to the folder's dtypes; without it a
    differing dtype is an error. A quantised tensor keeps its bits too; that its value changed is an error. Raises
    ValueError if config.json says another contract, or nothing can be written.
    """
    found = open_mixtures(directory)
    config = found.config(layer)
    if replace(moe.config, dispatcher=config.dispatcher) != config:
        unsaid = "; ".join(_differences(moe.config, config))
        raise ValueError(f"{found.path}, layer {layer}: {unsaid}, as the folder's config.json says")
    headers = found.headers(layer, config)
    plan = found.plan(layer, config, headers)
    check(plan, headers, f"{found.path}, layer {layer} (layout {plan.table.name})")
    theirs = theirs_from(plan, {path: v[...] for path, v in stored_variables(moe).items()})
    if not cast:
        pairs = {name: (theirs[name].dtype, header.dtype) for name, header in headers.items()}
        differing = {name: pair for name, pair in pairs.items() if {one.kind for one in pair} != {"i"}}  # no table
        wrong = [f"{name} is {mine}, must be {there}" for name, (mine, there) in differing.items() if mine != there]
        if wrong:
            raise PortError(f"{found.path}, layer {layer}", mistyped=wrong)
    written = {name: _as(theirs[name], header.dtype) for name, header in headers.items()}
    written |= {name: _beside(written[name], headers[name], plan, name) for name in plan.partial}
    quantised = [name for name, header in headers.items() if header.parts]
    changed = [name for name in quantised if not same_bits(written[name].read(), headers[name].read())]
    if changed and found.scheme is not None:
        wrong = [f"{name} has changed and is stored as {found.scheme.words}: must be plain" for name in changed]
        raise PortError(f"{found.path}, layer {layer}", wrong=wrong)
    _write(found, {name: header for name, header in written.items() if name not in quantised})


def _differences(one: Any, other: Any, part: str = "") -> list[str]:
    """Each field of a contract that is not as in the other."""
    found = []
    for name in (each.name for each in dataclasses.fields(one)):
        mine, wanted = getattr(one, name), getattr(other, name)
        if dataclasses.is_dataclass(mine) and dataclasses.is_dataclass(wanted):
            found += _differences(mine, wanted, f"{part}{name}.")
        elif mine != wanted and name != "dispatcher":
            found.append(f"{part}{name}={mine!r}: must be {wanted!r}")
    return found


def _as(header: Header, dtype: np.dtype) -> Header:
    return Header(header.shape, dtype, lambda: header.read().astype(dtype, copy=False))


def _beside(mine: Header, there: Header, plan: Plan, name: str) -> Header:
    """Our part of a tensor, and what else is in it."""
    return Header(mine.shape, mine.dtype, lambda: np.where(plan.held(name), mine.read(), there.read()))


def _write(found: Mixtures, changed: Mapping[str, Header]) -> None:
    """The folder again with some tensors changed: files that hold none of them are linked, not copied."""
    touched = {found.files[name] for name in changed}
    foreign = [file for file in sorted(touched) if not file.endswith(".safetensors")]
    if foreign:
        raise ValueError(f"{found.path}: {foreign[0]} holds the layer: must be a .safetensors file to be written")
    check_space(found.path, sum((found.path / file).stat().st_size for file in touched))
    with writing(found.path.resolve(), overwrite=True, replaceable=is_hf) as part:
        _linked(found.path.resolve(), part, touched)
        for file in sorted(touched):
            own = {name: header for name, header in changed.items() if found.files[name] == file}
            copy_with(found.path / file, part / file, own)


def _linked(source: Path, target: Path, without: set[str]) -> None:
    """A folder of the same files, each a link to the same bytes, but for some at its top."""
    target.mkdir()
    for entry in source.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            _linked(entry, target / entry.name, set())
        elif entry.name not in without:
            _link(entry, target / entry.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)
