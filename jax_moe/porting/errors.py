"""The error of porting, and the comparison of names that raises it."""

from collections.abc import Iterable, Mapping
from typing import Any

from jax_moe.config.checks import shorten

MAX_NAMES = 40


class PortError(ValueError):
    """Every reason why a state dict cannot be loaded; nothing was changed."""

    def __init__(
        self, where: str, missing: Iterable[str] = (), unexpected: Iterable[str] = (), misshapen: Iterable[str] = (),
        mistyped: Iterable[str] = (), wrong: Iterable[str] = (),
    ):
        self.missing, self.unexpected = list(missing), list(unexpected)
        self.misshapen, self.mistyped, self.wrong = list(misshapen), list(mistyped), list(wrong)
        super().__init__(f"{where}: " + "; ".join(self._kinds()))

    def _kinds(self) -> Iterable[str]:
        for kind in ("missing", "unexpected", "misshapen", "mistyped", "wrong"):
            names = getattr(self, kind)
            if names:
                more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
                yield f"{len(names)} {kind}: " + ", ".join(shorten(name, 300) for name in names[:MAX_NAMES]) + more

    def __bool__(self) -> bool:
        return any((self.missing, self.unexpected, self.misshapen, self.mistyped, self.wrong))


class MixtureOnlyError(ValueError):
    """A folder of a model type whose mixture is known, but not its whole decoder; `values` are its config.json."""

    def __init__(self, message: str, values: Mapping[str, Any]):
        self.values = values
        super().__init__(message)


def check_names(
    where: str, there: Mapping[str, Any], wanted: Mapping[str, Any], *, dtypes: bool = False, spare: bool = False,
    mistyped: Iterable[str] = (), wrong: Iterable[str] = (),
) -> None:
    """Raises a single PortError unless `there` has exactly the wanted arrays; with `spare` it may have others too.

    `wanted` is {name: shape, or an array with the required shape and (with `dtypes`) dtype, or None for any}.
    `mistyped` and `wrong` are further messages for the error.
    """
    pairs = [(name, there[name], like) for name, like in wanted.items() if name in there and like is not None]
    shapes = [(name, value.shape, like if isinstance(like, tuple) else like.shape) for name, value, like in pairs]
    types = [(name, value.dtype, like.dtype) for name, value, like in pairs if dtypes]
    error = PortError(
        where,
        missing=[name for name in wanted if name not in there],
        unexpected=[name for name in there if name not in wanted and not spare],
        misshapen=[f"{name} is {found}, must be {like}" for name, found, like in shapes if found != like],
        mistyped=[*mistyped, *(f"{name} is {found}, must be {like}" for name, found, like in types if found != like)],
        wrong=wrong,
    )
    if error:
        raise error
