"""`.pt` files of PyTorch to and from numpy."""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_moe.config.checks import shorten
from jax_moe.guarded import require_memory
from jax_moe.porting.formats.judged import check_file, check_optimizer
from jax_moe.porting.formats.wrapped import Opened, open_dictionary, unwrapped
from jax_moe.porting.torch_tensors import import_torch, numpy_to_tensor, tensor_to_numpy

EXPANDED = 1 << 20  # bytes up to which a tensor may be expanded, as masks often are


def judge(tensor: Any) -> int:
    """Bytes of the tensor. Raises ValueError for a tensor without numbers, or with more numbers than are stored."""
    torch = import_torch("a tensor")
    if tensor.device.type == "meta":
        raise ValueError("is a meta tensor, which has no numbers")
    if tensor.layout != torch.strided or tensor.is_quantized:
        what = tensor.layout if tensor.layout != torch.strided else tensor.dtype
        raise ValueError(f"is {what}, must be a plain tensor")
    if tensor.is_nested or tensor.is_complex() or tensor.is_neg():
        what = "nested" if tensor.is_nested else tensor.dtype if tensor.is_complex() else "stored as its negative"
        raise ValueError(f"is {what}, must be a plain tensor")
    needed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if needed > max(stored, EXPANDED):
        shape = shorten(list(tensor.shape))
        said = f"says {needed:,} bytes ({shape}) where {stored:,} are stored"
        raise ValueError(f"{said}: must be saved after .contiguous()")
    return needed


def read_pt(path: Path) -> dict[str, np.ndarray]:
    """The state dict of a `.pt` file, read with weights_only=True: nothing in it is executed.

    Raises ValueError for a file that is cut short, or holds code or anything other than named tensors.
    """
    return _arrays(path, _load_pt(path, mapped=False))


def _arrays(path: Path, state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Copies as numpy arrays. Raises ValueError for a dtype that numpy lacks."""
    odd = [f"{shorten(name)} is {_dtype(value)}" for name, value in state.items() if isinstance(_dtype(value), str)]
    if odd:
        raise ValueError(f"{path}: must hold tensors that numpy has; {', '.join(odd[:20])}")
    return {name: tensor_to_numpy(value) for name, value in state.items()}


def map_pt(path: Path) -> dict[str, tuple[tuple[int, ...], Any, Callable[[], np.ndarray]]]:
    """{name: (shape, dtype, reader)} of a `.bin` file, as strict as `read_pt`; the dtype is a name if numpy lacks it.

    The file is mapped, and a tensor is read when its reader is called, except in formats older than PyTorch 1.6's.
    """
    state = _load_pt(path, mapped=True)
    return {name: (tuple(value.shape), _dtype(value), _reader(value)) for name, value in state.items()}


def is_training_pt(path: Path) -> bool:
    """Whether the `.pt` file holds the state dicts of a model and of its optimizer, under their usual keys."""
    return open_dictionary(_load_any(path, mapped=True)).optimizer is not None


def read_whole_pt(path: Path) -> Opened:
    """The state dict of a `.pt` file as numpy, taken out of a trainer's dictionary, and the other entries.

    As strict as `read_pt`. An optimizer's state dict is checked; its tensors stay torch's.
    """
    opened = open_dictionary(_load_any(path, mapped=False))
    if opened.optimizer is not None:
        _check_optimizer(opened.optimizer, path)
    return replace(opened, state=_arrays(path, _tensors(path, opened.state)))


def read_training_pt(path: Path) -> dict[str, Any] | None:
    """The entries of a training checkpoint, the weights as numpy; None if the file is none."""
    opened = read_whole_pt(path)
    return None if opened.optimizer is None else {**opened.others, "model": opened.state, "optimizer": opened.optimizer}


def read_optimizer_pt(path: Path) -> Any:
    """The checked state dict of an optimizer in a `.pt` file; its tensors are torch's."""
    whole = _load_any(path, mapped=False)
    _check_optimizer(whole, path)
    return whole


def _check_optimizer(state_dict: Any, path: Path) -> None:
    """`check_optimizer`, and `judge` for each of its tensors."""
    check_optimizer(state_dict, path)
    for i, entry in state_dict["state"].items():
        for key, value in entry.items():
            try:
                if hasattr(value, "untyped_storage"):
                    judge(value)
            except ValueError as error:
                raise ValueError(f"{path}: optimizer state: {shorten(key, 40)} of parameter {i} {error}") from None


def write_plain_pt(path: Path, whole: Any) -> None:
    """Writes plain values and tensors with torch.save."""
    import_torch(f"{path}: writing it").save(whole, path)


def write_training_pt(path: Path, whole: Mapping[str, Any]) -> None:
    """The reverse of `read_training_pt`."""
    torch = import_torch(f"{path}: writing it")
    torch.save({**whole, "model": {name: numpy_to_tensor(value) for name, value in whole["model"].items()}}, path)


def _load_any(path: Path, mapped: bool) -> Any:
    torch = import_torch(f"{path}: reading it")
    try:
        archive = check_file(path, mapped)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about old pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and archive)
    except Exception as error:  # torch raises a dozen kinds of errors for a foreign file
        if any(word in str(error) for word in ("Unsupported global", "Unsupported class", "TorchScript")):
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = "code or objects other than tensors" + (f" ({shorten(named[1], 60)})" if named else "")
            cure = "where it was made, `torch.save(model.state_dict(), FILE)` saves a readable file"
            raise ValueError(f"{path}: refused, its pickle holds {what}; {cure}") from None
        allowed = "a whole PyTorch checkpoint of tensors, it is not one or is cut short"
        raise ValueError(f"{path}: must be {allowed}") from None


def _load_pt(path: Path, mapped: bool) -> dict[str, Any]:
    return _tensors(path, unwrapped(_load_any(path, mapped)), mapped)


def _tensors(path: Path, state: Any, mapped: bool = False) -> dict[str, Any]:
    torch = import_torch(f"{path}: reading it")
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path}: must hold a state dict (names and tensors), holds a {type(state).__name__}")
    named = {name for name, value in state.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
    odd = [shorten(name) for name in state if name not in named]
    if odd:
        raise ValueError(f"{path}: must hold a state dict (names and tensors); not tensors: {', '.join(odd[:20])}")
    needed, wrong = 0, []
    for name, value in state.items():
        if isinstance(_dtype(value), str):
            continue  # the caller reports it with its dtype
        try:
            needed += judge(value)
        except ValueError as error:
            wrong.append(f"{shorten(name)} {error}")
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong[:20])}")
    if not mapped:
        require_memory(needed, str(path))
    return dict(state)


def _dtype(tensor: Any) -> Any:
    """numpy's dtype, or the name of a dtype that numpy lacks."""
    torch = import_torch("a tensor")
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"{tensor.layout if tensor.layout != torch.strided else tensor.dtype}".removeprefix("torch.")
    if tensor.dtype == torch.bfloat16:
        return np.dtype(ml_dtypes.bfloat16)
    try:
        return torch.empty(0, dtype=tensor.dtype).numpy().dtype
    except (TypeError, RuntimeError):
        return str(tensor.dtype).removeprefix("torch.")


def _reader(tensor: Any) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        torch = import_torch("a tensor")
        value = tensor.detach().contiguous()
        if value.dtype == torch.bfloat16:
            return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()

    return read


def write_pt(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict of tensors that torch.load(weights_only=True) reads."""
    torch = import_torch(f"{path}: writing it")
    torch.save({name: numpy_to_tensor(value) for name, value in state.items()}, path)
