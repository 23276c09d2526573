"""`transformers` in fp64 throughout: it upcasts to "float32" by name where we go to "float32 or wider"."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax_moe.porting.torch_tensors import import_torch


@contextmanager
def widened() -> Iterator[None]:
    """Every float32 that is named inside becomes float64; the counts of a balance loss stay float32, exact there."""
    torch = import_torch("parity")
    from torch.overrides import TorchFunctionMode

    def wider(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    class Widened(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func is torch.Tensor.float:
                return args[0].double()
            return func(*map(wider, args), **{name: wider(value) for name, value in (kwargs or {}).items()})

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Widened():
            yield
    finally:
        torch.set_default_dtype(before)
