"""How many tokens a second does generation give?

    python -m benchmarks.generate [--model makemoe|mixtral] [--rounds 5] [--json]

makemoe: the published model, 500 characters, batch 1, against PyTorch written the original way (one call of the model on the
last 32 characters for every new one). mixtral: a tiny random Mixtral (8 layers, width 256, 8 experts), greedy, 64 new
tokens after 32, against `transformers.generate` with its cache. Checks first that both write the same greedy tokens; then
times whole generations in turn and prints medians and the ratio of tokens a second.
"""

import json
import statistics
import tempfile
from collections.abc import Callable

import jax
import numpy as np
import torch
from flax import nnx

import jax_moe
import torch_ref
from benchmarks.timing import Parser, alternate, machine, median_ratio, positive

Contestants = dict[str, Callable[[], np.ndarray]]


def makemoe() -> tuple[str, int, Contestants]:
    """(the peer's name, new tokens, both ways to the same greedy characters)."""
    config = jax_moe.MakeMoEConfig()
    theirs = torch_ref.MakeMoE(config).eval()
    ours = jax_moe.from_torch(jax_moe.MakeMoE(config, rngs=nnx.Rngs(0)), theirs.state_dict())
    prompt = np.zeros((1, 1), np.int32)
    return "PyTorch, the original's loop", 500, {
        "jax_moe": lambda: np.asarray(jax_moe.generate(ours, prompt, max_new_tokens=500, temperature=0)),
        "PyTorch, the original's loop": lambda: torch_ref.generate(
            theirs, torch.from_numpy(prompt).long(), max_new_tokens=500, temperature=0
        ).numpy(),
    }


def mixtral() -> tuple[str, int, Contestants]:
    """(the peer's name, new tokens, both ways to the same greedy tokens)."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.MixtralConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, bos_token_id=None, eos_token_id=None,
    )
    torch.manual_seed(0)
    theirs = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():  # apart from ties: random weights of std 0.02 hardly tell tokens apart
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = jax_moe.load_pretrained(folder)
    prompt = np.random.default_rng(0).integers(0, 512, (1, 32)).astype(np.int32)
    settings = transformers.GenerationConfig(max_new_tokens=64, do_sample=False, use_cache=True)

    def reference() -> np.ndarray:
        tokens = torch.from_numpy(prompt).long()
        return theirs.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings).numpy()

    return "transformers.generate", 64, {
        "jax_moe": lambda: np.asarray(jax_moe.generate(ours, prompt, max_new_tokens=64, temperature=0)),
        "transformers.generate": reference,
    }


def main() -> None:
    """The command."""
    parser = Parser("benchmarks.generate", __doc__)
    parser.add_argument("--model", choices=("makemoe", "mixtral"), help="both by default")
    parser.add_argument("--rounds", type=positive, default=5, help="timed generations of each (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    results = {}
    for name, make in {"makemoe": makemoe, "mixtral": mixtral}.items():
        if arguments.model not in (None, name):
            continue
        peer, new_tokens, contestants = make()
        with jax.default_matmul_precision("highest"):
            texts = [run() for run in contestants.values()]
            same = int((texts[0] == texts[1]).all(axis=0).cumprod().sum())
            assert same == texts[0].shape[1], f"{name}: the texts part at token {same} of {texts[0].shape[1]}"
            seconds = alternate(contestants, arguments.rounds, warmup=1)
        rates = {who: new_tokens / statistics.median(times) for who, times in seconds.items()}
        results[name] = {"tokens_per_s": rates, "times_faster": median_ratio(seconds, peer, "jax_moe")}
        if not arguments.json:
            print(f"{name}: {new_tokens} new tokens, the same on both sides")
            for who, rate in rates.items():
                print(f"  {who:30}{rate:10.0f} tokens/s")
            print(f"  {'times faster':30}{results[name]['times_faster']:10.1f}")
    about = machine()
    print(json.dumps({"machine": about, "results": results}, indent=1) if arguments.json else about)


if __name__ == "__main__":
    main()
