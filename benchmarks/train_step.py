"""How long does one training step of the published makeMoE run take, in JAX and in PyTorch written the original way?

    python -m benchmarks.train_step [--capacity-factor 1.0] [--rounds 30] [--unchosen] [--json]

Batch 16, block 32, width 128, 8 layers, 8 experts, top-2, dropout 0.1, AdamW. Checks first that both give the same loss
from the same weights (noise and dropout silent); then times whole steps in turn and prints medians and their ratio.
`--unchosen` asks instead what it costs in JAX to leave experts without tokens alone (`unchosen="skip"` against "decay").
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

import jax_moe
import torch_ref
from benchmarks.timing import Parser, alternate, machine, median_ratio, positive
from jax_moe.optimizers import Unchosen, adamw_as_torch

BATCH_SIZE = 16
SAME = 2e-5  # relative difference of the two losses; measured 1e-7


def jax_step(
    model: jax_moe.MakeMoE, batches: list[tuple[np.ndarray, np.ndarray]], unchosen: Unchosen = "decay"
) -> tuple[Callable, Callable]:
    """(one training step, the deterministic loss of the first batch)."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(params))
    optimizer = adamw_as_torch(1e-3, weight_decay=0.01, unchosen=unchosen)

    def loss_of(params: dict, x: jax.Array, y: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        logits, stats = nnx.merge(graphdef, params, rest).logits_and_stats(x, key=key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), jax_moe.chosen_experts(stats)

    def step(params: dict, state: optax.OptState, x: jax.Array, y: jax.Array, key: jax.Array) -> tuple:
        (loss, chosen_LE), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, x, y, key)
        updates, state = optimizer.update(gradient, state, params, chosen=chosen_LE)  # unused by "decay": not computed
        return optax.apply_updates(params, updates), state, loss

    jitted = jax.jit(step, donate_argnums=(0, 1))
    held = {"params": params, "state": optimizer.init(params), "count": 0}
    key = jax.random.key(0)

    def run() -> None:
        x, y = batches[held["count"] % len(batches)]
        out = jitted(held["params"], held["state"], x, y, jax.random.fold_in(key, held["count"]))
        held["params"], held["state"], loss = out
        held["count"] += 1
        jax.block_until_ready(loss)

    return run, lambda: float(loss_of(params, *map(jnp.asarray, batches[0]), None)[0])


def torch_step(model: torch_ref.MakeMoE, batches: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Callable, Callable]:
    """(one training step, the deterministic loss of the first batch)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tensors = [(torch.from_numpy(x).long(), torch.from_numpy(y).long()) for x, y in batches]
    held = {"count": 0}

    def loss_of(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def run() -> None:
        x, y = tensors[held["count"] % len(tensors)]
        held["count"] += 1
        loss = loss_of(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def deterministic() -> float:
        model.eval()
        config = model.config
        silent = torch_ref.Randomness(
            noise_BTE=torch.zeros(config.num_layers, BATCH_SIZE, config.block_size, config.num_experts)
        )
        loss = loss_of(model.logits_and_stats(tensors[0][0], randomness=silent)[0], tensors[0][1])
        model.train()
        return float(loss)

    return run, deterministic


def measure(capacity_factor: float | None, rounds: int, dispatcher: str = "auto") -> dict:
    """The medians in milliseconds, their ratio and the machine."""
    config = jax_moe.MakeMoEConfig(capacity_factor=capacity_factor, dispatcher=dispatcher)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    shape = (BATCH_SIZE, config.block_size)
    batches = [tuple(rng.integers(0, config.vocab_size, shape, dtype=np.int32) for _ in range(2)) for _ in range(8)]
    torch.manual_seed(0)
    ref = torch_ref.MakeMoE(config)
    model = jax_moe.from_torch(jax_moe.MakeMoE(config, rngs=nnx.Rngs(0)), ref.state_dict())
    run_jax, loss_jax = jax_step(model, batches)
    run_torch, loss_torch = torch_step(ref, batches)
    difference = abs(loss_jax() / loss_torch() - 1)
    if difference > SAME:
        raise SystemExit(f"The contestants disagree: losses differ by {difference:.1e} (allowed {SAME:.0e}); nothing was timed.")
    seconds = alternate({"jax": run_jax, "torch": run_torch}, rounds, warmup=3)
    return {
        "question": "one training step of the published makeMoE run", "capacity_factor": capacity_factor,
        "dispatcher": dispatcher, "rounds": rounds, "loss_difference": difference,
        "jax_ms": 1e3 * statistics.median(seconds["jax"]), "torch_ms": 1e3 * statistics.median(seconds["torch"]),
        "jax_over_torch": median_ratio(seconds, "jax", "torch"), **machine(),
    }


def measure_unchosen(capacity_factor: float | None, rounds: int, dispatcher: str = "auto") -> dict:
    """The medians in milliseconds of a step that skips experts without tokens and of one that decays them, and their ratio."""
    config = jax_moe.MakeMoEConfig(capacity_factor=capacity_factor, dispatcher=dispatcher)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    shape = (BATCH_SIZE, config.block_size)
    batches = [tuple(rng.integers(0, config.vocab_size, shape, dtype=np.int32) for _ in range(2)) for _ in range(8)]
    kinds: tuple[Unchosen, ...] = ("skip", "decay")
    contestants = {kind: jax_step(jax_moe.MakeMoE(config, rngs=nnx.Rngs(0)), batches, kind) for kind in kinds}
    losses = {kind: loss() for kind, (_, loss) in contestants.items()}
    if losses["skip"] != losses["decay"]:
        raise SystemExit(f"The contestants disagree: losses are {losses}; nothing was timed.")
    seconds = alternate({kind: run for kind, (run, _) in contestants.items()}, rounds, warmup=3)
    return {
        "question": "what leaving experts without tokens alone costs a training step", "capacity_factor": capacity_factor,
        "dispatcher": dispatcher, "rounds": rounds, "skip_ms": 1e3 * statistics.median(seconds["skip"]),
        "decay_ms": 1e3 * statistics.median(seconds["decay"]), "skip_over_decay": median_ratio(seconds, "skip", "decay"),
        **machine(),
    }


def factor(text: str) -> float | None:
    """A capacity factor on the command line."""
    if text.lower() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0, or none")
    return value


def main() -> None:
    """Prints one table, or JSON."""
    parser = Parser("benchmarks.train_step", __doc__)
    parser.add_argument("--capacity-factor", type=factor, default=1.0, help='above 0, or "none" for dropless (default 1.0)')
    parser.add_argument("--dispatcher", default="auto", choices=["auto", "einsum", "gather", "grouped"])
    parser.add_argument("--rounds", type=positive, default=30, help="timed steps of each contestant (default 30)")
    parser.add_argument("--unchosen", action="store_true", help="time unchosen='skip' against 'decay' in JAX, without PyTorch")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    question = measure_unchosen if arguments.unchosen else measure
    result = question(arguments.capacity_factor, arguments.rounds, arguments.dispatcher)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name:18} {value:.4g}" if isinstance(value, float) else f"{name:18} {value}")


if __name__ == "__main__":
    main()
