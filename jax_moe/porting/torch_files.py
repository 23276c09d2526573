"""The only file of `jax_moe` that imports torch: `.pt` files and tensors, to and from numpy."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


def import_torch(why: str) -> Any:
    """torch, or a ValueError that says what needs it."""
    try:
        import torch
    except ImportError:
        hint = "pip install 'jax-moe[torch]', or use .safetensors"
        raise ValueError(f"{why} needs PyTorch, which is not installed: {hint}") from None
    return torch


def tensor_to_numpy(tensor: Any) -> np.ndarray:
    """A copy with the same bits; bf16 becomes ml_dtypes.bfloat16."""
    torch = import_torch("a tensor")
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.numpy().copy()


def numpy_to_tensor(array: np.ndarray) -> Any:
    """A tensor with the same bits and its own memory."""
    torch = import_torch("a tensor")
    array = np.array(array, order="C", copy=True)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def read_pt(path: Path) -> dict[str, np.ndarray]:
    """The state dict in a `.pt` file, read with weights_only=True: nothing in it is executed.

    Raises ValueError for a file that is cut short, holds code or anything but named tensors.
    """
    torch = import_torch(f"{path}: reading it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a file that is not its own
        if "Unsupported global" in str(error):
            raise ValueError(f"{path}: refused, its pickle holds code or objects other than tensors") from None
        raise ValueError(f"{path}: must be a whole PyTorch checkpoint of tensors, it is not one or is cut short") from None
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path}: must hold a state dict (names and tensors), holds a {type(state).__name__}")
    odd = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor) or not isinstance(name, str)]
    if odd:
        raise ValueError(f"{path}: must hold a state dict (names and tensors); not tensors: {', '.join(odd[:20])}")
    return {name: tensor_to_numpy(value) for name, value in state.items()}


def write_pt(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict of tensors that torch.load(weights_only=True) reads."""
    torch = import_torch(f"{path}: writing it")
    torch.save({name: numpy_to_tensor(value) for name, value in state.items()}, path)
