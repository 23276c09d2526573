"""The command line of train.py: its settings, which of them the user gave, and their names in other tools."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import tyro

from jax_moe.arguments import registry
from jax_moe.config.checks import require
from moe_train import INSTALLED
from moe_train.configs import PRESETS
from moe_train.configs.adapt import EXPLICIT, Free, fit_settings, given
from moe_train.configs.launch import Launch
from moe_train.configs.settings import Start, TrainConfig, flat
from moe_train.run import folder as run_folder

# {name in nanoGPT, makeMoE, transformers or a similar tool: name here}
ALIASES = {
    "adam-beta1": "beta1", "adam-beta2": "beta2", "adam-epsilon": "eps", "aux-loss-coef": "balance-loss-weight",
    "aux-loss-weight": "balance-loss-weight", "batch": "batch-size",
    "bf16": "precision", "bias-rate": "bias-update-rate", "bias-update-speed": "bias-update-rate",
    "block": "block-size", "bs": "batch-size", "checkpoint-interval": "checkpoint-every", "ckpt": "init-from",
    "context-length": "block-size", "coordinator-address": "coordinator", "d-model": "model-dim",
    "dataset": "data", "dim": "model-dim",
    "dtype": "precision", "eval-batch": "eval-batches", "eval-interval": "eval-every", "eval-iters": "eval-batches",
    "eval-steps": "eval-every", "gpus": "num-devices", "grad-clip": "clip-norm",
    "gradient-checkpointing": "remat", "heads": "num-heads", "hidden-dim": "model-dim",
    "hidden-size": "model-dim", "init": "init-from", "iters": "steps", "iterations": "steps",
    "keep-last": "keep-checkpoints",
    "layers": "num-layers", "learning-rate-decay": "decay", "load": "init-from",
    "load-balance-coeff": "bias-update-rate", "lr": "learning-rate",
    "lr-decay": "decay", "lr-scheduler": "decay", "lr-scheduler-type": "decay", "lr-schedule": "decay",
    "max-grad-norm": "clip-norm", "max-iters": "steps", "max-lr": "learning-rate", "max-seq-len": "block-size",
    "max-steps": "steps", "max-to-keep": "keep-checkpoints", "min-lr": "final-learning-rate",
    "mixed-precision": "precision", "model": "pretrained",
    "model-name-or-path": "pretrained", "moe-router-bias-update-rate": "bias-update-rate",
    "n-embd": "model-dim", "n-embed": "model-dim", "n-experts": "num-experts",
    "n-head": "num-heads", "n-heads": "num-heads", "n-layer": "num-layers", "n-layers": "num-layers",
    "num-experts-per-tok": "top-k", "num-hidden-layers": "num-layers", "num-iterations": "steps",
    "num-local-experts": "num-experts", "num-processes": "processes", "num-steps": "steps",
    "num-train-steps": "steps", "out-dir": "out",
    "output": "out", "output-dir": "out", "prompt": "sample-prompt", "router-aux-loss-coef": "balance-loss-weight",
    "save-every": "checkpoint-every", "save-interval": "checkpoint-every", "save-steps": "checkpoint-every",
    "save-total-limit": "keep-checkpoints",
    "seq-len": "block-size", "seq-length": "block-size", "sequence-length": "block-size",
    "temperature": "sample-temperature", "text": "data", "topk": "top-k", "train-steps": "steps",
    "warmup": "warmup-steps", "warmup-iters": "warmup-steps", "wd": "weight-decay",
    "z-loss-weight": "router-z-loss-weight",
}


def answer_help(arguments: list[str]) -> None:
    """Prints the settings and ends the process if --help is asked for: before jax is imported, which takes seconds."""
    if {"-h", "--help"} & set(arguments):
        with contextlib.suppress(ValueError):  # a wrong option is reported as in a run
            read_settings(arguments)


def read_launch(arguments: list[str]) -> Launch:
    """How the processes of the run find each other: read before all else, as jax must not look for devices before."""
    check_names(arguments)
    return tyro.cli(Launch, args=arguments, add_help=False, return_unknown_args=True)[0]


def read_settings(arguments: list[str]) -> tuple[TrainConfig, TrainConfig | None, Path, Free]:
    """(the settings, those of the run to be resumed or None, the run's folder, the names that the user did not give).

    Defaults are fitted to the given settings. Raises ValueError for an option that has another name here, and for
    --resume without a run.
    """
    check_names(arguments)
    asks_help = {"-h", "--help"} & set(arguments)
    start, _ = tyro.cli(Start, args=arguments, add_help=False, return_unknown_args=True)
    one = asks_help or start.out is not None or read_launch(arguments).alone
    require(bool(one), "out", None, "given with several processes, as one folder that all of them reach")
    folder = Path() if asks_help else run_folder.choose(start)
    saved = run_folder.read_config(folder)["config"] if start.resume and not asks_help else None
    preset = start.preset or (saved.preset if saved else "quick" if start.pretrained is None else "finetune")
    defaults = saved or PRESETS[preset or "quick"]
    defaults = dataclasses.replace(defaults, preset=preset, out=None, resume=False, export=None)
    config = tyro.cli(
        TrainConfig, prog=command_name(), args=arguments, default=defaults, config=(tyro.conf.OmitArgPrefixes,),
        registry=registry,
    )
    free = frozenset(flat(config)) - given(arguments) if saved is None else EXPLICIT
    return fit_settings(dataclasses.replace(config, out=start.out), free), saved, folder, free


def command_name() -> str:
    """The name of the command in messages and in --help."""
    return INSTALLED if sys.argv[0] == INSTALLED else "train.py"


def check_names(arguments: list[str]) -> None:
    """Raises ValueError for the first option that has another name here."""
    for word in arguments:
        name = word[2:].split("=")[0].replace("_", "-") if word.startswith("--") else ""
        if name in ALIASES:
            raise ValueError(f"--{name}: is --{ALIASES[name]} here (--help lists all options)")
