"""The command `jax-moe`: port, inspect, generate, parity."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jax_moe.porting.recognise import Choices


@dataclass(frozen=True)
class Port:
    """Carries a checkpoint between PyTorch and JAX.

    SRC is a .pt or .safetensors file under the names of makeMoE, Mixtral's sparse block or Soft MoE, a folder written by
    this command, or a run of train/train.py. DST ending in .pt or .safetensors gets the original names; any other DST
    becomes a folder with config.json and weights.safetensors in JAX layout. What was written is read back bit for bit.
    """

    src: tyro.conf.Positional[Path]
    dst: tyro.conf.Positional[Path]
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """Convert the weights; by default they keep their dtype."""
    text: Path | None = None
    """A makeMoE model's training text: its sorted characters go into the folder, for `generate`."""
    overwrite: bool = False
    """Replace DST if it is a checkpoint."""
    allow_nonfinite: bool = False
    """Take NaN and infinity as they are."""


@dataclass(frozen=True)
class Inspect:
    """Prints family, contract in words, parameter count, and every name with its shape and dtype."""

    path: tyro.conf.Positional[Path]
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)


@dataclass(frozen=True)
class Generate:
    """Writes text with a makeMoE model."""

    path: tyro.conf.Positional[Path]
    prompt: str = "\n"
    """What the text begins with."""
    max_new_tokens: int = 500
    """Characters to add."""
    temperature: float = 1.0
    """0 takes the likeliest character and no noise."""
    sample_top_k: int | None = None
    """Sample from this many likeliest characters."""
    sample_top_p: float | None = None
    """Sample from the likeliest characters that together reach this probability."""
    seed: int = 0
    """Decides the sample and the router's noise."""
    text: Path | None = None
    """The training text, where the checkpoint does not hold the characters: they are its sorted characters."""
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)


@dataclass(frozen=True)
class Parity:
    """Runs a checkpoint in JAX and in PyTorch on one batch and prints the errors; exit status 0 only within tolerance."""

    path: tyro.conf.Positional[Path]
    batch_size: int = 2
    """Sequences."""
    num_tokens: int | None = None
    """Positions; by default the model's block, or 16 for a layer."""
    seed: int = 0
    """Decides the batch."""
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, 1 for anything wrong with the input (one line on stderr), 2 for the command line itself."""
    about = "Mixture of Experts in JAX and PyTorch."
    command = tyro.cli(Port | Inspect | Generate | Parity, args=arguments, prog="jax-moe", description=about)  # type: ignore
    try:
        if isinstance(command, Port):
            from jax_moe.commands.port import port

            return port(command)
        if isinstance(command, Inspect):
            from jax_moe.commands.inspect import inspect

            return inspect(command)
        if isinstance(command, Generate):
            from jax_moe.commands.generate import generate

            return generate(command)
        from jax_moe.commands.parity import parity

        return parity(command)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except (ValueError, OSError) as error:
        print(f"jax-moe: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
