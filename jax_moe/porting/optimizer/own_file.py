"""`optimizer.safetensors` beside weights in our layout: moments named by torch's key and our path.

An example is `exp_avg.blocks.moe.experts.up`. The metadata hold hyperparameters, step count and the order of the
parameters. If experts have step counts of their own, because in some steps they had no tokens, these are
`step.blocks.moe.experts` [*L, E].
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optax
from flax import nnx

from jax_moe.config.checks import shorten
from jax_moe.disk import verify
from jax_moe.guarded import parse_json
from jax_moe.porting.formats.judged import check_optimizer
from jax_moe.porting.formats.own_folder import OPTIMIZER as FILE
from jax_moe.porting.formats.safetensors import read_safetensors, write_safetensors
from jax_moe.porting.optimizer.groups import check_groups
from jax_moe.porting.optimizer.optax_state import fill
from jax_moe.porting.optimizer.state import Moments
from jax_moe.porting.optimizer.step_counts import counts_of, own_steps_of
from jax_moe.porting.state_dict import flatten, from_torch_tree, to_torch, tree_plan

MOST_PLAIN = 1_000_000  # values within a plain value
KEY = "optimizer"  # in the metadata
COUNTS = "step."  # prefix of the path of experts with step counts of their own


@dataclass(frozen=True)
class Optimizer:
    """An optimizer's state by torch's names, and the rest of torch's file."""

    moments: Moments
    groups: list[dict[str, Any]]  # torch's param_groups
    order: list[str]  # the parameters' names, in the order in which the groups number them
    others: dict[str, Any]  # other entries of the file that JSON can hold

    def in_words(self) -> str:
        """A description of what is ported."""
        after = "" if self.moments.step is None else f" after {self.moments.step:,} steps"
        own = self.moments.own_steps.values()
        fewer = f" ({min(own):,} to {max(own):,} where experts had no tokens)" if own and after else ""
        return f"optimizer state ({' and '.join(self.moments.arrays) or 'no moments yet'}){after}{fewer}"


def load_optimizer(
    directory: str | os.PathLike[str], state: optax.OptState, *, step: int | None = None
) -> optax.OptState:
    """`state`, the result of the optax optimizer's `init`, filled with what `jax-moe port` wrote into a folder.

    `step`, groups and step counts of experts as in `optimizer_from_torch`. Raises ValueError with everything that does
    not fit.
    """
    file = Path(directory) / FILE
    arrays, about = _read(file)
    trees = {word: _behind(f"{word}.", arrays) for word in about["words"]}
    try:
        check_groups(about["groups"], state)
        return fill(state, trees, step if about["step"] is None else about["step"], _behind(COUNTS, arrays))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def write_optimizer(file: Path, optimizer: Optimizer, module: nnx.Module, layout: str) -> None:
    """Writes the file. Raises ValueError unless it reads back bit for bit."""
    moments = optimizer.moments
    arrays = {
        f"{word}.{name}": value for word, named in moments.arrays.items()
        for name, value in flatten(from_torch_tree(module, named, layout=layout)).items()
    }
    counts = counts_of(tree_plan(module, layout=layout), moments.own_steps, _most(moments.step))
    arrays |= {f"{COUNTS}{path}": value for path, value in counts.items()}
    about = {
        "step": moments.step, "step_dtype": moments.step_dtype, "groups": optimizer.groups, "order": optimizer.order,
        "others": optimizer.others, "words": list(moments.arrays),
    }
    write_safetensors(file, arrays, {KEY: json.dumps(about)})
    verify(arrays, read_safetensors(file), file)


def read_optimizer(file: Path, module: nnx.Module, layout: str) -> Optimizer:
    """The reverse of `write_optimizer`. Raises ValueError with everything that does not fit the module."""
    arrays, about = _read(file)
    names = parameters(module, layout)
    try:
        odd = [name for name in arrays if name.split(".")[0] not in (*about["words"], "step")]
        if odd or set(about["order"]) != names:
            wrong = ", ".join(odd[:5]) or "order"
            raise ValueError(f"must hold {' and '.join(about['words'])} of the model's parameters; not so: {wrong}")
        moments = {word: to_torch(module, _behind(f"{word}.", arrays), layout=layout) for word in about["words"]}
        counts = _behind(COUNTS, arrays)
        own_steps = own_steps_of(tree_plan(module, layout=layout), counts, _most(about["step"]))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    read = Moments(moments, about["step"], about["step_dtype"], own_steps)
    return Optimizer(read, about["groups"], about["order"], about["others"])


def _most(step: int | None) -> int:
    """The step count; 1 for SGD, which has no count: its experts have 1 with momentum and 0 without."""
    return 1 if step is None else step


def parameters(module: nnx.Module, layout: str) -> set[str]:
    """Torch's names of the trained parameters, without masks and buffers."""
    shapes = {".".join(map(str, keys)): np.broadcast_to(np.int8(0), v.shape) for keys, v in _params(module)}
    return set(to_torch(module, shapes, layout=layout))


def _params(module: nnx.Module) -> list[tuple[Any, Any]]:
    return list(nnx.to_flat_state(nnx.state(module, nnx.Param)))


def plain_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """torch's param_groups, unchanged. Raises ValueError for values that JSON cannot hold."""
    entries = [entry for group in groups for entry in group.items()]
    odd = [f"{key}={value!r:.40}" for key, value in entries if key != "betas" and not plain(value)]
    if odd:
        raise ValueError(f"param_groups: {', '.join(odd)}: must be plain numbers, strings and lists")
    return groups


def plain(value: Any) -> bool:
    """Whether JSON returns the value unchanged."""
    waiting, looked_at = [value], 0
    while waiting:  # a list that holds itself, or another list many times, would be walked without end
        item, looked_at = waiting.pop(), looked_at + 1
        if looked_at > MOST_PLAIN:
            return False
        waiting += [*item, *item.values()] if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RuntimeError):
        return False


def _read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from safetensors import safe_open

    arrays = read_safetensors(file)
    try:
        with safe_open(file, framework="np") as opened:
            about = parse_json((opened.metadata() or {})[KEY], KEY)
        said = {name: about[name] for name in ("step", "step_dtype", "words", "order", "others", "groups")}
        step, floats = said["step"], ("float16", "float32", "float64", "bfloat16")
        lists = [said[name] for name in ("words", "order")]
        texts = all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)
        counted = step is None or (type(step) is int and 0 <= step < 2**62)
        if not (counted and texts and said["step_dtype"] in floats and isinstance(said["others"], dict)):
            raise ValueError("a value of another type")
        check_optimizer({"state": {}, "param_groups": said["groups"]}, KEY)
        groups = [{key: tuple(v) if key == "betas" else v for key, v in group.items()} for group in said["groups"]]
        return arrays, {**said, "groups": groups}
    except (KeyError, TypeError, ValueError) as error:
        must = "must say step, groups, order and words in its metadata"
        raise ValueError(f"{file}: {must} ({shorten(error) or type(error).__name__})") from None


def _behind(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
