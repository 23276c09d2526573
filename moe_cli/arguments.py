"""The command `jax-moe`: port, inspect, generate, parity."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jax_moe.arguments import registry
from jax_moe.porting.recognise import Choices

Form = Literal["auto", "hf", "orbax", "torch", "folder"]


@dataclass(frozen=True)
class Port:
    """Carries a checkpoint between PyTorch and JAX.

    SRC is a Hugging Face folder; a .pt or .safetensors file under the names of makeMoE, Mixtral's sparse block, a
    Switch layer or Soft MoE; a folder written by this command; or a run of train/train.py (if it is not at its end,
    its newest checkpoint). What was written is read back bit for bit before it stands at DST. A port to a Hugging
    Face folder that was interrupted goes on when the same command is given again.
    """

    src: tyro.conf.Positional[Path]
    dst: tyro.conf.Positional[Path]
    to: Form = "auto"
    """What DST becomes. hf: a Hugging Face folder in shards. orbax: an Orbax checkpoint with its contract in
    config.json. torch: one .pt or .safetensors file under the original names. folder: config.json and
    weights.safetensors in JAX layout. auto: of a Hugging Face folder orbax, of such an Orbax checkpoint or a fine-
    tuned run hf; of anything else torch if DST ends in .pt, .pth, .bin or .safetensors, and folder if not."""
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """Convert the weights; by default they keep their dtype."""
    max_shard_bytes: int = 5_000_000_000
    """hf: a file holds at most this much, or one tensor."""
    text: Path | None = None
    """A makeMoE model's training text: its sorted characters go into the folder, for `generate`."""
    overwrite: bool = False
    """Replace DST if it is a checkpoint."""
    allow_nonfinite: bool = False
    """Take NaN and infinity as they are."""


@dataclass(frozen=True)
class Inspect:
    """Prints what a checkpoint is: family, parameters, contract in words, and what a file does not say and was assumed.

    Of a Hugging Face model only headers are read: it adds active parameters, bytes and what N devices would hold.
    Exit status 1 if it would not load.
    """

    path: tyro.conf.Positional[Path]
    devices: int | None = None
    """Hugging Face: memory on this many devices; by default on 1, 2, 4 and 8."""
    names: bool = False
    """Every tensor's name, dtype and shape as well."""
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)


@dataclass(frozen=True)
class Generate:
    """Writes text with a Hugging Face model or a makeMoE model: a folder, a file, or a run of train.py, finished or not.

    A Hugging Face folder's text is printed as it comes, until the model ends it; its tokenizer.json is read with the
    package tokenizers (the extra "text").
    """

    path: tyro.conf.Positional[Path]
    prompt: str | None = None
    """What the text begins with; a makeMoE model begins with a new line by default."""
    tokens: str | None = None
    """The prompt in numbers, like 1,2,3, for a Hugging Face folder without a tokenizer; numbers are printed."""
    max_new_tokens: int = 500
    """Tokens to add: characters of a makeMoE model."""
    temperature: float = 1.0
    """0 takes the likeliest token and no noise."""
    sample_top_k: int | None = None
    """Sample from this many likeliest tokens (--top-k is of the model: the experts that a token goes to)."""
    sample_top_p: Annotated[float | None, tyro.conf.arg(aliases=["--top-p"])] = None
    """Sample from the likeliest tokens that together reach this probability."""
    seed: int = 0
    """Decides the sample and the router's noise."""
    text: Path | None = None
    """The training text, where the checkpoint does not hold the characters: they are its sorted characters."""
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)


@dataclass(frozen=True)
class Parity:
    """Runs a checkpoint in JAX and in PyTorch on one batch and compares them stage by stage.

    Names the first stage beyond tolerance and tells a choice that flips at a near tie from a wrong number. Exit status 0 only
    if all is within tolerance, 1 if not and for bad input. A flip at a near tie is within it and is reported: two scores that
    are closer than rounding decide nothing; what follows from it is judged by --replay, and fails with --no-replay.
    The other side of a Hugging Face model is `transformers` (extra hf), of all else torch_ref.
    """

    path: tyro.conf.Positional[Path]
    tokens: Path | None = None
    """The batch, in place of random tokens: text with one sequence of numbers a line, or a .npy. For a layer: a .npy of
    vectors."""
    grads: bool = False
    """Every gradient as well."""
    dtype: Literal["float32", "float64"] = "float32"
    """What both sides compute in. float64 sees what rounding hides in float32, such as another epsilon of a norm."""
    replay: bool = True
    """Our side follows the other's choices of experts, so that a flip at a near tie does not hide what comes after it."""
    explain: bool = False
    """Where the outputs differ, try the known conventions and say which explains it; takes minutes."""
    html: Path | None = None
    """Write the report as one HTML page with plots."""
    json: bool = False
    """Print one JSON object and nothing else: subject, reference, dtype, batch_shape, replay, passed, sentence, explanation,
    first_divergence (a stage's name or null) and stages: each with name, layer, kind, error (null: infinite), tolerance,
    passed, verdict ("same", "flip at a near tie", "wrong number") and where; of choices also agreement, num_flips, closest,
    noise and flips (index, ours, theirs, margin, near_tie)."""
    batch_size: int = 2
    """Sequences, of a random batch."""
    num_tokens: int | None = None
    """Positions, of a random batch; by default the model's block, or 16."""
    seed: int = 0
    """Decides the random batch."""
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)
    # Fields of whole training runs (--train) stand below this line.
    train: int | None = None
    """In place of one batch: so many steps of AdamW on both sides, from the same weights, on the same batches, noise and
    dropout masks, in float64 and float32. For language models."""
    learning_rate: float = 1e-3
    """Of the training run: the highest; after warming up it falls to a tenth."""
    plot: Path | None = None
    """Write a picture of the training run (.png): both loss curves and their difference."""


# What users of other tools type, and what it is here.
SAID_ELSEWHERE = {
    "--lr": "--learning-rate", "--max-tokens": "--max-new-tokens", "--max-length": "--max-new-tokens",
    "--length": "--max-new-tokens", "--temp": "--temperature", "--steps": "--train", "--bs": "--batch-size",
    "--seq-len": "--num-tokens", "--force": "--overwrite", "--num-experts-per-tok": "--top-k", "--verbose": "--names",
}
# Errors of the library speak Python.
IN_SHELL = {"overwrite=True": "--overwrite", "allow_nonfinite=True": "--allow-nonfinite"}


def parse(words: list[str]) -> Port | Inspect | Generate | Parity:
    """The command that the words ask for. Raises SystemExit, as tyro does, for what it is not, and for --help."""
    about = "Mixture of Experts in JAX and PyTorch. --version prints the version."
    try:
        return tyro.cli(  # type: ignore
            Port | Inspect | Generate | Parity, args=words, prog="jax-moe", description=about, registry=registry
        )
    except SystemExit as stopped:
        known = [f"{word} is {SAID_ELSEWHERE[word]} here" for word in words if word in SAID_ELSEWHERE]
        if stopped.code not in (0, None) and known:
            print(f"jax-moe: {', '.join(known)}", file=sys.stderr)
        raise


def in_shell(message: str) -> str:
    """An error of the library with options in the place of Python's arguments."""
    for python, option in IN_SHELL.items():
        message = message.replace(python, option)
    return message
