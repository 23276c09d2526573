"""What a port raises."""

from collections.abc import Iterable

from jax_moe.config.checks import shorten

MAX_NAMES = 40


class PortError(ValueError):
    """All that keeps a state dict from loading, found before anything was changed."""

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
