"""How long does one training step of the published makeMoE run take, in JAX and in PyTorch written the original way?

    python -m benchmarks.train_step [--capacity-factor 1.0] [--rounds 30] [--unchosen] [--json]

Batch 16, block 32, width 128, 8 layers, 8 experts, top-2, dropout 0.1, AdamW. The command first checks that both give
the same loss from the same weights (without noise and dropout), then times whole steps in turn and prints medians and
their ratio. `--unchosen` measures another cost, in JAX alone: that of leaving experts without tokens unchanged
(`unchosen="skip"` against "decay").
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

import jax_moe
import torch_ref
from benchmarks.command import read_options
from benchmarks.timing import alternate, machine, median_ratio
from jax_moe.config.checks import check_positive_ints, require
from jax_moe.optimizers import Unchosen, adamw_as_torch

BATCH_SIZE = 16
SAME = 2e-5  # relative difference of the two losses; measured 1e-7
Batches = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Options:
    """The contract, and how often."""

    capacity_factor: float | None = 1.0
    """Above 0; none is dropless."""
    dispatcher: Literal["auto", "einsum", "gather", "grouped"] = "auto"
    """How JAX moves tokens to experts."""
    rounds: int = 30
    """Timed steps of each contestant."""
    unchosen: bool = False
    """Time unchosen="skip" against "decay" in JAX, without PyTorch."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_positive_ints(rounds=self.rounds)
        factor = self.capacity_factor
        require(factor is None or 0 < factor < math.inf, "capacity_factor", factor, "a number above 0, or none")


def jax_step(
    model: jax_moe.MakeMoE, batches: Batches, unchosen: Unchosen = "decay"
) -> tuple[Callable, Callable]:
    """(a function of one training step, a function of the first batch's loss without noise and dropout)."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(params))
    optimizer = adamw_as_torch(1e-3, weight_decay=0.01, unchosen=unchosen, declared=jax_moe.declared(model))

    def loss_of(params: dict, x: jax.Array, y: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        output = nnx.merge(graphdef, params, rest).run(x, key=key)
        return jax_moe.next_token_loss(output.logits_BTV, y), jax_moe.chosen_experts(output.stats)

    def step(params: dict, state: optax.OptState, x: jax.Array, y: jax.Array, key: jax.Array) -> tuple:
        (loss, chosen_LE), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, x, y, key)
        # "decay" does not use chosen_LE, so that it is not computed
        updates, state = optimizer.update(gradient, state, params, chosen=chosen_LE)
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


def torch_step(model: torch_ref.MakeMoE, batches: Batches) -> tuple[Callable, Callable]:
    """(a function of one training step, a function of the first batch's loss without noise and dropout)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tensors = [(torch.from_numpy(x).long(), torch.from_numpy(y).long()) for x, y in batches]
    held = {"count": 0}

    def run() -> None:
        x, y = tensors[held["count"] % len(tensors)]
        held["count"] += 1
        loss = torch_ref.next_token_loss(model(x), y)
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
        loss = torch_ref.next_token_loss(model(tensors[0][0], randomness=silent), tensors[0][1])
        model.train()
        return float(loss)

    return run, deterministic


def published(factor: float | None, dispatcher: str) -> tuple[jax_moe.MakeMoEConfig, Batches]:
    """The published model with this capacity factor, and eight random batches."""
    config = jax_moe.MakeMoEConfig(capacity_factor=factor, dispatcher=dispatcher)  # type: ignore[arg-type]
    rng, shape = np.random.default_rng(0), (BATCH_SIZE, config.block_size)
    x_and_y = [[rng.integers(0, config.vocab_size, shape, dtype=np.int32) for _ in range(2)] for _ in range(8)]
    return config, [(x, y) for x, y in x_and_y]


def measure(factor: float | None, rounds: int, dispatcher: str = "auto") -> dict:
    """Median milliseconds of a step in JAX and in PyTorch, their ratio, and the machine. Exits if the losses differ."""
    config, batches = published(factor, dispatcher)
    torch.manual_seed(0)
    reference = torch_ref.MakeMoE(config)
    model = jax_moe.from_torch(jax_moe.MakeMoE(config, rngs=nnx.Rngs(0)), reference.state_dict())
    run_jax, loss_jax = jax_step(model, batches)
    run_torch, loss_torch = torch_step(reference, batches)
    difference = abs(loss_jax() / loss_torch() - 1)
    if difference > SAME:
        differ = f"losses differ by {difference:.1e} (allowed {SAME:.0e})"
        raise SystemExit(f"The contestants disagree: {differ}; nothing was timed.")
    seconds = alternate({"jax": run_jax, "torch": run_torch}, rounds, warmup=3)
    return {
        "question": "one training step of the published makeMoE run", "capacity_factor": factor,
        "dispatcher": dispatcher, "rounds": rounds, "loss_difference": difference,
        "jax_ms": 1e3 * statistics.median(seconds["jax"]), "torch_ms": 1e3 * statistics.median(seconds["torch"]),
        "jax_over_torch": median_ratio(seconds, "jax", "torch"), **machine(),
    }


def measure_unchosen(factor: float | None, rounds: int, dispatcher: str = "auto") -> dict:
    """Median milliseconds of a step with unchosen="skip" and with "decay", and their ratio."""
    config, batches = published(factor, dispatcher)
    kinds: tuple[Unchosen, ...] = ("skip", "decay")
    contestants = {kind: jax_step(jax_moe.MakeMoE(config, rngs=nnx.Rngs(0)), batches, kind) for kind in kinds}
    losses = {kind: loss() for kind, (_, loss) in contestants.items()}
    if losses["skip"] != losses["decay"]:
        raise SystemExit(f"The contestants disagree: losses are {losses}; nothing was timed.")
    seconds = alternate({kind: run for kind, (run, _) in contestants.items()}, rounds, warmup=3)
    return {
        "question": "what leaving experts without tokens unchanged costs a training step", "capacity_factor": factor,
        "dispatcher": dispatcher, "rounds": rounds, "skip_ms": 1e3 * statistics.median(seconds["skip"]),
        "decay_ms": 1e3 * statistics.median(seconds["decay"]),
        "skip_over_decay": median_ratio(seconds, "skip", "decay"), **machine(),
    }


def main() -> None:
    """Prints one table, or JSON."""
    options = read_options(Options, "benchmarks.train_step", __doc__)
    question = measure_unchosen if options.unchosen else measure
    result = question(options.capacity_factor, options.rounds, options.dispatcher)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name:18} {value:.4g}" if isinstance(value, float) else f"{name:18} {value}")


if __name__ == "__main__":
    main()
