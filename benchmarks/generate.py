"""How many tokens a second does generation give?

    python -m benchmarks.generate [--model makemoe|mixtral] [--rounds 5] [--json]

makemoe: the published model, 500 characters, batch 1, against PyTorch in the way of the original project (the whole
model on the last 32 characters for every new one). mixtral: a tiny random Mixtral (8 layers, width 256, 8 experts),
greedy, 64 new tokens after 32, against `transformers.generate` with its cache. The command first checks that both sides
write the same greedy tokens, then times whole generations in turn and prints medians and the ratio of tokens a second.
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
import torch
from flax import nnx

import jax_moe
import torch_ref
from benchmarks.command import read_options
from benchmarks.timing import alternate, machine, median_ratio
from jax_moe.config.checks import check_positive_ints

Contestants = dict[str, Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Options:
    """Which models, and how often."""

    model: Literal["makemoe", "mixtral"] | None = None
    """Time this model only."""
    rounds: int = 5
    """Timed generations of each contestant."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_positive_ints(rounds=self.rounds)


def makemoe() -> tuple[str, int, Contestants]:
    """(the peer's name, number of new tokens, functions that generate the same greedy characters)."""
    config = jax_moe.MakeMoEConfig()
    reference = torch_ref.MakeMoE(config).eval()
    model = jax_moe.from_torch(jax_moe.MakeMoE(config, rngs=nnx.Rngs(0)), reference.state_dict())
    prompt = np.zeros((1, 1), np.int32)
    return "PyTorch, the original's loop", 500, {
        "jax_moe": lambda: np.asarray(jax_moe.generate(model, prompt, max_new_tokens=500, temperature=0)),
        "PyTorch, the original's loop": lambda: torch_ref.generate(
            reference, torch.from_numpy(prompt).long(), max_new_tokens=500, temperature=0
        ).numpy(),
    }


def mixtral() -> tuple[str, int, Contestants]:
    """(the peer's name, number of new tokens, functions that generate the same greedy tokens)."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    reference = random_mixtral()
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        model = jax_moe.load_pretrained(folder)
    prompt = np.random.default_rng(0).integers(0, 512, (1, 32)).astype(np.int32)
    settings = transformers.GenerationConfig(max_new_tokens=64, do_sample=False, use_cache=True)

    def generate_reference() -> np.ndarray:
        tokens = torch.from_numpy(prompt).long()
        return reference.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings).numpy()

    return "transformers.generate", 64, {
        "jax_moe": lambda: np.asarray(jax_moe.generate(model, prompt, max_new_tokens=64, temperature=0)),
        "transformers.generate": generate_reference,
    }


def random_mixtral() -> torch.nn.Module:
    """A Mixtral of transformers whose logits are far enough apart that no greedy choice is a tie."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, bos_token_id=None, eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():  # weights of std 0.02 give nearly equal logits
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def measure(name: str, rounds: int) -> tuple[int, dict]:
    """(number of new tokens, tokens a second and their ratio). Raises AssertionError if the texts differ."""
    peer, new_tokens, contestants = {"makemoe": makemoe, "mixtral": mixtral}[name]()
    with jax.default_matmul_precision("highest"):
        texts = [run() for run in contestants.values()]
        same = int((texts[0] == texts[1]).all(axis=0).cumprod().sum())
        assert same == texts[0].shape[1], f"{name}: the texts differ from token {same} of {texts[0].shape[1]} on"
        seconds = alternate(contestants, rounds, warmup=1)
    rates = {who: new_tokens / statistics.median(times) for who, times in seconds.items()}
    return new_tokens, {"tokens_per_s": rates, "times_faster": median_ratio(seconds, peer, "jax_moe")}


def main() -> None:
    """The command."""
    options = read_options(Options, "benchmarks.generate", __doc__)
    results = {}
    for name in ("makemoe", "mixtral") if options.model is None else (options.model,):
        new_tokens, results[name] = measure(name, options.rounds)
        if not options.json:
            print(f"{name}: {new_tokens} new tokens, the same on both sides")
            for who, rate in results[name]["tokens_per_s"].items():
                print(f"  {who:30}{rate:10.0f} tokens/s")
            print(f"  {'times faster':30}{results[name]['times_faster']:10.1f}")
    about = machine()
    print(json.dumps({"machine": about, "results": results}, indent=1) if options.json else about)


if __name__ == "__main__":
    main()
