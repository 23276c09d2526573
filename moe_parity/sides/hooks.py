"""Hooks on PyTorch modules that record their inputs and outputs by place. The caller imports torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from moe_parity.stages import Place


class Watch:
    """Fills `trace` while modules run."""

    def __init__(self) -> None:
        self.trace: dict[Place, np.ndarray] = {}
        self._handles: list[Any] = []

    def put(self, place: Place, tensor: Any, shape: tuple[int, ...] | None = None) -> None:
        """Records a tensor under its place, as a numpy copy."""
        value = tensor.detach().cpu().numpy().copy()
        self.trace[place] = value if shape is None else value.reshape(shape)

    def into(self, module: Any, see: Callable[[Any], None]) -> None:
        """Calls `see(x)` before every call of a module, with the module's first argument."""

        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            see(args[0] if args else next(iter(kwargs.values())))

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def out_of(self, module: Any, see: Callable[..., None]) -> None:
        """Calls `see(answer, *arguments)` after every call of a module."""

        def hook(module: Any, args: tuple, kwargs: dict, answer: Any) -> None:
            see(answer, *args, *kwargs.values())

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def stop(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def watching() -> Iterator[Watch]:
    """A watch whose hooks are removed at the end."""
    watch = Watch()
    try:
        yield watch
    finally:
        watch.stop()


def first(answer: Any) -> Any:
    """A module's answer, or the first item of a tuple."""
    return answer[0] if isinstance(answer, tuple) else answer
