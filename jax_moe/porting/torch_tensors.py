"""Arrays to PyTorch tensors and back; torch is imported when it is first needed."""

from typing import Any

import ml_dtypes
import numpy as np


def import_torch(why: str) -> Any:
    """torch, or a ValueError that says what needs it."""
    try:
        import torch
    except ImportError:
        hint = "pip install 'jax-moe[torch]'" + ("" if why == "parity" else ", or use .safetensors")
        raise ValueError(f"{why} needs PyTorch, which is not installed: {hint}") from None
    return torch


def tensor_to_numpy(tensor: Any) -> np.ndarray:
    """A copy with the same bits; bf16 becomes ml_dtypes.bfloat16."""
    torch = import_torch("a tensor")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
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
