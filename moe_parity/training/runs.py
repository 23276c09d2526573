"""Whole training runs in both frameworks, from the same weights, on the same batches, noise and dropout masks.

Routing is a discrete choice, so training amplifies rounding errors. As a control, the JAX run is repeated with weights
perturbed by MOVED rounding errors; the drift between the frameworks is judged against the drift of the control. Once a
token goes to another expert, the two runs differ for good: they are reported to the end, but judged only until then.
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
from jax_moe.models.decoder import Decoder
from jax_moe.porting.checkpoint import Checkpoint
from jax_moe.porting.families import family_named, reference_table
from jax_moe.porting.pretrained import load_pretrained
from jax_moe.porting.state_dict import abstract_module, from_torch, to_torch
from moe_parity.compare import settings as computing_in
from moe_parity.sides.torch_ref import make_module
from moe_parity.sides.transformers import import_transformers, load_reference, widened
from moe_parity.stages import relative_error
from moe_parity.training.jax_side import Curve, JaxTrainer, decoder_loss, expert_counts, makemoe_loss
from moe_parity.training.settings import Numbers, TrainSettings, decoder_numbers, makemoe_numbers
from moe_parity.training.torch_side import TorchTrainer, TransformersLoss
from moe_parity.training.torch_side import makemoe_loss as makemoe_loss_torch

LOSS = {"float64": 1e-10, "float32": 1e-5}  # allowed relative difference of the losses
WEIGHTS = 1e-8  # allowed difference of the final weights in fp64, relative to a tensor's largest value
MOVED = 4  # rounding errors by which each weight of the control is perturbed
APART = 100  # allowed drift, as a multiple of the control's
EXPLAINED = 1e-12  # in fp64, rounding explains a changed expert only if the control drifted this far


class Sides(NamedTuple):
    """Two trainers that hold the same weights, and their inputs."""

    ours: JaxTrainer
    theirs: TorchTrainer
    draw: Callable[[int], Numbers]
    layout: str | None  # the layout under whose names weights are compared
    torch_settings: Callable[[], AbstractContextManager]  # the context in which the PyTorch side runs


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
    expert_counts: dict[str, np.ndarray]  # the steps of each expert in JAX, if the optimizer counts them separately

    @property
    def drift_S(self) -> np.ndarray:
        """|JAX's loss - PyTorch's loss| / |PyTorch's loss| of every step."""
        return relative(self.ours.loss_S, self.theirs.loss_S)

    @property
    def control_S(self) -> np.ndarray:
        """The relative difference between the losses of the control and of the JAX run, for every step."""
        return relative(self.control.loss_S, self.ours.loss_S)

    @property
    def flips_S(self) -> np.ndarray:
        """For every step, the number of (token, layer) pairs with other experts in JAX than in PyTorch."""
        return changed_tokens(self.ours, self.theirs)

    @property
    def first_flip(self) -> int | None:
        """The first step in which a token has other experts; None if there is no such step."""
        steps = self.flips_S.nonzero()[0]
        return int(steps[0]) if steps.size else None

    @property
    def allowed_S(self) -> np.ndarray:
        """The allowed drift of every step: LOSS, or APART times the largest drift of the control until then."""
        return np.maximum(LOSS[self.dtype], APART * np.maximum.accumulate(self.control_S))

    @property
    def judged(self) -> int:
        """The number of steps before the first flip."""
        return len(self.drift_S) if self.first_flip is None else self.first_flip

    @property
    def passed(self) -> bool:
        """Whether every judged step's drift is allowed; in fp64 the final weights too, or rounding explains a flip."""
        if not np.isfinite(self.drift_S).all() or not (self.drift_S <= self.allowed_S)[: self.judged].all():
            return False
        if self.dtype == "float32":
            return True
        flip = self.first_flip
        if flip is None:
            return self.weights_error <= max(WEIGHTS, APART**2 * float(self.control_S.max()))
        return bool(self.control_S[: flip + 1].max() > EXPLAINED)


def relative(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """|ours - theirs| / |theirs| of every entry."""
    return np.abs(ours - theirs) / np.abs(theirs)


def changed_tokens(a: Curve, b: Curve) -> np.ndarray:
    """For every step, the number of (token, layer) pairs whose sets of experts differ."""
    differ = (np.sort(a.expert_SNLTK, axis=-1) != np.sort(b.expert_SNLTK, axis=-1)).any(axis=-1)
    return differ.sum(axis=tuple(range(1, differ.ndim)))


def run_both(make: Make, settings: TrainSettings, dtype: str) -> Runs:
    """Trains on both sides, then the control."""
    steps = range(settings.steps)
    with computing_in(dtype):
        sides = make(settings, dtype)
        start, rest = jax.tree.map(jnp.copy, (sides.ours.params, sides.ours.state)), sides.ours.rest
        ours = sides.ours.run(sides.draw, steps)
        with sides.torch_settings():
            theirs = sides.theirs.run(sides.draw, steps)
        error, where = weights_error(sides.ours.weights(sides.layout), sides.theirs.weights())
        counts = expert_counts(sides.ours.state)
        sides.ours.params, sides.ours.state, sides.ours.rest = _perturbed(start[0]), start[1], rest
        return Runs(dtype, ours, theirs, sides.ours.run(sides.draw, steps), error, where, counts)


def weights_error(ours: Numbers, theirs: Numbers) -> tuple[float, str]:
    """The largest max |ours - theirs| / max |theirs| among the parameters of `theirs`, and the parameter's name."""
    errors = {name: relative_error(ours[name], value) for name, value in theirs.items()}
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def _perturbed(params: Any) -> Any:
    """Every weight, moved up or down by MOVED rounding errors."""
    draw = np.random.default_rng(0)

    def move(value: jax.Array) -> jax.Array:
        step = MOVED * float(jnp.finfo(value.dtype).eps) / 2
        return value * jnp.asarray(1 + step * draw.choice([-1.0, 1.0], value.shape), value.dtype)

    return jax.tree.map(move, params)


def makemoe_sides(checkpoint: Checkpoint, settings: TrainSettings, dtype: str) -> Sides:
    """A makeMoE language model in JAX, and `torch_ref.MakeMoE`."""
    config = checkpoint.config
    weights = {name: np.asarray(value, dtype) for name, value in to_torch(checkpoint.module).items()}
    model = from_torch(abstract_module(type(checkpoint.module), config, np.dtype(dtype)), weights, cast=True)
    return Sides(
        JaxTrainer(model, settings, makemoe_loss),
        TorchTrainer(make_module("MakeMoE", config, weights).train(), settings, makemoe_loss_torch),
        partial(makemoe_numbers, config, settings), None, nullcontext,
    )


def folder_sides(path: Path, settings: TrainSettings, dtype: str) -> Sides:
    """The decoder of a Hugging Face folder in JAX, and in `transformers`, without dropout."""
    model = load_pretrained(path, dtype=dtype)
    assert model.origin is not None
    inside = widened if dtype == "float64" else nullcontext
    with inside():
        reference = load_reference(path, model.origin.model_type, dtype)
        experts, biases = in_reference(model, "experts.down"), in_reference(model, "router.correction_bias")
        loss = TransformersLoss(tuple(name.rpartition(".")[0] for name in experts))
        theirs = TorchTrainer(reference, settings, loss, biases=biases)
    ours, layout = JaxTrainer(model, settings, decoder_loss), reference_table(model).name
    return Sides(ours, theirs, partial(decoder_numbers, model.config, settings), layout, inside)


def in_reference(model: Decoder, ours: str) -> tuple[str, ...]:
    """The names in transformers' memory of a parameter of every mixture; none if mixtures lack it."""
    assert model.origin is not None
    mixture = family_named(model.origin.model_type).mixture
    assert mixture is not None
    names = [row.theirs for row in mixture.in_memory.rows if row.ours == ours]
    return tuple(
        mixture.in_memory.within.format(l=layer) + name for layer in model.config.moe_layers for name in names
    )


def train_folder(path: Path, settings: TrainSettings) -> list[Runs]:
    """Compared runs of a Hugging Face folder in fp64 and in fp32."""
    import_transformers()
    require(settings.num_tokens >= 2, "num_tokens", settings.num_tokens, "at least 2")
    return [run_both(partial(folder_sides, path), settings, dtype) for dtype in ("float64", "float32")]


def train_checkpoint(checkpoint: Checkpoint, settings: TrainSettings) -> list[Runs]:
    """Compared runs of a makeMoE language model in fp64 and in fp32."""
    config = checkpoint.config
    allowed = "makemoe: only a language model can be trained"
    require(checkpoint.of_characters, "family", checkpoint.family, allowed)
    fits = settings.num_tokens <= config.block_size
    require(fits, "num_tokens", settings.num_tokens, f"at most the model's block size, {config.block_size}")
    group_size = config.moe.group_size(settings.batch_size, settings.num_tokens)
    config.moe.expert_capacity(group_size)  # raises for too small a batch
    return [run_both(partial(makemoe_sides, checkpoint), settings, dtype) for dtype in ("float64", "float32")]


def describe(runs: Runs) -> list[str]:
    """The result of one dtype, as lines of text."""
    judged, drift, control = runs.judged, runs.drift_S, runs.control_S
    before = float(drift[:judged].max(initial=0))
    until = "" if judged == len(drift) else f" (steps 0 to {judged - 1})"
    lines = [
        f"{runs.dtype}: loss {runs.theirs.loss_S[0]:.4f} to {runs.theirs.loss_S[-1]:.4f} in {len(drift)} steps: "
        + ("ok" if runs.passed else "FAILED"),
        f"  losses differ by at most {before:.1e}{until}, {runs.allowed_S[max(judged - 1, 0)]:.0e} is allowed; "
        f"control (weights perturbed by {MOVED} rounding errors): {float(control[:judged].max(initial=0)):.1e}",
        f"  final weights differ by at most {runs.weights_error:.1e} (in {runs.weights_where})",
    ]
    if runs.first_flip is None:
        return [*lines, "  every token has the same experts in every step"]
    flips, rest = runs.flips_S, float(drift[judged:].max())
    of = runs.ours.expert_SNLTK[0].size // runs.ours.expert_SNLTK.shape[-1]
    flipped = f"  from step {judged} on, tokens have other experts ({flips[judged]} of {of:,} in that step)"
    return [*lines, f"{flipped}; losses then differ by at most {rest:.1e}"]
