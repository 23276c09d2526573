"""A mixture's contract as a table: each line a setting of config.json and the part of the contract that it says.

Reading and writing follow from the same lines, so that they cannot part.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jax_moe.config.moe import AroundConfig, BalanceConfig, ExpertConfig, MoEConfig, RouterConfig
from jax_moe.porting.families.settings import ACTIVATIONS, REFUSED, Settings

REQUIRED: Any = object()
PARTS: dict[str, type] = {
    "router": RouterConfig, "expert": ExpertConfig, "around": AroundConfig, "balance": BalanceConfig,
}
# The balance loss of Mixtral and its descendants
HUGGING_FACE = {"balance.f_sums_to": "k", "balance.pooled": "over_layers"}
# As it is counted for routers with sigmoids or a correction bias, for `Contract.but`
OF_LOGITS: dict[str, Any] = {"balance__of": "logits", "balance__f_sums_to": "k", "balance__pooled": "over_layers"}


@dataclass(frozen=True)
class Field:
    """One setting: its names in config.json (the first is written, any is read) and its place in the contract."""

    theirs: str
    ours: str  # a field of MoEConfig, or of a part: "router.scale"
    default: Any = REQUIRED  # what transformers takes where config.json is silent; a size has none
    words: Mapping[Any, Any] | None = None  # their value -> ours; None: the same
    times: str | None = None  # a setting that theirs is multiplied by: shared experts are counted, each of a width
    null: Any = REFUSED  # what null means

    def read(self, settings: Settings) -> Any:
        """Our value. What is wrong is noted in `settings.errors`."""
        names = self.theirs.split()
        if self.default is REQUIRED:
            found: Any = settings.size(*names)
        else:
            name = next((entry for entry in names if entry in settings.values), names[0])
            found = settings.take(name, type(self.default), self.default, self.null)
            if self.words is not None and found not in self.words:
                settings.wrong(name, f"one of {', '.join(str(word).lower() for word in self.words)}")
                found = self.default
        if self.times is not None:
            found *= settings.size(self.times)
        if self.words is not None:
            return self.words[found]
        return float(found) if type(self.default) is float else found

    def write(self, ours: Any, written: Mapping[str, Any]) -> Any:
        """Their value; `written` are the settings that stand before this one. None where no value says ours."""
        if self.words is not None:
            return next((theirs for theirs, word in self.words.items() if word == ours), None)
        return ours if self.times is None else ours // max(written[self.times], 1)


@dataclass(frozen=True)
class Contract:
    """What a group of families has in common: its settings, and what of the contract no setting says."""

    fields: tuple[Field, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, Any] = field(default_factory=dict)  # {setting: its only value that is supported}

    def but(
        self, *fields: Field, without: str = "", refused: Mapping[str, Any] | None = None, **fixed: Any
    ) -> "Contract":
        """Another family's: these settings in the place of those that say the same; `router__score="sigmoid"` is
        fixed.
        """
        said = {entry.ours for entry in fields} | {name.replace("__", ".") for name in fixed} | set(without.split())
        kept = tuple(entry for entry in self.fields if entry.ours not in said)
        other = {name.replace("__", "."): value for name, value in fixed.items()}
        return Contract((*kept, *fields), {**self.fixed, **other}, {**self.refused, **(refused or {})})

    def defaults(self, **values: Any) -> "Contract":
        """The same settings, under these names with another default."""
        changed = (replace(entry, default=values.get(entry.theirs.split()[0], entry.default)) for entry in self.fields)
        return replace(self, fields=tuple(changed))

    def read(self, settings: Settings) -> MoEConfig:
        """The contract. Raises ValueError, in config.json's words, if its parts do not go together."""
        for name, allowed in self.refused.items():
            settings.must_be(name, allowed, "nothing else is supported")
        values = {**self.fixed, **{entry.ours: entry.read(settings) for entry in self.fields}}
        if values.get("router.jitter_eps"):
            values["router.noise"] = "input_jitter"
        parts: dict[str, dict[str, Any]] = {name: {} for name in PARTS}
        own = {name: value for name, value in values.items() if "." not in name}
        for name, value in values.items():
            part, _, leaf = name.partition(".")
            if leaf:
                parts[part][leaf] = value
        try:
            return MoEConfig(**own, **{name: PARTS[name](**found) for name, found in parts.items()})
        except ValueError as error:
            raise ValueError(self._in_their_words(str(error))) from None

    def _in_their_words(self, message: str) -> str:
        for entry in self.fields:
            message = re.sub(rf"\b{entry.ours.rpartition('.')[2]}=", f"{entry.theirs.split()[0]}=", message)
        return message

    def write(self, moe: MoEConfig) -> dict[str, Any]:
        """config.json's settings; whether they say all of the contract is for the caller to see, by reading them
        back.
        """
        written: dict[str, Any] = {}
        for entry in self.fields:
            part, _, leaf = entry.ours.rpartition(".")
            value = getattr(getattr(moe, part) if part else moe, leaf)
            if entry.times is not None:
                written.setdefault(entry.times, value)
            written[entry.theirs.split()[0]] = entry.write(value, written)
        return written


def activation(name: str = "hidden_act", default: str = "silu") -> Field:
    """The experts' activation."""
    return Field(name, "expert.activation", default, ACTIVATIONS)


def sizes(
    experts: str, width: str, top_k: str = "num_experts_per_tok", model: str = "hidden_size"
) -> tuple[Field, ...]:
    """What every mixture has; the names are the family's."""
    return (
        Field(model, "model_dim"), Field(width, "expert_dim"), Field(experts, "num_experts"), Field(top_k, "top_k"),
    )
