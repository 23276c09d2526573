"""`inspect`, `parity` and `port` of single layers' mixtures: of folders whose decoder is not known, or where layers
are named.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
from flax import nnx

from jax_moe.config.checks import require
from jax_moe.config.choices import Choices
from jax_moe.config.describe import describe
from jax_moe.disk import writing
from jax_moe.moe import MoE
from jax_moe.porting.checkpoint import Checkpoint, save
from jax_moe.porting.errors import MixtureOnlyError
from jax_moe.porting.families.torch_ref import TORCH_REF
from jax_moe.porting.formats.found import Found
from jax_moe.porting.formats.open import open_path
from jax_moe.porting.formats.own_folder import is_folder
from jax_moe.porting.mixture import Mixtures, open_mixtures, read_mixture
from jax_moe.stored import stored_state
from moe_cli.arguments import Inspect, Parity, Port
from moe_cli.common import say
from moe_cli.sizes import name_lines, stored_in_words
from moe_parity.batch import random_vectors, read_vectors

POSITIONS = 16  # of a random batch


Layers = tuple[Mixtures, tuple[int, ...]]


def opened(path: Path, layers: str | None, choices: Choices | None = None) -> Found | Layers:
    """The whole checkpoint; if layers are named, or the decoder is not known, the folder's mixtures and the layers."""
    try:
        if layers is None:
            return open_path(path, choices)
        found = open_mixtures(path)
    except MixtureOnlyError as error:
        found = open_mixtures(path, error.values)
    asked = found.layers if layers is None else _numbers(layers)
    for layer in asked:
        found.config(layer)
    return found, asked


def _alone(found: Mixtures) -> str:
    """The one line that says why layers are taken by themselves."""
    whole = found.family.decoder is not None
    return "" if whole else f"of {found.family.name} the mixture of a layer is known, not the whole decoder"


def _say_alone(found: Mixtures) -> None:
    if _alone(found):
        say(f"{found.path}: {_alone(found)}: layers by themselves")


def _numbers(words: str) -> tuple[int, ...]:
    numbers = [word.strip() for word in words.split(",")]
    require(all(word.isdecimal() for word in numbers), "layers", words, "numbers of layers, like 0,5")
    return tuple(dict.fromkeys(map(int, numbers)))


def inspect_layers(command: Inspect, found: Mixtures, layers: tuple[int, ...]) -> int:
    """Prints the contract of each layer's mixture, from headers alone; layers of the same contract together."""
    listed = found.in_words or "none"
    print("; ".join(filter(None, (f"{found.family.name}: mixtures in layers {listed}", _alone(found)))))
    together: dict[tuple[str, ...], list[int]] = {}
    for layer in layers:
        together.setdefault(tuple(describe(found.config(layer))), []).append(layer)
    for lines, numbers in together.items():
        headers = [found.headers(layer, found.config(layer)) for layer in numbers]
        scheme = None if found.scheme is None else found.scheme.words
        sizes = stored_in_words((header for each in headers for header in each.values()), scheme)
        which = f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
        print(f"{which}: {sum(map(len, headers)):,} tensors, {sizes}")
        print("\n".join(f"  {line}" for line in lines))
        for line in name_lines(dict(sorted(headers[0].items()))) if command.names else ():
            print(f"  {line}")
    return 0


def _each(found: Mixtures, layers: tuple[int, ...]) -> Iterator[tuple[int, Checkpoint]]:
    for layer in layers:
        with jax.enable_x64(True):
            yield layer, Checkpoint(TORCH_REF.name, read_mixture(found, layer))


def compare_layers(command: Parity, found: Mixtures, layers: tuple[int, ...]) -> int:
    """Compares each layer's mixture with torch_ref on vectors; returns 1 if anything is beyond tolerance."""
    from moe_parity.compare import compare_checkpoint
    from moe_parity.report import print_table

    passed, reports = True, []
    for layer, checkpoint in _each(found, layers):
        width = checkpoint.config.model_dim
        batch = random_vectors(width, command.batch_size, command.num_tokens or POSITIONS, command.seed)
        if command.tokens is not None:
            batch = read_vectors(command.tokens, width)
        report = compare_checkpoint(
            checkpoint, batch, dtype=command.dtype, grads=command.grads, replay=command.replay, explain=command.explain
        )
        passed = passed and report.passed
        reports.append({"layer": layer, **report.to_json()})
        if not command.json:
            print(f"layer {layer} of {found.family.name}")
            print_table(report)
    _say_alone(found)
    if command.json:
        print(json.dumps(reports, indent=1))
    return 0 if passed else 1


def port_layers(command: Port, found: Mixtures, layers: tuple[int, ...]) -> int:
    """Writes a folder for each layer, all or none: `jax_moe.load` reads it, `jax_moe.save_moe` puts it back."""
    with writing(command.dst, command.overwrite, replaceable=_of_layers) as part:
        part.mkdir()
        for layer, checkpoint in _each(found, layers):
            save(checkpoint, part / f"layer_{layer}")
            print(f"layer {layer}: {_size(checkpoint.module):,} parameters")  # type: ignore[arg-type]
    _say_alone(found)
    print(f"{found.family.name}, {len(layers)} layer{'s' if len(layers) != 1 else ''}: wrote {command.dst}")
    return 0


def _of_layers(path: Path) -> bool:
    """Whether a folder is what `port_layers` wrote."""
    return path.is_dir() and all(entry.name.startswith("layer_") and is_folder(entry) for entry in path.iterdir())


def _size(module: MoE) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(stored_state(module))))
