"""The families' columns of the parity table: a Hugging Face model in our `Decoder` and in `transformers`."""

import functools
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

import jax_moe
from jax_moe.losses import next_token_loss, pool_balance_loss
from jax_moe.optimizers import adamw_as_torch
from jax_moe.porting.families import family_named, reference_table
from jax_moe.porting.formats.safetensors import read_safetensors
from moe_parity.sides.transformers import widened
from parity_tests.shared.compare import check_close, check_exact
from parity_tests.shared.quick import QUICK
from parity_tests.table.cases import every_cell
from parity_tests.table.checks import Column, always
from parity_tests.table.family_cases import (
    CASES,
    Case,
    batch,
    draw_weights,
    reference_choices,
    run_reference,
    save_reference,
    watching_routers,
)

STEPS = 20
UNORDERED = ("DeepseekV2", "Mistral4")  # transformers hands choices out in any order, as with a correction bias
MARGIN = 1e-4  # least gap between chosen and unchosen router logits: rounding cannot change a choice


OPTIMIZER = adamw_as_torch(3e-3)  # its state is that of any learning rate


def training_loss(model: jax_moe.Decoder, batch: dict[str, Any]) -> tuple[jax.Array, Any]:
    """Cross-entropy of the next token over the labels that count, plus the weighted balance loss; and the output."""
    output = model.run(batch["tokens"], mask_BT=batch["mask"])
    labels = batch["labels"][:, 1:]
    counts = labels >= 0
    loss = next_token_loss(output.logits_BTV[:, :-1], labels, counts)
    config = model.config
    return loss + config.balance_loss_weight * pool_balance_loss(output.stats, config.moe), output


@functools.cache
def stepper(graphdef: Any, wide: bool, learning_rate: float) -> Any:
    """One jitted step: loss, output, gradients, new weights and optimizer. `wide` keeps fp64 programs apart."""
    optimizer = adamw_as_torch(learning_rate)

    @partial(jax.jit, compiler_options=QUICK)
    def step(params: Any, rest: Any, state: Any, batch: dict[str, Any]) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            return training_loss(nnx.merge(graphdef, params, rest), batch)

        (value, output), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return value, output, gradients, optax.apply_updates(params, updates), state

    return step


def to_jax(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """The batch on the device."""
    return {name: jnp.asarray(value) for name, value in batch.items()}


class Outcome:
    """Both sides on one batch, in one dtype: logits and choices of real tokens, loss, gradients by reference name."""

    def __init__(self, runs: "FamilyRuns", model: jax_moe.Decoder, reference: Any, dtype: str):
        data, mask = batch(runs.case, seed=2), batch(runs.case, seed=2)["mask"]
        reference.zero_grad()
        with watching_routers(reference, model.config, runs.family) as routed:
            expected = run_reference(reference, data)
        expected.loss.backward()
        choices, gap = reference_choices(routed, mask)
        assert gap > MARGIN, f"{runs.case.name}: a choice hangs on {gap}"
        spread = all(len(np.unique(layer)) == model.config.moe.num_experts for layer in choices)
        assert spread, f"{runs.case.name}: some expert was never chosen"
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        loss, output, gradients, _, _ = stepper(graphdef, dtype == "float64", runs.case.learning_rate)(
            params, rest, OPTIMIZER.init(params), to_jax(data)
        )
        chosen = np.asarray(output.expert_LBTK)[:, mask]
        if runs.case.family in UNORDERED or model.config.moe.router.correction_bias:
            choices, chosen = np.sort(choices), np.sort(chosen)
        self.choices = {"experts": chosen}, {"experts": choices.astype(chosen.dtype)}
        self.logits = (
            {"logits": np.asarray(output.logits_BTV)[mask]},
            {"logits": expected.logits.detach().numpy()[mask]},
        )
        self.loss = {"loss": np.asarray(loss)}, {"loss": expected.loss.detach().numpy()}
        theirs = {name: p.grad.numpy() for name, p in reference.named_parameters() if p.requires_grad}
        self.gradients = jax_moe.to_torch(model, gradients, layout=runs.layout), theirs


class FamilyRuns:
    """A case on both sides: the reference, and the decoder loaded from the folder that the reference wrote."""

    def __init__(self, case: Case, folder: Path):
        self.case, self.room = case, folder
        self.reference = case.reference(case.config())
        draw_weights(self.reference, seed=1)
        self.folder = save_reference(self.reference, folder / "theirs")
        self.model = jax_moe.load_pretrained(self.folder)
        self.family, self.layout = family_named(self.model.origin.model_type), reference_table(self.model).name

    @functools.cached_property
    def float32(self) -> Outcome:
        """In fp32, with the reference unchanged."""
        return Outcome(self, self.model, self.reference, "float32")

    @functools.cached_property
    def float64(self) -> Outcome:
        """In fp64, with every float32 that the reference names widened."""
        with widened(), jax.enable_x64(True):
            reference = self.case.reference(self.case.config()).double()
            reference.load_state_dict(self.reference.state_dict())
            return Outcome(self, jax_moe.load_pretrained(self.folder, dtype="float64"), reference, "float64")


def is_first(case: Case) -> bool:
    """Whether tests check the row in fp32 too: the first of each family, as fp64 says of all that the maths is right.

    `make table` and `make nightly` check every row.
    """
    first = next(other.name for other in CASES if other.family == case.family)
    return every_cell() or case.name == first


def compared(part: str, dtype: str, limit: float, name: str) -> Column:
    """A column: a part of the outcome, the decoder against `transformers`."""

    def measure(runs: FamilyRuns, tolerance: float) -> float:
        ours, theirs = getattr(getattr(runs, dtype), part)
        where = f"{runs.case.name}: {name}"
        return check_exact(ours, theirs, where) if limit == 0 else check_close(ours, theirs, tolerance, where)

    named = {"stands": is_first} if dtype == "float32" else {}
    return Column(name, dtype, limit, measure, always, **named)  # type: ignore[arg-type]


def twenty_steps(runs: FamilyRuns, tolerance: float) -> float:
    """Losses of AdamW steps on the same batches."""
    reference = runs.case.reference(runs.case.config())
    reference.load_state_dict(runs.reference.state_dict())
    theirs = torch.optim.AdamW(reference.parameters(), lr=runs.case.learning_rate)
    graphdef, params, rest = nnx.split(runs.model, nnx.Param, ...)
    state, step = OPTIMIZER.init(params), stepper(graphdef, False, runs.case.learning_rate)
    curves: tuple[list[float], list[float]] = ([], [])
    for number in range(STEPS):
        data = batch(runs.case, seed=100 + number % 4)
        theirs.zero_grad()
        loss = run_reference(reference, data).loss
        loss.backward()
        theirs.step()
        value, _, _, params, state = step(params, rest, state, to_jax(data))
        curves[0].append(float(value))
        curves[1].append(loss.item())
    assert curves[1][-1] < curves[1][3], f"{runs.case.name}: nothing was learned"
    mine, expected = ({"curve": np.asarray(curve)} for curve in curves)
    return check_close(mine, expected, tolerance, f"{runs.case.name}: losses of {STEPS} AdamW steps")


def round_trip(runs: FamilyRuns, tolerance: float) -> float:
    """Loaded and saved: every tensor bit for bit, config.json too; the fused layout loads to the same weights."""
    where, ours, theirs = f"{runs.case.name}: round trip", runs.room / "ours", runs.folder
    jax_moe.save_pretrained(runs.model, ours, max_shard_bytes=20_000, overwrite=True)
    files = sorted(ours.glob("*.safetensors"))
    listed = json.loads((ours / "model.safetensors.index.json").read_text())["weight_map"]
    saved = {file.name: read_safetensors(file) for file in files}
    check_exact(
        {n: t for held in saved.values() for n, t in held.items()},
        read_safetensors(theirs / "model.safetensors"),
        where,
    )
    assert listed == {name: file for file, held in saved.items() for name in held}, f"{where}: the index"
    for file in ("config.json", "generation_config.json"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), f"{where}: {file}"
    fused = jax_moe.load_pretrained(save_reference(runs.reference, runs.room / "fused", fused=True))
    mine, other = (jax_moe.to_torch(model, layout=runs.layout) for model in (runs.model, fused))
    check_exact(other, mine, f"{where}: from the fused layout")
    again = type(runs.reference).from_pretrained(ours)
    state = {name: value.numpy() for name, value in again.state_dict().items()}
    check_exact(
        state, {n: v.numpy() for n, v in runs.reference.state_dict().items()}, f"{where}: loaded by transformers"
    )
    return 0.0


FAMILY_COLUMNS = [
    compared("choices", "float64", 0, "chosen experts"),
    compared("logits", "float64", 1e-10, "logits"),
    compared("loss", "float64", 1e-10, "training loss"),
    compared("gradients", "float64", 1e-10, "gradients"),
    Column("round trip", "float32", 0, round_trip, always),  # type: ignore[arg-type]
    compared("choices", "float32", 0, "fp32 chosen experts"),
    compared("logits", "float32", 1e-5, "fp32 logits"),
    compared("loss", "float32", 1e-5, "fp32 training loss"),
    compared("gradients", "float32", 1e-4, "fp32 decoder gradients"),
    Column("fp32 losses of twenty AdamW steps", "float32", 1e-5, twenty_steps, always, is_first),  # type: ignore[arg-type]
]
