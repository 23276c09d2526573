"""PyTorch modules watched: what goes into them and what comes out, by place. Torch itself is imported by the caller."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from moe_parity.stages import Place


class Watch:
    """A trace that fills while modules run."""

    def __init__(self) -> None:
        self.trace: dict[Place, np.ndarray] = {}
        self._handles: list[Any] = []

    def put(self, place: Place, tensor: Any, shape: tuple[int, ...] | None = None) -> None:
        """A tensor under its place, as a copy in numpy."""
        value = tensor.detach().cpu().numpy().copy()
        self.trace[place] = value if shape is None else value.reshape(shape)

    def into(self, module: Any, see: Callable[[Any], None]) -> None:
        """`see(x)` with a module's first argument, by position or name, before every call."""

        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            see(args[0] if args else next(iter(kwargs.values())))

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def out_of(self, module: Any, see: Callable[..., None]) -> None:
        """`see(answer, *arguments)` after every call."""

        def hook(module: Any, args: tuple, kwargs: dict, answer: Any) -> None:
            see(answer, *args, *kwargs.values())

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def stop(self) -> None:
        """Takes every hook away."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def watching() -> Iterator[Watch]:
    """A watch whose hooks are gone afterwards."""
    watch = Watch()
    try:
        yield watch
    finally:
        watch.stop()


def first(answer: Any) -> Any:
    """A module's answer, or the first of several."""
    return answer[0] if isinstance(answer, tuple) else answer
