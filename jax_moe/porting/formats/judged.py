"""Checks of a `.pt` file before its tensors are used: nothing that torch.load returns is trusted."""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_moe.config.checks import shorten
from jax_moe.guarded import NPZ, refuse_pointer, require_memory


def check_file(path: Path, mapped: bool) -> bool:
    """Whether the file is an archive of PyTorch 1.6 or later. Raises ValueError if it can unpack to more than its size.

    torch.save stores records uncompressed: compressed or overlapping records would unpack to more than the file holds.
    """
    with path.open("rb") as file:
        head = file.read(64)
    refuse_pointer(path, head)
    size = path.stat().st_size
    if not mapped:
        require_memory(size, str(path))
    if not head.startswith(NPZ):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except OSError:
        raise
    except Exception:  # a dozen kinds; torch, which reads it in its own way, has the last word
        return True
    if any(one.compress_type != zipfile.ZIP_STORED for one in records) or sum(one.file_size for one in records) > size:
        raise ValueError(f"{path}: must hold its records as torch.save writes them, they are compressed or overlap")
    return True


def check_optimizer(state_dict: Any, where: Any) -> None:
    """Raises ValueError unless it is structured as torch.optim's state_dict(): numbered entries, plain groups."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    state = state_dict.get("state") if isinstance(state_dict, Mapping) else None
    fits = isinstance(state, Mapping) and isinstance(groups, list) and bool(groups) and all(map(_is_group, groups))
    if not fits or not all(_is_entry(one) for one in state.values()):  # type: ignore[union-attr]
        must = "must be what torch.optim's state_dict() returns, with state and param_groups"
        raise ValueError(f"{where}: optimizer state: {must}")
    assert isinstance(state, Mapping)
    odd = [
        f"{shorten(key, 40)} of parameter {shorten(i, 20)} is {_said(value)}"
        for i, one in state.items() for key, value in one.items()
        if not (_is_count(value) if key == "step" else value is None or hasattr(value, "untyped_storage"))
    ]
    if odd:
        raise ValueError(
            f"{where}: optimizer state: must hold tensors and whole numbers of steps; {', '.join(odd[:5])}"
        )


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, Mapping) and all(isinstance(key, str) for key in entry)


def _is_group(group: Any) -> bool:
    if not isinstance(group, Mapping) or not all(isinstance(key, str) for key in group):
        return False
    params, names, betas = group.get("params"), group.get("param_names"), group.get("betas", (0.9, 0.999))
    numbered = isinstance(params, list) and all(type(i) is int for i in params)
    named = names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))
    return numbered and named and isinstance(betas, list | tuple) and all(type(one) in (int, float) for one in betas)


def _is_count(step: Any) -> bool:
    if step is None:
        return True
    if hasattr(step, "untyped_storage"):
        if step.device.type != "cpu" or str(step.layout) != "torch.strided" or step.is_nested:
            return False
        if math.prod(step.shape) != 1:
            return False
        step = step.item()
    return type(step) in (int, float) and 0 <= step < 2**62 and step == int(step)


def _said(value: Any) -> str:
    return f"a tensor of {list(value.shape)}" if hasattr(value, "untyped_storage") else shorten(repr(value), 40)
