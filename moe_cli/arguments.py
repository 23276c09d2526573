"""The options of `jax-moe`: port, inspect, generate, routing, parity; those of train are in `moe_train.configs`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jax_moe.arguments import registry
from jax_moe.config.choices import Choices

Form = Literal["auto", "hf", "orbax", "torch", "folder"]


@dataclass(frozen=True, kw_only=True)
class Compiles:
    """A command that compiles programs."""

    compilation_cache: bool = True
    """Keep compiled programs in ~/.cache/jax-moe, and take them from there."""


@dataclass(frozen=True)
class Port(Compiles):
    """Converts a checkpoint between PyTorch and JAX.

    SRC is a Hugging Face folder; a .pt or .safetensors file with the names of makeMoE, Mixtral's sparse block, a
    Switch layer or Soft MoE; a folder written by this command; or a run of train/train.py (of an unfinished run, its
    newest checkpoint). The result is read back and compared bit for bit before it is moved to DST. An interrupted
    port to a Hugging Face folder continues if the same command is given again.
    """

    src: tyro.conf.Positional[Path]
    dst: tyro.conf.Positional[Path]
    to: Form = "auto"
    """The form of DST. hf: a Hugging Face folder in shards. orbax: an Orbax checkpoint with its contract in
    config.json. torch: one .pt or .safetensors file with the original names. folder: config.json and
    weights.safetensors in JAX layout. auto: orbax for a Hugging Face folder, hf for such an Orbax checkpoint or a
    fine-tuned run; for anything else torch if DST ends in .pt, .pth, .bin or .safetensors, otherwise folder."""
    layers: str | None = None
    """The numbers of layers, like 0,5, of a Hugging Face folder: port their mixtures alone, each to DST/layer_N."""
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """Convert the weights to this dtype; by default they keep their dtype."""
    max_shard_bytes: int = 5_000_000_000
    """For hf: the largest size of a file, unless a single tensor is larger."""
    text: Path | None = None
    """The training text of a makeMoE model: its sorted characters are stored in the folder, for `generate`."""
    overwrite: bool = False
    """Replace DST if it is a checkpoint already."""
    allow_nonfinite: bool = False
    """Accept NaN and infinity in the weights."""


@dataclass(frozen=True)
class Inspect:
    """Describes a checkpoint: family, parameters, contract in words, and settings assumed as the file has none.

    For a Hugging Face model only headers are read, and active parameters, bytes, and the memory needed on N devices are
    printed too; PATH may be its config.json alone. The exit status is 1 if the checkpoint cannot be loaded.
    """

    path: tyro.conf.Positional[Path]
    devices: int | None = None
    """For Hugging Face models: print the memory needed on this number of devices; by default on 1, 2, 4 and 8."""
    mesh: str | None = None
    """For Hugging Face models, in place of --devices: print the memory needed on each device of a mesh such as
    data=2,expert=4, split as train.py and load_pretrained split it."""
    names: bool = False
    """Also print the name, dtype and shape of every tensor."""
    layers: str | None = None
    """The numbers of layers, like 0,5, of a Hugging Face folder: print their mixtures alone."""
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)


@dataclass(frozen=True)
class Generate(Compiles):
    """Generates text with a Hugging Face or makeMoE model: a folder, a file, or a run of train.py, finished or not.

    The text of a Hugging Face folder is printed token by token, until the model ends it. Its tokenizer.json is read by
    the package tokenizers (extra "text").
    """

    path: tyro.conf.Positional[Path]
    prompt: str | None = None
    """The beginning of the text; for a makeMoE model, a new line by default."""
    tokens: str | None = None
    """The prompt as token numbers, like 1,2,3, for a Hugging Face folder without a tokenizer; prints numbers too."""
    max_new_tokens: int = 500
    """The number of tokens to generate (characters, for a makeMoE model)."""
    temperature: float = 1.0
    """0 takes the most likely token, without noise."""
    sample_top_k: int | None = None
    """Sample from this number of most likely tokens (--top-k is the model's number of experts per token)."""
    sample_top_p: Annotated[float | None, tyro.conf.arg(aliases=["--top-p"])] = None
    """Sample from the most likely tokens that together reach this probability."""
    seed: int = 0
    """The seed of the sampling and of the router's noise."""
    text: Path | None = None
    """The training text, if the checkpoint does not hold the characters: they are those of the text, sorted."""
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)


@dataclass(frozen=True)
class Routing(Compiles):
    """Shows which experts a text uses: load, drops, entropy, pairs, and the tokens that each expert takes most.

    DIR is what `generate` takes: a Hugging Face folder in any form, a makeMoE model, or a run of train.py. The model
    reads the text without noise, in windows of its block size (makeMoE) or longest text, each window alone. Of a
    decoder the layers with a mixture are shown.
    """

    path: tyro.conf.Positional[Path]
    text: Path
    """The text: UTF-8, for the model's tokenizer or in its characters; or a .npy file of tokens, a sequence or
    several [sequences, positions]."""
    html: Path | None = None
    """Write the text, coloured by expert, and all numbers to this file as one HTML page."""
    max_tokens: int = 2048
    """Read at most this number of tokens; of several sequences the first ones."""
    training_text: Path | None = None
    """The training text, if a makeMoE checkpoint does not hold the characters: they are those of the text, sorted."""
    json: bool = False
    """Print only a JSON object: model, tokens (how many), num_experts, top_k, window (the tokens of a whole window),
    and layers, each with layer (its place), load (each expert's share of choices, before drops), choices, dropped (of
    each expert), dropped_fraction, lost_tokens (which got no expert), entropy (mean, of the router, in nats),
    entropy_share (of log E), together (tokens that chose both experts, [E, E]) and taken (for each expert the tokens of
    the largest lift: token, text, count, occurrences, lift, share)."""
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)


@dataclass(frozen=True)
class Train:
    """Trains or fine-tunes a model, as python train/train.py does. `jax-moe train --help` lists the settings."""


@dataclass(frozen=True)
class Parity(Compiles):
    """Runs a checkpoint in JAX and in PyTorch on one batch and compares them stage by stage.

    Names the first stage beyond tolerance, and distinguishes a choice of experts that flips at a near tie from a wrong
    number. The exit status is 0 if all is within tolerance, otherwise (also for bad input) 1. A flip at a near tie
    passes and is reported, as rounding alone decides between such scores. With --replay the stages after a flip are
    compared on the same choices; with --no-replay they fail.
    The reference for a Hugging Face model is `transformers` (extra hf), for any other model torch_ref.
    """

    path: tyro.conf.Positional[Path]
    layers: str | None = None
    """The numbers of layers, like 0,5, of a Hugging Face folder: compare their mixtures alone, with torch_ref."""
    tokens: Path | None = None
    """The batch, instead of random tokens: text with a sequence of numbers per line, or a .npy file. For a layer: a
    .npy file of vectors."""
    grads: bool = False
    """Also compare every gradient."""
    dtype: Literal["float32", "float64"] = "float32"
    """The dtype in which both sides compute. float64 shows what rounding hides in float32, such as a norm's epsilon."""
    replay: bool = True
    """JAX follows the reference's choices of experts, so that a flip at a near tie does not hide later stages."""
    explain: bool = False
    """If the outputs differ, try the known conventions and name the convention that explains it; takes minutes."""
    html: Path | None = None
    """Write the report to this file as an HTML page with plots."""
    json: bool = False
    """Print only a JSON object: subject, reference, dtype, batch_shape, replay, passed, sentence, explanation,
    first_divergence (the name of a stage, or null) and stages, each with name, layer, kind, error (null if infinite),
    tolerance, passed, verdict ("same", "flip at a near tie" or "wrong number") and where; a stage of choices also has
    agreement, num_flips, closest, noise and flips (index, ours, theirs, margin, near_tie)."""
    batch_size: int = 2
    """The number of sequences of a random batch."""
    num_tokens: int | None = None
    """The number of positions of a random batch; by default the model's block size, or 16."""
    seed: int = 0
    """The seed of the random batch."""
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)
    # The fields below belong to whole training runs (--train).
    train: int | None = None
    """Instead of comparing a batch, train a language model for this number of AdamW steps on both sides, from the same
    weights, on the same batches, noise and dropout masks, in float64 and in float32."""
    learning_rate: float = 1e-3
    """The highest learning rate of the training run; after the warm-up it decays to a tenth."""
    plot: Path | None = None
    """Write a picture of the training run to this .png file: both loss curves and their difference."""


# Options of other tools, and our names for them.
SAID_ELSEWHERE = {
    "--lr": "--learning-rate", "--max-tokens": "--max-new-tokens", "--max-length": "--max-new-tokens",
    "--length": "--max-new-tokens", "--temp": "--temperature", "--steps": "--train", "--bs": "--batch-size",
    "--seq-len": "--num-tokens", "--force": "--overwrite", "--num-experts-per-tok": "--top-k", "--verbose": "--names",
}
OF_THEIR_OWN = {("routing", "--max-tokens")}  # where an option has that name
# How the library's errors name an argument, and the option for it.
IN_SHELL = {"overwrite=True": "--overwrite", "allow_nonfinite=True": "--allow-nonfinite"}


def parse(words: list[str]) -> Port | Inspect | Generate | Routing | Parity | Train:
    """The command that the words ask for. Raises SystemExit, as tyro does, for anything unknown and for --help."""
    about = "Mixture of Experts in JAX and PyTorch. --version prints the version."
    try:
        return tyro.cli(  # type: ignore
            Port | Inspect | Generate | Routing | Parity | Train, args=words, prog="jax-moe", description=about,
            registry=registry,
        )
    except SystemExit as stopped:
        elsewhere = {word: name for word, name in SAID_ELSEWHERE.items() if (*words[:1], word) not in OF_THEIR_OWN}
        known = [f"{word} is called {elsewhere[word]} here" for word in words if word in elsewhere]
        if stopped.code not in (0, None) and known:
            print(f"jax-moe: {', '.join(known)}", file=sys.stderr)
        raise


def in_shell(message: str) -> str:
    """An error message of the library, with options instead of Python arguments."""
    for python, option in IN_SHELL.items():
        message = message.replace(python, option)
    return message
