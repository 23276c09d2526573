"""How long does one fine-tuning step of a Hugging Face folder take, here and in a PyTorch loop over transformers?

    python -m benchmarks.finetune_step [--shape mixtral-256,qwen3-moe-256,...] [--rounds 10] [--json]

The folder holds a random model of 8 layers; a step is forward, backward and AdamW in fp32 on 4 sequences of 256 tokens,
dropless. Here it is the step of `train.py --pretrained`; in PyTorch a plain loop over the model of transformers, whose
experts are `grouped_mm`. The command first checks that both give the same losses in four steps from the same weights,
then times whole steps in turn and prints medians, their ratio, and the peak memory of a process that makes steps alone.
"""

import json
import multiprocessing
import resource
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.command import read_options
from benchmarks.timing import alternate, machine, median_ratio
from jax_moe.config.checks import check_positive_ints, require

SEQUENCES, POSITIONS, VOCABULARY, LAYERS = 4, 256, 1024, 8
LEARNING_RATE = 1e-3
STEPS = 4  # that are compared, and made before memory is read
SAME = 1e-4  # relative difference of the losses
Step = Callable[[int], float]  # makes the step of that number and gives its loss


class Shape(NamedTuple):
    """A model: width D, width F of an expert, E experts of which a token takes K."""

    model_type: str
    D: int
    F: int
    E: int
    K: int


SHAPES = {
    f"{name}-{D}": Shape(kind, D, int(factor * D), E, K)
    for name, kind, factor, E, K in (("mixtral", "mixtral", 3.5, 8, 2), ("qwen3-moe", "qwen3_moe", 0.375, 128, 8))
    for D in (256, 512)
}


@dataclass(frozen=True)
class Options:
    """Which models, and how often."""

    shape: str = ",".join(SHAPES)
    """The models: mixtral-256, mixtral-512, qwen3-moe-256 and qwen3-moe-512 (the number is the width)."""
    rounds: int = 10
    """Timed steps of each contestant."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_positive_ints(rounds=self.rounds)
        for name in self.names:
            require(name in SHAPES, "shape", name, f"one of {', '.join(SHAPES)}")

    @property
    def names(self) -> list[str]:
        """The models."""
        return [name.strip() for name in self.shape.split(",")]


def write_folder(shape: Shape, folder: Path) -> None:
    """A Hugging Face folder with random weights."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": shape.D, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": shape.D // 8, "num_experts_per_tok": shape.K,
        "max_position_embeddings": POSITIONS,
    }
    if shape.model_type == "mixtral":
        config |= {"num_local_experts": shape.E, "intermediate_size": shape.F}
    else:
        config |= {"num_experts": shape.E, "moe_intermediate_size": shape.F, "norm_topk_prob": True}
    torch.manual_seed(0)
    built = transformers.AutoConfig.for_model(shape.model_type, **config)
    transformers.AutoModelForCausalLM.from_config(built).save_pretrained(folder)


def batch(step: int) -> np.ndarray:
    """Tokens [SEQUENCES, POSITIONS + 1]."""
    return np.random.default_rng(step).integers(0, VOCABULARY, (SEQUENCES, POSITIONS + 1)).astype(np.int32)


def jax_step(folder: Path) -> Step:
    """The step of `train.py --pretrained`, from the folder's weights."""
    import jax

    from moe_train.configs.settings import ModelSettings, OptimizerSettings, TrainConfig
    from moe_train.learners.jax_learner import JaxLearner
    from moe_train.learners.models import Pretrained

    config = TrainConfig(
        pretrained=str(folder), batch_size=SEQUENCES, num_devices=1, steps=1000,
        model=ModelSettings(block_size=POSITIONS), optimizer=OptimizerSettings(learning_rate=LEARNING_RATE),
    )
    learner = JaxLearner(config, Pretrained(folder))
    return lambda step: float(jax.block_until_ready(learner.train_step(step, batch(step))))


def torch_step(folder: Path) -> Step:
    """A plain loop over the model of transformers, from the folder's weights."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="grouped_mm", dtype=torch.float32
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)

    def run(step: int) -> float:
        tokens = torch.from_numpy(batch(step)).long()
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return run


CONTESTANTS: dict[str, Callable[[Path], Step]] = {"jax_moe": jax_step, "transformers": torch_step}


def peak_of(name: str, folder: Path) -> float:
    """GiB of memory, at most, of this process, which makes a few steps; what its imports take is included."""
    run = CONTESTANTS[name](folder)
    for step in range(STEPS):
        run(step)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Median milliseconds of a step and GiB of each contestant, and ratios. Exits if the losses differ."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_folder(SHAPES[name], folder)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peaks = {who: pool.apply(peak_of, (who, folder)) for who in CONTESTANTS}
        steps = {who: start(folder) for who, start in CONTESTANTS.items()}
    losses = {who: [run(step) for step in range(STEPS)] for who, run in steps.items()}
    difference = max(abs(a / b - 1) for a, b in zip(*losses.values(), strict=True))
    if not difference <= SAME:
        raise SystemExit(f"The contestants disagree: losses {losses}; nothing was timed.")
    count = iter(range(STEPS, 10**6))
    seconds = alternate({who: lambda run=run: run(next(count)) for who, run in steps.items()}, rounds, warmup=2)
    return {
        "ms": {who: 1e3 * statistics.median(times) for who, times in seconds.items()},
        "ratio": median_ratio(seconds, *CONTESTANTS), "peak_gib": peaks, "loss_difference": difference,
    }


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = read_options(Options, "benchmarks.finetune_step", __doc__, arguments)
    results = {}
    if not options.json:
        who = [f"{name + unit:>22}" for name in CONTESTANTS for unit in (", ms", ", GiB")]
        print(f"{'model':16}", *who, f"{'time, ratio':>12}{'memory, ratio':>15}{'losses differ by':>18}", flush=True)
    for name in options.names:
        results[name] = found = measure(name, options.rounds)
        if not options.json:
            cells = [f"{value:22.2f}" for who in CONTESTANTS for value in (found["ms"][who], found["peak_gib"][who])]
            ours, theirs = found["peak_gib"].values()
            last = f"{found['ratio']:12.2f}{ours / theirs:15.2f}{found['loss_difference']:18.1e}"
            print(f"{name:16}", *cells, last, flush=True)
    print(json.dumps({"machine": machine(), "results": results}, indent=1) if options.json else machine())


if __name__ == "__main__":
    main()
