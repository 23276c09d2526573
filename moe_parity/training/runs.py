"""Whole training runs in both frameworks: the same weights, batches, noise and dropout masks, step after step.

Routing is a choice, so training amplifies rounding: a third run, in JAX with every weight moved by a few roundings, says how
fast two runs of one program part, and is what drift is measured against. Once a token has gone to another expert the runs
are two different runs; they are reported to the end and judged until then.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe.config.checks import require
from jax_moe.porting.checkpoint import Checkpoint
from jax_moe.porting.families import tables_of
from jax_moe.porting.pretrained import load_pretrained
from jax_moe.porting.state_dict import abstract_module, from_torch, to_torch
from moe_parity.compare import FUSED
from moe_parity.compare import settings as computing_in
from moe_parity.sides.transformers import import_transformers, widened
from moe_parity.training.jax_side import Curve, JaxTrainer, decoder_loss, expert_counts, makemoe_loss
from moe_parity.training.settings import Numbers, TrainSettings, decoder_numbers, makemoe_numbers
from moe_parity.training.torch_side import TorchTrainer, load_reference, make_makemoe, transformers_loss
from moe_parity.training.torch_side import makemoe_loss as makemoe_loss_torch

LOSS = {"float64": 1e-10, "float32": 1e-5}  # of a loss curve, relative
WEIGHTS = 1e-8  # of the final weights in fp64, each tensor relative to its largest value
MOVED = 4  # roundings by which the control's weights are moved
APART = 100  # drift may be so many times the control's
EXPLAINED = 1e-12  # in fp64 a token changes its expert only once the control has drifted so far


class Sides(NamedTuple):
    """Two trainers that hold the same weights, and what they are given."""

    ours: JaxTrainer
    theirs: TorchTrainer
    draw: Callable[[int], Numbers]
    layout: str | None  # whose names the weights are compared under
    torch_settings: Callable[[], AbstractContextManager]  # what the PyTorch side runs in


Make = Callable[[TrainSettings, str], Sides]


@dataclass(frozen=True)
class Runs:
    """Both runs in one dtype, and the control."""

    dtype: str
    ours: Curve
    theirs: Curve
    control: Curve
    weights_error: float
    weights_where: str
    expert_counts: dict[str, np.ndarray]  # the steps that each of our experts has taken, where they are counted one by one

    @property
    def drift_S(self) -> np.ndarray:
        """|our loss - theirs| / |theirs| of every step."""
        return relative(self.ours.loss_S, self.theirs.loss_S)

    @property
    def control_S(self) -> np.ndarray:
        """The same of the control against our run."""
        return relative(self.control.loss_S, self.ours.loss_S)

    @property
    def flips_S(self) -> np.ndarray:
        """How many tokens went to another expert in some layer, of every step."""
        return changed_tokens(self.ours, self.theirs)

    @property
    def first_flip(self) -> int | None:
        """The first step at which a token did."""
        steps = self.flips_S.nonzero()[0]
        return int(steps[0]) if steps.size else None

    @property
    def allowed_S(self) -> np.ndarray:
        """What the drift may be: the promise, and APART times what rounding did to our own run until then."""
        return np.maximum(LOSS[self.dtype], APART * np.maximum.accumulate(self.control_S))

    @property
    def judged(self) -> int:
        """The steps before a token changed its expert."""
        return len(self.drift_S) if self.first_flip is None else self.first_flip

    @property
    def passed(self) -> bool:
        """Drift within what is allowed in every step that is judged; in fp64 the weights too, and no unexplained flip."""
        if not np.isfinite(self.drift_S).all() or not (self.drift_S <= self.allowed_S)[: self.judged].all():
            return False
        if self.dtype == "float32":
            return True
        flip = self.first_flip
        if flip is None:
            return self.weights_error <= max(WEIGHTS, APART**2 * float(self.control_S.max()))
        return bool(self.control_S[: flip + 1].max() > EXPLAINED)


def relative(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """|ours - theirs| / |theirs|, by entry."""
    return np.abs(ours - theirs) / np.abs(theirs)


def changed_tokens(a: Curve, b: Curve) -> np.ndarray:
    """Per step, (token, layer) pairs whose set of experts differs."""
    differ = (np.sort(a.expert_SNLTK, axis=-1) != np.sort(b.expert_SNLTK, axis=-1)).any(axis=-1)
    return differ.sum(axis=tuple(range(1, differ.ndim)))


def run_both(make: Make, settings: TrainSettings, dtype: str) -> Runs:
    """Trains on both sides, and the control."""
    steps = range(settings.steps)
    with computing_in(dtype):
        sides = make(settings, dtype)
        start = jax.tree.map(jnp.copy, (sides.ours.params, sides.ours.state))
        ours = sides.ours.run(sides.draw, steps)
        with sides.torch_settings():
            theirs = sides.theirs.run(sides.draw, steps)
        error, where = weights_error(sides.ours.weights(sides.layout), sides.theirs.weights())
        counts = expert_counts(sides.ours.state)
        sides.ours.params, sides.ours.state = _moved(start[0]), start[1]
        return Runs(dtype, ours, theirs, sides.ours.run(sides.draw, steps), error, where, counts)


def weights_error(ours: Numbers, theirs: Numbers) -> tuple[float, str]:
    """The worst tensor's max |ours - theirs| / max |theirs| among the parameters of `theirs`, and its name."""
    errors = {}
    for name, value in theirs.items():
        difference, scale = np.abs(ours[name] - value).max(initial=0), np.abs(value).max(initial=0)
        errors[name] = 0.0 if difference == 0 else float(difference / scale) if scale > 0 else float("inf")
    worst = max(errors, key=lambda name: errors[name] if np.isfinite(errors[name]) else float("inf"))
    return errors[worst], worst


def _moved(params: Any) -> Any:
    """Every weight MOVED roundings up or down."""
    draw = np.random.default_rng(0)

    def move(value: jax.Array) -> jax.Array:
        step = MOVED * float(jnp.finfo(value.dtype).eps) / 2
        return value * jnp.asarray(1 + step * draw.choice([-1.0, 1.0], value.shape), value.dtype)

    return jax.tree.map(move, params)


def makemoe_sides(checkpoint: Checkpoint, settings: TrainSettings, dtype: str) -> Sides:
    """A makeMoE language model and `torch_ref`'s."""
    config = checkpoint.config
    weights = {name: np.asarray(value, dtype) for name, value in to_torch(checkpoint.module).items()}
    model = from_torch(abstract_module("makemoe", config, np.dtype(dtype)), weights, cast=True)
    return Sides(
        JaxTrainer(model, settings, makemoe_loss), TorchTrainer(make_makemoe(config, weights), settings, makemoe_loss_torch),
        partial(makemoe_numbers, config, settings), None, nullcontext,
    )


def folder_sides(path: Path, settings: TrainSettings, dtype: str) -> Sides:
    """A Hugging Face folder's decoder and `transformers`, without dropout."""
    model = load_pretrained(path, dtype=dtype)
    assert model.origin is not None
    inside = widened if dtype == "float64" else nullcontext
    with inside():
        reference = load_reference(path, model.origin.model_type, dtype)
        theirs = TorchTrainer(reference, settings, transformers_loss)
    ours, layout = JaxTrainer(model, settings, decoder_loss), tables_of(model)[FUSED].name
    return Sides(ours, theirs, partial(decoder_numbers, model.config, settings), layout, inside)


def train_folder(path: Path, settings: TrainSettings) -> list[Runs]:
    """fp64 and fp32 runs of a Hugging Face folder."""
    import_transformers()
    require(settings.num_tokens >= 2, "num_tokens", settings.num_tokens, "at least 2")
    return [run_both(partial(folder_sides, path), settings, dtype) for dtype in ("float64", "float32")]


def train_checkpoint(checkpoint: Checkpoint, settings: TrainSettings) -> list[Runs]:
    """fp64 and fp32 runs of a makeMoE language model."""
    config = checkpoint.config
    require(checkpoint.family == "makemoe", "family", checkpoint.family, "makemoe: only a language model is trained here")
    fits = settings.num_tokens <= config.block_size
    require(fits, "num_tokens", settings.num_tokens, f"at most the model's block, {config.block_size}")
    config.moe.expert_capacity(config.moe.group_size(settings.batch_size, settings.num_tokens))  # refuses too small a batch
    return [run_both(partial(makemoe_sides, checkpoint), settings, dtype) for dtype in ("float64", "float32")]


def describe(runs: Runs) -> list[str]:
    """The lines of one dtype."""
    judged, drift, control = runs.judged, runs.drift_S, runs.control_S
    before = float(drift[:judged].max(initial=0))
    until = "" if judged == len(drift) else f" (steps 0 to {judged - 1})"
    lines = [
        f"{runs.dtype}: loss {runs.theirs.loss_S[0]:.4f} to {runs.theirs.loss_S[-1]:.4f} in {len(drift)} steps: "
        + ("ok" if runs.passed else "FAILED"),
        f"  losses differ by {before:.1e}{until}, allowed {runs.allowed_S[max(judged - 1, 0)]:.0e}; "
        f"JAX against itself, {MOVED} roundings moved: {float(control[:judged].max(initial=0)):.1e}",
        f"  final weights differ by {runs.weights_error:.1e} ({runs.weights_where}, the worst)",
    ]
    if runs.first_flip is None:
        return [*lines, "  every token went to the same experts in every step"]
    flips, rest = runs.flips_S, float(drift[judged:].max())
    of = runs.ours.expert_SNLTK[0].size // runs.ours.expert_SNLTK.shape[-1]
    flipped = f"  from step {judged} on tokens go to other experts ({flips[judged]} of {of:,} there)"
    return [*lines, f"{flipped}; losses then differ by {rest:.1e}"]
