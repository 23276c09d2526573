"""An expert that no token chose gets no gradient in that step: can it still be trained?

    python -m benchmarks.unchosen_experts [--data FILE] [--steps 1000] [--plot docs/unchosen_experts.png] [--json]

Trains one small makeMoE model four times from the same weights on the same batches, with and without the learned router
noise and the balance loss, and records for every step, layer and expert whether its gradient was zero. Batches are
small, so that some experts get no token. Prints a table; `--plot` draws the runs.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jax_moe
from benchmarks.command import read_options
from jax_moe.config.checks import check_positive_ints, require
from moe_train.data.text import Corpus, batch, load_text

BATCH_SIZE, BLOCK_SIZE, BALANCE_WEIGHT, WINDOW = 4, 32, 0.01, 25
SETTINGS = {
    "neither": (False, 0.0),
    "noise": (True, 0.0),
    "balance loss": (False, BALANCE_WEIGHT),
    "noise and balance loss": (True, BALANCE_WEIGHT),
}


@dataclass(frozen=True)
class Options:
    """The text, the length of a run, and what to write."""

    data: str | None = None
    """A UTF-8 text file; by default the plays that train.py uses."""
    steps: int = 1000
    """Steps of each run."""
    plot: Path | None = None
    """Draw the runs into this PNG."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_positive_ints(steps=self.steps)
        require(self.plot is None or self.steps >= WINDOW, "steps", self.steps, f"at least {WINDOW}, to be drawn")


def squared_norms(experts: dict) -> jax.Array:
    """Squared norm of each expert's gradient over all its parameters, [L, E]."""
    return sum((g**2).sum(axis=tuple(range(2, g.ndim))) for g in jax.tree.leaves(experts))  # type: ignore[return-value]


def run(
    config: jax_moe.MakeMoEConfig, balance_weight: float, noise: bool, text: Corpus, steps: int, title: str
) -> dict[str, np.ndarray]:
    """Of every step, the experts with a gradient [steps, L, E], their load [steps, L, E] and the loss [steps]."""
    model = jax_moe.MakeMoE(config, rngs=nnx.Rngs(0))  # the same weights in all four runs
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    optimizer = jax_moe.adamw_as_torch(1e-3)
    shape = (config.num_layers, BATCH_SIZE, BLOCK_SIZE, config.num_experts)

    def loss_of(params: dict, tokens: jax.Array, key: jax.Array) -> tuple[jax.Array, tuple]:
        draws = jax_moe.Randomness(noise_BTE=jax.random.normal(key, shape) if noise else jnp.zeros(shape))
        output = nnx.merge(graphdef, params, rest).run(tokens[:, :-1], randomness=draws)
        loss = jax_moe.next_token_loss(output.logits_BTV, tokens[:, 1:])
        balance = jax_moe.pool_balance_loss(output.stats, config.moe)
        return loss + balance_weight * balance, (loss, output.stats.expert_load_E)

    @jax.jit
    def step(params: dict, state: optax.OptState, tokens: jax.Array, key: jax.Array) -> tuple:
        (_, (loss, load)), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, tokens, key)
        updates, state = optimizer.update(gradient, state, params)
        reached = squared_norms(gradient["blocks"]["moe"]["experts"]) > 0
        return optax.apply_updates(params, updates), state, loss, load, reached

    state, records = optimizer.init(params), []
    for i in track(range(steps), description=title, console=Console(stderr=True)):
        tokens = jnp.asarray(batch(text, 0, "train", i, BATCH_SIZE, BLOCK_SIZE))
        params, state, *record = step(params, state, tokens, jax.random.fold_in(jax.random.key(0), i))
        records.append(record)
    loss, load, reached = (np.stack(values) for values in zip(*jax.device_get(records), strict=True))
    return {"loss": loss, "load": load, "reached": reached}


def longest_wait(reached: np.ndarray) -> int:
    """The largest number of steps in a row in which some expert had no gradient."""
    wait = longest = np.zeros(reached.shape[1:], int)
    for row in reached:
        wait = np.where(row, 0, wait + 1)
        longest = np.maximum(longest, wait)
    return int(longest.max())


def summary(result: dict) -> dict:
    """The figures of one run; `at_end` is the mean of its last tenth."""
    end = slice(-max(len(result["loss"]) // 10, 1), None)
    num_experts = result["load"].shape[-1]
    return {
        "unchosen_share": float(1 - result["reached"].mean()),
        "unchosen_share_at_end": float(1 - result["reached"][end].mean()),
        "longest_wait": longest_wait(result["reached"]),
        "never_reached": int((~result["reached"].any(axis=0)).sum()),
        "busiest_over_fair": float(result["load"][end].max(axis=-1).mean() * num_experts),
        "train_loss_at_end": float(result["loss"][end].mean()),
    }


def plot(results: dict[str, dict], path: Path) -> None:
    """Draws the share of experts without a gradient and the busiest expert's load, over the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for name, result in results.items():
        count = len(result["loss"]) // WINDOW
        steps = (np.arange(count) + 0.5) * WINDOW
        unchosen = 1 - result["reached"][: count * WINDOW].reshape(count, -1).mean(axis=1)
        busiest = result["load"].max(axis=-1).mean(axis=-1) * result["load"].shape[-1]
        left.plot(steps, 100 * unchosen, label=name)
        right.plot(steps, busiest[: count * WINDOW].reshape(count, WINDOW).mean(axis=1), label=name)
    left.set(title="Experts without a gradient in a step", xlabel="step", ylabel="% of experts", ylim=(0, None))
    right.set(title="Load of a layer's busiest expert", xlabel="step", ylabel="times its fair share", ylim=(1, None))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs the four settings and prints their figures."""
    options = read_options(Options, "benchmarks.unchosen_experts", __doc__)
    text = load_text(options.data, BLOCK_SIZE)
    config = jax_moe.MakeMoEConfig(
        vocab_size=text.vocab_size, block_size=BLOCK_SIZE, model_dim=64, num_heads=4, num_layers=4, num_experts=16,
        capacity_factor=None, dropout=0.0,
    )
    results = {
        name: run(config, weight, noise, text, options.steps, name) for name, (noise, weight) in SETTINGS.items()
    }
    figures = {name: summary(result) for name, result in results.items()}
    if options.plot:
        plot(results, options.plot)
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    table = Table("run", *next(iter(figures.values())))
    for name, row in figures.items():
        table.add_row(name, *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
