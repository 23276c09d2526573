"""Tensors that a decoder does not use and a round trip keeps: the layers that predict further tokens (DeepSeek-V3,
arXiv 2412.19437, section 2.2), which stand in published folders, and the vision and audio models around a text model.

They stay where the model was loaded from until it is saved; a folder of ours has them in a file of its own.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_moe.config.models import Origin
from jax_moe.guarded import read_json
from jax_moe.porting.families import family_named
from jax_moe.porting.families.family import LAYER, Family
from jax_moe.porting.formats.quantised import read_scheme
from jax_moe.porting.formats.safetensors import map_tensors, write_tensors
from jax_moe.porting.formats.shards import open_weights
from jax_moe.porting.formats.wrapped import own_names
from jax_moe.porting.tensors import Header

FILE = "carried.safetensors"
COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")  # how many layers stand after the last, in config.json


def apart(
    family: Family, values: Mapping[str, Any], num_layers: int, headers: Mapping[str, Header]
) -> tuple[dict[str, Header], dict[str, Header]]:
    """The decoder's own tensors, and those that are carried, as the family says."""
    if family.is_nested(values):
        alone, inside = family.whole.inside
        rows = (*family.whole.before, *family.whole.after)
        outside = {row.theirs for row in rows if not row.theirs.startswith(alone)}
        own = {name: alone + name.removeprefix(inside) for name in headers if name.startswith(inside)}
        own |= {name: name for name in headers if name in outside}
        rest = {name: header for name, header in headers.items() if name not in own}
        return {own[name]: headers[name] for name in own}, rest
    whole = family.whole
    more = next((count for name in COUNTS if isinstance(count := values.get(name), int)), 0)
    beyond = range(num_layers, num_layers + more)
    layer = re.compile(re.escape(LAYER).replace(re.escape("{l}"), r"(\d+)"))

    def is_carried(name: str) -> bool:
        found = layer.match(name)
        if found is not None:
            return LAYER in whole.carried and int(found[1]) in beyond
        return any(name.startswith(start) for start in whole.carried if start != LAYER)

    carried = {name: header for name, header in headers.items() if is_carried(name)}
    return {name: header for name, header in headers.items() if name not in carried}, carried


def placed(family: Family, values: Mapping[str, Any], headers: Mapping[str, Header]) -> dict[str, Header]:
    """A decoder's tensors by their names in a folder with that config.json: the reverse of `apart`."""
    if not family.is_nested(values):
        return dict(headers)
    alone, inside = family.whole.inside
    return {
        inside + name.removeprefix(alone) if name.startswith(alone) else name: header
        for name, header in headers.items()
    }


def carried_by(origin: Origin) -> dict[str, Header]:
    """The tensors that a loaded model's folder has for its saved copies. Raises ValueError if one is gone."""
    place, found = Path(origin.directory), dict[str, Header]()
    if not origin.carried:
        return found
    try:
        if (place / FILE).is_file():
            found = map_tensors(place / FILE)
        else:
            values = read_json(place / "config.json")
            headers = open_weights(place, read_scheme(values))
            first = family_named(values.get("model_type")).first_of_layers(values)
            own, _ = own_names(headers, lambda names: any(name.startswith(first) for name in names))
            found = {own[name]: header for name, header in headers.items()}
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: {_needed(origin.carried)} ({error})") from None
    missing = [name for name in origin.carried if name not in found]
    if missing:
        raise ValueError(f"{place}: {_needed(missing)}")
    return {name: found[name] for name in origin.carried}


def write_carried(origin: Origin, part: Path) -> None:
    """Writes them beside a folder of ours, if there are any."""
    headers = carried_by(origin)
    if headers:
        write_tensors(part / FILE, headers)


def carried_names(said: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The names in a folder of ours. Raises ValueError for what are no names."""
    names = said.get("carried", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: origin.carried must be a list of tensors' names")
    return tuple(names)


def _needed(names: Any) -> str:
    few = ", ".join(list(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"must still hold {few}, which a saved model takes along; load the model again where they are"
