"""A state dict without a config.json: how names identify it, what shapes tell, and what the user must be asked."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flax import nnx

from jax_moe.config.choices import Choices
from jax_moe.config.models import MakeMoEConfig
from jax_moe.config.moe import CapacityConfig, MoEConfig, SoftMoEConfig
from jax_moe.porting.table.plan import Shapes
from jax_moe.porting.table.rows import Table

Contract = MakeMoEConfig | MoEConfig | SoftMoEConfig


@dataclass(frozen=True)
class StateDict:
    """How weights without a config.json are read: names give the family, shapes the sizes, `asked` lists the rest."""

    module: type[nnx.Module]
    contract: type[Contract]
    table: Table
    sign: str  # pattern of a name that the family has and no other
    # From shapes and choices. None: they do not tell the contract, which must come in a folder of ours
    read: Callable[[Shapes, dict[str, Any]], Contract] | None
    asked: tuple[str, ...] = ()
    takes: Literal["characters", "vectors"] = "vectors"

    def config(self, family: str, shapes: Shapes, choices: Choices) -> Contract:
        """The contract. A size that nothing tells is 1: loading then names what is missing.

        Raises ValueError for a choice that the family does not have, for one that the sizes do not allow, and for a
        required choice that is missing.
        """
        chosen = choices.given()
        foreign = [name for name in chosen if name not in self.asked]
        if foreign:
            has = ", ".join(self.asked) or "none"
            raise ValueError(f"{', '.join(foreign)}: must be a setting of {family} (it has {has})")
        if "capacity_factor" in chosen:
            chosen["capacity_factor"] = factor_said(chosen["capacity_factor"])
        if self.read is None:
            whose = f"{self.table.name}.{self.module.__name__}"
            raise ValueError(f"{whose}'s names do not tell its contract: must come in a folder with config.json")
        return self.read(shapes, chosen)

    def answers(self, config: Contract) -> dict[str, Any]:
        """{setting: value} of what no weight tells, as the contract has it; "none" is dropless."""
        values = dict(config.__dict__)
        if isinstance(config, MoEConfig):
            rule = config.capacity
            factor: Any = "none" if rule is None else rule.factor if rule.slots is None else None
            values = {
                "top_k": config.top_k, "dropout": config.expert.dropout, "capacity_factor": factor,
                "expert_capacity": None if rule is None else rule.slots,
            }
        return {name: values[name] for name in self.asked if values[name] is not None}

    def assumed(self, config: Contract, choices: Choices) -> dict[str, Any]:
        """{setting: value} of what no weight tells and nobody gave: the published values."""
        given = choices.given()
        return {name: value for name, value in self.answers(config).items() if name not in given}


def factor_said(said: Any) -> Any:
    """A capacity factor as the contracts have it: None is dropless. Raises ValueError."""
    if said == "none":
        return None
    try:
        CapacityConfig(factor=said)
    except ValueError:
        raise ValueError(f"capacity_factor={said!r}: must be a number above 0, or none (nothing is dropped)") from None
    return said


def size_in(shapes: Shapes, pattern: str, axis: int) -> int:
    """The size of a dim of the first tensor whose name fits; 1 if there is none."""
    found = (shape[axis] for name, shape in shapes.items() if re.fullmatch(pattern, name) and len(shape) > axis)
    return max(1, next(found, 1))


def count_in(shapes: Mapping[str, Any], pattern: str, least: int = 1) -> int:
    """How many different numbers stand in the names: never more than there are names."""
    return max(least, len({m[1] for name in shapes if (m := re.fullmatch(pattern, name))}))
