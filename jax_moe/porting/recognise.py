"""What a state dict is: its family by names that only that family has, and the sizes that its shapes determine."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from jax_moe import presets
from jax_moe.config.models import MakeMoEConfig
from jax_moe.config.moe import Activation, CapacityConfig, MoEConfig, SoftMoEConfig
from jax_moe.porting.table.plan import Shapes

# A name that the family has and no other: the first one found decides.
SIGNS = {
    "makemoe": r"(token_embedding_table\.weight|blocks\.\d+\.smoe\..*)",
    "makemoe_layer": r"router\.topkroute_linear\.weight",
    "mixtral": r"experts\.\d+\.w1\.weight",
    "soft_moe": r"phi",
    "moe": r"router\.linear\.weight",
    "switch": r"router\.classifier\.weight",
}
ASKED = {
    "makemoe": ("top_k", "capacity_factor", "dropout"),
    "makemoe_layer": ("top_k", "capacity_factor", "dropout"),
    "mixtral": ("top_k",),
    "soft_moe": ("hidden_activation", "output_activation", "residual"),
    "moe": (),
    "switch": ("expert_capacity", "capacity_factor"),
}
SLOTS = 64  # of an expert in a sequence: transformers' own, for Switch


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
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) is not None}


def recognise(shapes: Shapes) -> str | None:
    """The family, or None."""
    return next((family for family, sign in SIGNS.items() if any(re.fullmatch(sign, name) for name in shapes)), None)


def config_of(family: str, shapes: Shapes, choices: Choices) -> MakeMoEConfig | MoEConfig | SoftMoEConfig:
    """The contract with sizes from the shapes. A size that nothing tells is 1: loading then names what is missing.

    Raises ValueError for a choice that the family does not have, or that the sizes do not allow.
    """
    chosen = choices.given()
    foreign = [name for name in chosen if name not in ASKED[family]]
    if foreign:
        has = ", ".join(ASKED[family]) or "none"
        raise ValueError(f"{', '.join(foreign)}: must be a setting of {family} (it has {has})")
    if "capacity_factor" in chosen:
        chosen["capacity_factor"] = _factor(chosen["capacity_factor"])
    if family == "makemoe":
        return _language_model(shapes, chosen)
    if family == "soft_moe":
        return _soft_moe(shapes, chosen)
    if family == "switch":
        return _switch(shapes, chosen)
    if family == "moe":
        raise ValueError("torch_ref.MoE's names do not tell its contract: must come in a folder with config.json")
    if family == "mixtral":
        D, E = _size(shapes, r"gate\.weight", 1), _size(shapes, r"gate\.weight", 0)
        return presets.mixtral(D, _size(shapes, r"experts\.\d+\.w1\.weight", 0), E, **chosen)
    router = r"router\.topkroute_linear\.weight"
    return presets.makemoe(
        _size(shapes, router, 1), _size(shapes, r"experts\.\d+\.net\.0\.weight", 0), _size(shapes, router, 0),
        noise=any(".noise_linear." in name for name in shapes), **chosen,
    )


def assumed_choices(family: str, config: MakeMoEConfig | MoEConfig | SoftMoEConfig, choices: Choices) -> dict[str, Any]:
    """{setting: value} of what no weight tells and nobody gave: the published values that `config` has."""
    given = choices.given()
    if family == "switch":
        return {} if given else {"expert_capacity": SLOTS}
    values = config.__dict__
    if isinstance(config, MoEConfig):
        capacity = config.capacity
        values = {
            "top_k": config.top_k, "dropout": config.expert.dropout,
            "capacity_factor": None if capacity is None else float(capacity.exact_factor),
        }
    return {name: values[name] for name in ASKED[family] if name not in given}


def _factor(said: Any) -> Any:
    """A capacity factor as the contracts have it: None is dropless. Raises ValueError."""
    if said == "none":
        return None
    try:
        CapacityConfig(factor=said)
    except ValueError:
        raise ValueError(f"capacity_factor={said!r}: must be a number above 0, or none (nothing is dropped)") from None
    return said


def _language_model(shapes: Shapes, chosen: dict[str, Any]) -> MakeMoEConfig:
    D = _size(shapes, r"token_embedding_table\.weight|lm_head\.weight", 1)
    return MakeMoEConfig(
        vocab_size=_size(shapes, r"token_embedding_table\.weight|lm_head\.weight", 0),
        block_size=_size(shapes, r"position_embedding_table\.weight|blocks\.\d+\.sa\.heads\.\d+\.tril", 0),
        model_dim=D,
        num_heads=max(1, D // _size(shapes, r"blocks\.\d+\.sa\.heads\.\d+\.(key|query|value)\.weight", 0)),
        num_layers=_count(shapes, r"blocks\.(\d+)\..*"),
        num_experts=_size(shapes, r"blocks\.\d+\.smoe\.router\.topkroute_linear\.weight", 0),
        noise=any(".noise_linear." in name for name in shapes),
        **chosen,
    )


def _soft_moe(shapes: Shapes, chosen: dict[str, Any]) -> SoftMoEConfig:
    D, E, C = (_size(shapes, "phi", axis) for axis in range(3))
    depth = _count(shapes, r"experts\.\d+\.fcs\.(\d+)\..*", least=0)
    return SoftMoEConfig(
        model_dim=D, num_experts=E, num_slots=C,
        hidden_dims=tuple(_size(shapes, rf"experts\.\d+\.fcs\.{i}\.weight", 0) for i in range(depth)),
        layer_norm=depth == 0 or any(".layer_norms." in name for name in shapes),
        output_layer_norm=any(".last_ln." in name for name in shapes),
        normalise="scale" in shapes,
        **chosen,
    )


def _switch(shapes: Shapes, chosen: dict[str, Any]) -> MoEConfig:
    """As transformers has it: a constant capacity, and the balance loss of each sequence."""
    if "expert_capacity" not in chosen and "capacity_factor" not in chosen:
        chosen["expert_capacity"] = SLOTS
    elif len(chosen) > 1:
        raise ValueError("capacity_factor, expert_capacity: must be one of the two")
    router, up = r"router\.classifier\.weight", r"experts\.expert_\d+\.wi\.weight"
    D, F, E = _size(shapes, router, 1), _size(shapes, up, 0), _size(shapes, router, 0)
    config = presets.switch(D, F, E, balance_per_sequence=True, **chosen)
    return replace(config, router=replace(config.router, bias="router.classifier.bias" in shapes))


def _size(shapes: Shapes, pattern: str, axis: int) -> int:
    found = (shape[axis] for name, shape in shapes.items() if re.fullmatch(pattern, name) and len(shape) > axis)
    return max(1, next(found, 1))


def _count(shapes: Shapes, pattern: str, least: int = 1) -> int:
    """How many different numbers stand in the names: never more than there are names."""
    return max(least, len({m[1] for name in shapes if (m := re.fullmatch(pattern, name))}))
