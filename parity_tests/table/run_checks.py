"""Whole training runs as rows of the parity table: 200 steps in both frameworks, and a run that crosses over twice.

`python -m parity_tests.table.run_checks FILE.png` draws one of them.
"""

import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import jax_moe
import torch_ref
from jax_moe.config.moe import BalanceConfig
from jax_moe.porting.checkpoint import Checkpoint
from jax_moe.porting.optimizer.state import optimizer_from_torch, optimizer_to_torch
from moe_parity.compare import settings as computing_in
from moe_parity.sides.hooks import first, watching
from moe_parity.training.jax_side import JaxTrainer, decoder_loss, makemoe_loss
from moe_parity.training.runs import Runs, Sides, folder_sides, in_reference, makemoe_sides, run_both
from moe_parity.training.settings import TrainSettings
from moe_parity.training.torch_side import TorchTrainer
from moe_train.configs.settings import OptimizerSettings
from moe_train.learners.optimizer import make_optimizer
from parity_tests.layers import originals
from parity_tests.shared.compare import MismatchError, check_close, check_exact
from parity_tests.shared.filled import filled
from parity_tests.shared.quick import QUICK
from parity_tests.table.checks import Column, always
from parity_tests.table.family_cases import case_folder
from torch_ref.losses import group_balance_loss

CONFIG = jax_moe.MakeMoEConfig(vocab_size=11, block_size=8, model_dim=16, num_heads=2, num_layers=2, num_experts=4)
SETTINGS = TrainSettings(steps=200, num_tokens=8, learning_rate=3e-3, final_learning_rate=3e-4)
OPTIONS = tuple((QUICK or {}).items())
# As in makeMoE's loop: cross entropy alone, so few tokens that some experts get none. Two accumulated parts per step.
SKIPPING = dataclasses.replace(
    SETTINGS, unchosen="skip", batch_size=1, num_tokens=5, balance_loss_weight=0.0, router_z_loss_weight=0.0
)
# DeepSeek-V3's: the correction bias moves after every step, and a sequence-wise loss stands beside it.
UPDATING = dataclasses.replace(SETTINGS, bias_update_rate=0.01)
SEQUENCE_WISE, SEQUENCE_WEIGHT = BalanceConfig(of="scores", counted_in="sequence"), 0.05
MANY_EXPERTS = dataclasses.replace(CONFIG, num_experts=8, dropout=0.0)
CROSSINGS = (50, 100)  # the steps before which the run moves to JAX, and back


@dataclass(frozen=True)
class RunCase:
    """A model that both frameworks train; `family` names a case of family_cases, None is makeMoE."""

    name: str
    family: str | None = None
    settings: TrainSettings = SETTINGS
    layers: int | None = None  # None: as many as the family's case has

    def sides(self, folder: Path, settings: TrainSettings, dtype: str) -> Sides:
        """Both trainers; the JAX side is compiled with quick options."""
        if settings.unchosen == "skip":
            return original_sides(settings, dtype)
        if self.family is None:
            made = makemoe_sides(makemoe(), settings, dtype)
        else:
            if not (folder / "config.json").exists():
                case_folder(self.family, folder, **({"num_hidden_layers": self.layers} if self.layers else {}))
            made = folder_sides(folder, settings, dtype)
        if settings.bias_update_rate:
            made = with_sequence_wise_loss(made)
        loss = makemoe_loss if self.family is None else decoder_loss
        return made._replace(ours=JaxTrainer(made.ours.model, settings, loss, compiler_options=OPTIONS))


ORIGINAL = RunCase("makeMoE's own modules, unchosen experts skipped", settings=SKIPPING)
UPDATED = RunCase("solar_open, transformers, correction bias updated", "solar_open", UPDATING, layers=1)
RUN_CASES = [
    RunCase("makemoe model, noise and dropout"), RunCase("mixtral, transformers", "mixtral"), ORIGINAL, UPDATED
]


@functools.cache
def makemoe(config: jax_moe.MakeMoEConfig = CONFIG) -> Checkpoint:
    """A small language model."""
    return Checkpoint("makemoe", filled(lambda: jax_moe.MakeMoE(config, rngs=nnx.Rngs(0))))


def original_sides(settings: TrainSettings, dtype: str) -> Sides:
    """makeMoE's own modules in PyTorch, and our model with train.py's optimizer."""
    config = MANY_EXPERTS
    ours, theirs, draw, layout, inside = makemoe_sides(makemoe(config), settings, dtype)
    sizes = (
        config.vocab_size, config.block_size, config.model_dim, config.num_heads, config.num_layers, config.num_experts
    )
    module = originals.LanguageModel(*sizes, config.top_k, 1.0, 0.0).to(getattr(torch, dtype)).train()
    module.load_state_dict(theirs.module.state_dict(), strict=True)
    optimizer = make_optimizer(
        OptimizerSettings(
            learning_rate=settings.learning_rate, final_learning_rate=settings.final_learning_rate, decay="cosine",
            warmup_steps=settings.warmup_steps, clip_norm=settings.clip_norm, weight_decay=settings.weight_decay,
            unchosen=settings.unchosen,
        ),
        settings.steps, jax_moe.declared(ours.model),
    )
    trainer = JaxTrainer(ours.model, settings, makemoe_loss, optimizer, compiler_options=OPTIONS)
    return Sides(trainer, TorchTrainer(module, settings, original_loss), draw, layout, inside)


def with_sequence_wise_loss(made: Sides) -> Sides:
    """Both sides with the balance loss of each sequence; PyTorch's is `torch_ref`'s, of the gates' logits."""
    model, plain = made.ours.model, made.theirs.loss
    moe = dataclasses.replace(model.config.moe, balance=SEQUENCE_WISE)
    model.config = dataclasses.replace(model.config.with_moe(moe), balance_loss_weight=SEQUENCE_WEIGHT)
    model.moe.config = moe
    gates = [name.rpartition(".")[0] for name in in_reference(model, "router.kernel")]

    def loss(module: Any, part: Mapping[str, Any], settings: TrainSettings) -> tuple[torch.Tensor, np.ndarray]:
        found: list[torch.Tensor] = []
        with watching() as watch:
            for gate in gates:
                watch.out_of(module.get_submodule(gate), lambda answer, *_: found.append(first(answer)))
            value, expert_LTK = plain(module, part, settings)
        shape = (*part["tokens"].shape, -1)
        for logits, chosen in zip(found, torch.from_numpy(expert_LTK), strict=True):
            expert_BTK, logits_BTE = chosen.view(shape), logits.view(shape)
            routing = torch_ref.Routing(expert_BTK, expert_BTK.to(logits.dtype), logits_BTE, expert_BTK)
            value = value + SEQUENCE_WEIGHT / len(found) * group_balance_loss(routing, moe)
        return value, expert_LTK

    made.theirs.loss = loss
    return made


def original_loss(module: Any, part: Mapping[str, Any], settings: TrainSettings) -> tuple[torch.Tensor, np.ndarray]:
    """The cross entropy of the next token, as in makeMoE's loop, and the experts [L, tokens, K]."""
    tokens, chosen = part["tokens"], []
    routers = [layer.smoe.router for layer in module.blocks]
    for router, noise in zip(routers, part["noise_BTE"], strict=True):
        router.draw = lambda like, noise=noise: noise
    hooks = [
        router.register_forward_hook(lambda *call: chosen.append(call[-1][1].flatten(0, 1).numpy()))
        for router in routers
    ]
    logits = module(tokens[:, :-1])
    for hook in hooks:
        hook.remove()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), np.stack(chosen)


def to_jax(theirs: TorchTrainer, ours: JaxTrainer) -> None:
    """Moves weights and optimizer state to JAX, as a user would."""
    state = theirs.module.state_dict()
    jax_moe.from_torch(ours.model, state | {name: state[name].float() for name in theirs.biases})
    _, params, ours.rest = nnx.split(ours.model, nnx.Param, ...)
    ours.params = jax.tree.map(jnp.copy, params)
    state = jax.jit(ours.optimizer.init)(ours.params)
    ours.state = optimizer_from_torch(ours.model, theirs.optimizer.state_dict(), state, names=theirs.names)


def to_pytorch(ours: JaxTrainer, theirs: TorchTrainer, layout: str | None) -> None:
    """Moves weights and optimizer state to PyTorch."""
    nnx.update(ours.model, ours.params, ours.rest)
    weights = jax_moe.to_torch(ours.model, layout=layout)
    theirs.module.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    like = theirs.optimizer.state_dict()
    theirs.optimizer.load_state_dict(
        optimizer_to_torch(ours.model, ours.state, like, names=theirs.names, layout=layout)
    )


class WholeRuns:
    """The runs of a case, made when a column first needs them."""

    def __init__(self, case: RunCase, folder: Path):
        self.case = case
        self.make: Callable[[TrainSettings, str], Sides] = functools.partial(case.sides, folder)

    @functools.cached_property
    def both(self) -> tuple[Runs, dict[str, np.ndarray], dict[str, np.ndarray]]:
        """A run in each framework, and PyTorch's final weights and step counts."""
        with computing_in("float64"):
            made = self.make(self.case.settings, "float64")
        return run_both(lambda *_: made, self.case.settings, "float64"), made.theirs.weights(), steps_of(made.theirs)

    @functools.cached_property
    def crossed(self) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Losses, final weights and step counts of the run that goes from PyTorch to JAX and back to PyTorch."""
        there, back = CROSSINGS
        with computing_in("float64"):
            ours, theirs, draw, layout, inside = self.make(self.case.settings, "float64")
            with inside():
                first = theirs.run(draw, range(there))
            to_jax(theirs, ours)
            second = ours.run(draw, range(there, back))
            to_pytorch(ours, theirs, layout)
            with inside():
                last = theirs.run(draw, range(back, self.case.settings.steps))
            return np.concatenate([first.loss_S, second.loss_S, last.loss_S]), theirs.weights(), steps_of(theirs)


def steps_of(theirs: TorchTrainer) -> dict[str, np.ndarray]:
    """The step counts of torch's optimizer by parameter name; 0 without an entry."""
    held = theirs.optimizer.state_dict()["state"]
    return {name: np.asarray(int(held.get(i, {}).get("step", 0))) for i, name in enumerate(theirs.names)}


def same_counts(runs: WholeRuns, tolerance: float) -> float:
    """Step counts of every parameter: those of our experts, and PyTorch's after crossing over, against PyTorch's."""
    found, _, theirs = runs.both
    alone = dict.fromkeys(theirs, runs.case.settings.steps) | by_torch_name(found.expert_counts)
    where = f"{runs.case.name}: step counts"
    check_exact({name: np.asarray(count) for name, count in alone.items()}, theirs, where)
    return check_exact(runs.crossed[2], theirs, where)


def by_torch_name(counts: dict[str, np.ndarray]) -> dict[str, int]:
    """The step counts of makeMoE's expert parameters by name."""
    return {
        f"blocks.{layer}.smoe.experts.{expert}.net.{name}": int(steps)
        for counts_LE in counts.values() for (layer, expert), steps in np.ndenumerate(counts_LE)
        for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    }


def same_experts(runs: WholeRuns, tolerance: float) -> float:
    """The experts of every token, in every layer and step."""
    found = runs.both[0]
    chosen = (
        {"experts": np.sort(curve.expert_SNLTK.astype(np.int64), axis=-1)} for curve in (found.ours, found.theirs)
    )
    return check_exact(*chosen, f"{runs.case.name}: experts chosen")


def same_losses(runs: WholeRuns, tolerance: float) -> float:
    """The losses of every step, relative to the loss."""
    found = runs.both[0]
    return _losses(found.ours.loss_S, found.theirs.loss_S, tolerance, f"{runs.case.name}: losses")


def same_weights(runs: WholeRuns, tolerance: float) -> float:
    """The weights after the last step."""
    found = runs.both[0]
    if not found.weights_error <= tolerance:
        where = f"{runs.case.name}: {found.weights_where}"
        raise MismatchError(f"{where} differs by {found.weights_error:.3g} (tolerance {tolerance:.3g})")
    return found.weights_error


def crossed_losses(runs: WholeRuns, tolerance: float) -> float:
    """Losses of the crossing run against the runs in a single framework."""
    found = runs.both[0]
    where = f"{runs.case.name}: losses, crossing over"
    return max(_losses(runs.crossed[0], alone.loss_S, tolerance, where) for alone in (found.ours, found.theirs))


def crossed_weights(runs: WholeRuns, tolerance: float) -> float:
    """Final weights of the crossing run against those of PyTorch's run."""
    return check_close(runs.crossed[1], runs.both[1], tolerance, f"{runs.case.name}: weights, crossing over")


def _losses(ours: np.ndarray, theirs: np.ndarray, tolerance: float, where: str) -> float:
    named = ({f"step {step}": np.asarray(loss) for step, loss in enumerate(curve)} for curve in (ours, theirs))
    return check_close(*named, tolerance, where)


RUN_COLUMNS = [
    Column("experts of every step", "float64", 0, same_experts, always),  # type: ignore[arg-type]
    Column("step counts", "float64", 0, same_counts, always),  # type: ignore[arg-type]
    Column("losses of 200 steps", "float64", 1e-10, same_losses, always),  # type: ignore[arg-type]
    Column("weights after them", "float64", 1e-8, same_weights, always),  # type: ignore[arg-type]
    Column("losses, crossing over", "float64", 1e-10, crossed_losses, always),  # type: ignore[arg-type]
    Column("weights after crossing", "float64", 1e-8, crossed_weights, always),  # type: ignore[arg-type]
]


def measure_runs(cases: Sequence[RunCase]) -> dict[str, dict[str, float]]:
    """The error of every cell of these rows."""
    rows = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            runs = WholeRuns(case, Path(folder))
            rows[case.name] = {
                column.name: column.measure(runs, column.limit) for column in RUN_COLUMNS  # type: ignore[arg-type]
            }
    return rows


def main() -> None:
    """The picture of a case, in fp64 and fp32."""
    from moe_parity.pages.plots import write_picture

    case = RUN_CASES[1]
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            run_both(functools.partial(case.sides, Path(folder)), SETTINGS, dtype) for dtype in ("float64", "float32")
        ]
    write_picture(Path(sys.argv[1]), runs, f"{case.name}: {SETTINGS.steps} steps of AdamW in both frameworks")


if __name__ == "__main__":
    main()
