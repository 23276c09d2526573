"""What a person must say of weights that come without a config.json."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from jax_moe.config.moe import Activation


@dataclass(frozen=True)
class Choices:
    """Settings that no weight tells.

    None: the published value (makeMoE top-2, factor 1, dropout 0.1; Mixtral top-2; Switch 64 slots).
    """

    top_k: int | None = None
    """Experts a token goes to."""
    capacity_factor: float | Literal["none"] | None = None
    """makeMoE's or Switch's capacity factor; none is dropless."""
    expert_capacity: int | None = None
    """Switch: slots of an expert in a sequence, whatever its length, in place of a factor."""
    dropout: float | None = None
    """makeMoE's dropout rate (only training reads it)."""
    hidden_activation: Activation | None = None
    """Soft MoE: activation of the hidden layers."""
    output_activation: Activation | None = None
    """Soft MoE: activation of the last layer."""
    residual: bool | None = None
    """Soft MoE: residual around each layer of an expert."""

    def given(self) -> dict[str, Any]:
        """Those that are set."""
        made = {choice.name: getattr(self, choice.name) for choice in fields(self)}
        return {name: value for name, value in made.items() if value is not None}
