"""docs/guides/model_contracts.md: what the mixture of every model type chose, from its config.json's defaults.

    python -m parity_tests.families.contracts --update

A model type's defaults are those of its configuration class in transformers; published models may differ in a setting.
"""

import dataclasses
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

from jax_moe.config.moe import CapacityConfig, MoEConfig
from jax_moe.porting.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "model_contracts.md"
SIZES = {"model_dim", "expert_dim", "num_experts", "top_k", "dispatcher"}
WIDTHS = {"shared_dim", "latent_dim", "table_tokens", "slots"}  # whether there is one, not how wide
PARTS = ("router", "capacity", "expert", "around", "balance")
PLAIN = MoEConfig(model_dim=1, expert_dim=1, num_experts=1, top_k=1)
BEGIN = """# What each model type chose

The contract of the mixture of every model type of `transformers` {version} whose configuration class describes one,
with that class's defaults; a published model may differ in a setting, and `jax-moe inspect` prints its own. Named are
the fields that differ from the plain contract: a softmax over all experts, the best K, weights as they are, no
capacity, gated SiLU experts without biases. [The contract](contract.md) explains the fields. A row is a contract,
sizes aside; types in one row have the same. `-` under balance loss is the loss of the plain contract;
[the model types](../families.md) say where transformers computes none, and have measured errors.
Written by `python -m parity_tests.families.contracts --update`.

| model types | router | experts | around the experts, capacity, layer | balance loss |
|---|---|---|---|---|
"""


def contracts() -> tuple[dict[str, MoEConfig], list[str]]:
    """{model type: the contract of its defaults}, and the types whose defaults describe no mixture."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found, without = dict[str, MoEConfig](), list[str]()
    for name, family in sorted(FAMILIES.items()):
        if family.mixture is None:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = family.mixture_config(CONFIG_MAPPING[name]().to_dict())
        except (ValueError, KeyError):
            without.append(name)
    return found, without


def chosen(contract: Any, plain: Any) -> list[str]:
    """The fields that differ, as `name=value`."""
    words = []
    for field in dataclasses.fields(contract):
        value = getattr(contract, field.name)
        if field.name in (*SIZES, *PARTS) or value == getattr(plain, field.name) or idle(contract, field.name):
            continue
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        whether = field.name in WIDTHS or value is True
        words.append(f"`{field.name}`" if whether else f"`{field.name}={shown}`")
    return words


def idle(contract: Any, name: str) -> bool:
    """Whether nothing reads this field of a router under its other settings."""
    jitter = name == "jitter_scope" and contract.noise != "input_jitter"
    return jitter or (name in ("cluster_score", "cluster_fill") and contract.num_clusters == 1)


def row(contract: MoEConfig) -> str:
    """The cells of a contract."""
    capacity = [] if contract.capacity is None else ["`capacity`", *chosen(contract.capacity, CapacityConfig())]
    cells = (
        chosen(contract.router, PLAIN.router), chosen(contract.expert, PLAIN.expert),
        chosen(contract.around, PLAIN.around) + capacity + chosen(contract, PLAIN),
        chosen(contract.balance, PLAIN.balance),
    )
    return " | ".join(", ".join(words) or "-" for words in cells)


def page() -> str:
    """The whole page."""
    import transformers

    found, without = contracts()
    rows = defaultdict(list)
    for name, contract in found.items():
        rows[row(contract)].append(f"`{name}`")
    table = "".join(f"| {', '.join(names)} | {cells} |\n" for cells, names in rows.items())
    rest = ", ".join(f"`{name}`" for name in without)
    return f"{BEGIN.format(version=transformers.__version__)}{table}\nThe defaults of {rest} describe no mixture.\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    PAGE.write_text(page(), encoding="utf-8")
