"""docs/guides/model_contracts.md: what the mixture of every model type chose, from its config.json's defaults.

    python -m parity_tests.families.contracts --update

A model type's defaults are those of its configuration class in transformers; published models may differ in a setting.
"""

import dataclasses
import sys
import textwrap
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

A row is the contract of a mixture, sizes aside; model types in one row have the same. It names the fields that differ
from the plain contract, which is a softmax over all experts, the best K, weights as they are, no capacity, and gated
SiLU experts without biases. [The contract](contract.md) explains every field. `-` under balance loss is the loss of the
plain contract; [model types](../families.md) says where `transformers` computes none, and has measured errors.

The values are the defaults of the configuration classes of `transformers` {version}. A published model may differ in a
setting: `jax-moe inspect` prints its own. `python -m parity_tests.families.contracts --update` writes this page.

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
    end = textwrap.fill(f"The defaults of these classes describe no mixture: {rest}.", 120, break_on_hyphens=False)
    return f"{BEGIN.format(version=transformers.__version__)}{table}\n{end}\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    PAGE.write_text(page(), encoding="utf-8")
