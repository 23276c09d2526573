"""One checkpoint in both frameworks on the same batch, compared stage by stage.

The reference (`torch_ref` or `transformers`) runs first, then JAX, by default on the reference's choices of experts.
Then every stage is judged. Memory holds one model at a time.
"""

import gc
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.arrays import checked_input
from jax_moe.config.checks import require
from jax_moe.config.moe import MoEConfig
from jax_moe.disk import same_bits
from jax_moe.losses import next_token_loss, pool_balance_loss
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE
from jax_moe.moe import MoE
from jax_moe.porting.checkpoint import Checkpoint
from jax_moe.porting.families import reference_table
from jax_moe.porting.formats.hf_folder import open_folder
from jax_moe.porting.pretrained import load_pretrained
from jax_moe.porting.state_dict import abstract_module, from_torch, to_torch
from jax_moe.porting.torch_tensors import import_torch
from moe_parity.choices import Verdict
from moe_parity.explanation import search
from moe_parity.report import Report
from moe_parity.sides.jax_moe import beside_vectors, ranked_scores, tap_layer, tap_model
from moe_parity.sides.torch_ref import trace_torch_ref
from moe_parity.sides.transformers import import_transformers, trace_transformers
from moe_parity.stages import TOLERANCES, Place, StageResult, Trace, first_divergence, judge, pair

OWN, TAPPED = Place("own_call", None, "against our taps"), Place("tapped")


def compare_folder(
    path: Path, tokens_BT: np.ndarray, *, dtype: str = "float32", grads: bool = False, replay: bool = True,
    explain: bool = False,
) -> Report:
    """Compares a Hugging Face folder with `transformers`. Raises ValueError if PyTorch or transformers is missing."""
    version = import_transformers().__version__
    check_batch("tokens_BT", tokens_BT)
    with settings(dtype):
        stored = load_pretrained(path)
        assert stored.origin is not None
        model_type = stored.origin.model_type
        results = [folder_round_trip(path, stored)]
        del stored
        theirs = trace_transformers(path, model_type, tokens_BT, dtype, grads)
        gc.collect()
        model = load_pretrained(path, dtype=dtype)
        results += compare_traces(model, tokens_BT, theirs, dtype=dtype, grads=grads, replay=replay)
        words = explained(model, tokens_BT, theirs, results) if explain else ""
    return Report(model_type, f"transformers {version}", dtype, tokens_BT.shape, replay, tuple(results), words)


def compare_checkpoint(
    checkpoint: Checkpoint, x: np.ndarray, *, dtype: str = "float32", grads: bool = False, replay: bool = True,
    explain: bool = False,
) -> Report:
    """Compares a makeMoE model on tokens, or a layer on vectors, with `torch_ref`.

    Raises ValueError if PyTorch is missing.
    """
    import_torch("parity")
    config, of_tokens = checkpoint.config, checkpoint.of_characters
    check_batch("tokens_BT" if of_tokens else "x_BTD", x, None if of_tokens else config.model_dim)
    results = [checkpoint_round_trip(checkpoint)]
    with settings(dtype):
        x = x if of_tokens else x.astype(dtype)
        weights = {name: np.asarray(value, dtype) for name, value in to_torch(checkpoint.module).items()}
        theirs = trace_torch_ref(config, weights, x, None if of_tokens else cotangent(x), grads)
        module = from_torch(abstract_module(type(checkpoint.module), config, np.dtype(dtype)), weights, cast=True)
        results += compare_traces(module, x, theirs, dtype=dtype, grads=grads, replay=replay)
        words = explained(module, x, theirs, results) if explain else ""
    return Report(checkpoint.name, "torch_ref", dtype, x.shape, replay, tuple(results), words)


def check_batch(name: str, x: np.ndarray, model_dim: int | None = None) -> None:
    """Raises ValueError for a batch of the wrong kind, rank or width, and for an empty batch, on which all agrees."""
    checked_input(name, x, model_dim)
    require(x.size > 0, f"{name}.shape", x.shape, "of at least one position")


def explained(module: nnx.Module, x: np.ndarray, theirs: Trace, results: list[StageResult]) -> str:
    """The convention that explains the difference, or an empty string if there is none. Call it inside `settings`."""
    return "" if first_divergence(results) is None else search.explain_traces(module, x, theirs)


def settings(dtype: str) -> AbstractContextManager:
    """A context in which JAX computes on the CPU, in full precision, and allows fp64 if `dtype` is float64."""
    stack = ExitStack()
    stack.enter_context(jax.enable_x64(dtype == "float64"))
    stack.enter_context(jax.default_device(jax.devices("cpu")[0]))
    stack.enter_context(jax.default_matmul_precision("highest"))
    return stack


def compare_traces(
    module: nnx.Module, x: np.ndarray, theirs: Trace, *, dtype: str, grads: bool = False, replay: bool = True
) -> list[StageResult]:
    """Judges our module on `x` against the reference's trace. Call it inside `settings`.

    With `replay` our module follows the reference's choices of experts, but for those that a table makes: no rounding
    changes them.
    """
    config: Any = getattr(module, "config", None)
    by_table = isinstance(config, MoEConfig) and bool(config.router.table_tokens)
    ours = trace_ours(module, x, choices(theirs) if replay and not by_table else None, grads=grads)
    return judge_traces(module, ours, theirs, dtype)


def judge_traces(module: nnx.Module, ours: Trace, theirs: Trace, dtype: str) -> list[StageResult]:
    """Judges every stage that both sides have by the dtype's tolerances, and our traced stages against our own call."""
    scores = {}
    for place in theirs:
        logits = place._replace(kind="router_logits")
        if place.kind == "experts" and logits in ours and logits in theirs:
            scores[place] = ranked(module, place.layer, ours[logits]), ranked(module, place.layer, theirs[logits])
    return [judge(stage) for stage in pair(ours, {**theirs, OWN: ours[TAPPED]}, TOLERANCES[dtype], scores)]


def choices(theirs: Trace) -> list[np.ndarray] | None:
    """The experts that a side chose, for each mixture; None if the trace has none."""
    found = [value for place, value in theirs.items() if place.kind == "experts"]
    return found or None


def ranked(module: nnx.Module, layer: int | None, logits: np.ndarray) -> np.ndarray:
    """The scores by which a layer of the module ranks its experts."""
    if isinstance(module, MoE):
        bias = module.router.weight("correction_bias")
        return ranked_scores(logits, module.config, None if bias is None else np.asarray(bias))
    return logits  # language models have no correction bias, and their scores rank as the logits do


def cotangent(x: Any) -> np.ndarray:
    """The random numbers, of a fixed seed, that a layer's output is multiplied by before it is summed into a loss."""
    return np.random.default_rng(x.size).standard_normal(x.shape).astype(x.dtype)


def trace_ours(
    module: Any, x: np.ndarray, replay: list[np.ndarray] | None = None, *, grads: bool = False
) -> dict[Place, np.ndarray]:
    """The JAX side: every stage, and from the own call of the model the output, losses and, with `grads`, gradients."""
    replayed = None if replay is None else jnp.stack([jnp.asarray(expert, jnp.int32) for expert in replay])
    if isinstance(module, Decoder | MakeMoE):
        taps = tap_model(module, x, replayed)
    else:
        taps = tap_layer(module, x, None if replayed is None else replayed[0])
    trace = {place: np.asarray(value) for place, value in taps.items()}
    last = Place("logits") if isinstance(module, Decoder | MakeMoE) else Place("combined")
    answer, values, gradients = own_call(module, x, replayed, grads)
    trace |= {TAPPED: trace[last], last: answer, **values, OWN: answer}
    named = to_torch(module, gradients, layout=reference_table(module).name) if grads else {}
    return trace | {Place("gradient", None, name): value for name, value in named.items()}


def own_call(
    module: nnx.Module, x: np.ndarray, replay: jax.Array | None, grads: bool
) -> tuple[np.ndarray, dict[Place, np.ndarray], Any]:
    """The model's output, its losses and, with `grads`, the gradients of its objective as a tree of its parameters."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    (answer, values), gradients = _compiled_call(graphdef, grads, params, rest, jnp.asarray(x), replay)
    return np.asarray(answer), {Place(kind): np.asarray(value) for kind, value in values.items()}, gradients


@partial(jax.jit, static_argnums=(0, 1))
def _compiled_call(graphdef: Any, grads: bool, params: Any, rest: Any, x: jax.Array, replay: jax.Array | None) -> Any:
    def run(params: Any) -> Any:
        return _objective(nnx.merge(graphdef, params, rest), x, replay)

    if not grads:
        return run(params)[1], None
    (_, found), gradients = jax.value_and_grad(run, has_aux=True)(params)
    return found, gradients


def _objective(module: Any, x: jax.Array, replay: jax.Array | None) -> Any:
    """The loss to differentiate, and (output, {name: loss})."""
    if not isinstance(module, Decoder | MakeMoE):
        replayed = {} if replay is None else {"expert_BTK": replay[0]}
        y_BTD, _ = module(x, training=False, **replayed, **beside_vectors(module.config, x))
        return (y_BTD * cotangent(x)).sum(), (y_BTD, {})
    output = module.run(x, training=False, expert_LBTK=replay)
    loss = next_token_loss(output.logits_BTV[:, :-1], x[:, 1:])
    if isinstance(module, MakeMoE):
        return loss, (output.logits_BTV, {"loss": loss})
    balance = pool_balance_loss(output.stats, module.config.moe)
    loss += module.config.balance_loss_weight * balance
    return loss, (output.logits_BTV, {"balance_loss": balance, "loss": loss})


def folder_round_trip(path: Path, model: Decoder) -> StageResult:
    """The loaded weights, written under the names of the files, against the files."""
    found = open_folder(path)
    assert found.plan is not None
    ours = to_torch(model, layout=found.plan.table.name)
    differ = [name for name, header in found.tensors.items() if not same_bits(ours[name], np.asarray(header.read()))]
    return _tensors_that_differ(differ, len(ours))


def checkpoint_round_trip(checkpoint: Checkpoint) -> StageResult:
    """The weights converted to `torch_ref` and back, against themselves."""
    state = to_torch(checkpoint.module)
    dtype = np.dtype(next(iter(checkpoint.weights.values())).dtype)
    copy = from_torch(abstract_module(type(checkpoint.module), checkpoint.config, dtype), state)
    before, after = checkpoint.weights, Checkpoint(checkpoint.family, copy).weights
    return _tensors_that_differ([name for name in before if not same_bits(before[name], after[name])], len(before))


def _tensors_that_differ(names: list[str], count: int) -> StageResult:
    where = f"{len(names)} of {count} tensors differ, first {names[0]}" if names else ""
    verdict: Verdict = "wrong number" if names else "same"
    return StageResult("round trip of weights", None, "checkpoint", float(len(names)), 0.0, verdict, where)
