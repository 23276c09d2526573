"""One checkpoint in both frameworks on one batch: their run, our tapped run on their choices, and the verdicts.

The two sides run one after the other, so that memory holds one model at a time.
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
from jax_moe.dims import wide
from jax_moe.disk import same_bits
from jax_moe.losses import pool_balance_loss
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE
from jax_moe.moe import MoE
from jax_moe.porting.checkpoint import Checkpoint
from jax_moe.porting.families import tables_of
from jax_moe.porting.formats.hf_folder import open_folder
from jax_moe.porting.pretrained import load_pretrained
from jax_moe.porting.state_dict import abstract_module, from_torch, to_torch
from jax_moe.porting.torch_tensors import import_torch
from jax_moe.soft_moe import SoftMoE
from moe_parity.explain import search
from moe_parity.report import Report
from moe_parity.sides.jax_moe import ranked_scores, tap_model, tap_moe, tap_soft_moe
from moe_parity.sides.torch_ref import trace_torch_ref
from moe_parity.sides.transformers import import_transformers, trace_transformers
from moe_parity.stages import Place, StageResult, Trace, first_divergence, judge, pair
from moe_parity.tolerances import TOLERANCES

FUSED = 1  # the place among a family's tables of the names that transformers has in memory
OWN, TAPPED = Place("own_call", None, "against our taps"), Place("tapped")


def compare_folder(
    path: Path, tokens_BT: np.ndarray, *, dtype: str = "float32", grads: bool = False, replay: bool = True, explain: bool = False
) -> Report:
    """A Hugging Face folder against `transformers`. Raises ValueError if PyTorch or transformers is absent."""
    version = import_transformers().__version__
    check_batch("tokens_BT", tokens_BT)
    with settings(dtype):
        stored = load_pretrained(path)
        assert stored.origin is not None
        model_type = stored.origin.model_type
        results = [folder_there_and_back(path, stored)]
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
    """A makeMoE model or a layer against `torch_ref`, on tokens or vectors. Raises ValueError if PyTorch is absent."""
    import_torch("parity")
    family, config = checkpoint.family, checkpoint.config
    check_batch("tokens_BT" if family == "makemoe" else "x_BTD", x, None if family == "makemoe" else config.model_dim)
    results = [checkpoint_there_and_back(checkpoint)]
    with settings(dtype):
        x = x if family == "makemoe" else x.astype(dtype)
        weights = {name: np.asarray(value, dtype) for name, value in to_torch(checkpoint.module).items()}
        theirs = trace_torch_ref(family, config, weights, x, None if family == "makemoe" else cotangent(x), grads)
        module = from_torch(abstract_module(family, config, np.dtype(dtype)), weights, cast=True)
        results += compare_traces(module, x, theirs, dtype=dtype, grads=grads, replay=replay)
        words = explained(module, x, theirs, results) if explain else ""
    return Report(family, "torch_ref", dtype, x.shape, replay, tuple(results), words)


def check_batch(name: str, x: np.ndarray, model_dim: int | None = None) -> None:
    """Raises ValueError for a batch of another kind, rank or width, and for an empty one: nothing agrees with nothing."""
    checked_input(name, x, model_dim)
    require(x.size > 0, f"{name}.shape", x.shape, "of at least one position")


def explained(module: nnx.Module, x: np.ndarray, theirs: Trace, results: list[StageResult]) -> str:
    """Which known convention makes our output theirs, where something is beyond tolerance. Within `settings`."""
    if first_divergence(results) is None or isinstance(module, SoftMoE):
        return ""
    return search.explain_traces(module, x, theirs)


def settings(dtype: str) -> AbstractContextManager:
    """Both sides on the CPU in full precision, jax in fp64 where that is asked for."""
    stack = ExitStack()
    stack.enter_context(jax.enable_x64(dtype == "float64"))
    stack.enter_context(jax.default_device(jax.devices("cpu")[0]))
    stack.enter_context(jax.default_matmul_precision("highest"))
    return stack


def compare_traces(
    module: nnx.Module, x: np.ndarray, theirs: Trace, *, dtype: str, grads: bool = False, replay: bool = True
) -> list[StageResult]:
    """Our module on `x` against what another side computed; with `replay` it follows their choices. Within `settings`."""
    ours = trace_ours(module, x, choices(theirs) if replay else None, grads=grads)
    return judge_traces(module, ours, theirs, dtype)


def judge_traces(module: nnx.Module, ours: Trace, theirs: Trace, dtype: str) -> list[StageResult]:
    """Every stage that both sides have, judged by the dtype's tolerances; and our taps against our own call."""
    scores = {}
    for place in theirs:
        logits = place._replace(kind="router_logits")
        if place.kind == "experts" and logits in ours and logits in theirs:
            scores[place] = ranked(module, place.layer, ours[logits]), ranked(module, place.layer, theirs[logits])
    return [judge(stage) for stage in pair(ours, {**theirs, OWN: ours[TAPPED]}, TOLERANCES[dtype], scores)]


def choices(theirs: Trace) -> list[np.ndarray] | None:
    """The experts that a side chose, mixture by mixture."""
    found = [value for place, value in theirs.items() if place.kind == "experts"]
    return found or None


def ranked(module: nnx.Module, layer: int | None, logits: np.ndarray) -> np.ndarray:
    """What experts are ranked by in a layer of the module."""
    if isinstance(module, MoE):
        bias = module.router.weight("correction_bias")
        return ranked_scores(logits, module.config, None if bias is None else np.asarray(bias))
    return logits  # the language models have neither a correction bias nor scores other than softmax


def cotangent(x: Any) -> np.ndarray:
    """What a layer's answer is multiplied with before it is summed: seeded numbers."""
    return np.random.default_rng(x.size).standard_normal(x.shape).astype(x.dtype)


def trace_ours(
    module: nnx.Module, x: np.ndarray, replay: list[np.ndarray] | None = None, *, grads: bool = False
) -> dict[Place, np.ndarray]:
    """Our side: the taps, and from the model's own call the answer, the loss and, if asked for, every gradient."""
    replayed = None if replay is None else jnp.stack([jnp.asarray(one, jnp.int32) for one in replay])
    if isinstance(module, Decoder | MakeMoE):
        taps = tap_model(module, x, replayed)
    elif isinstance(module, SoftMoE):
        taps = tap_soft_moe(module, x)
    else:
        assert isinstance(module, MoE)
        taps = tap_moe(module, x, None if replayed is None else replayed[0])
    trace = {place: np.asarray(value) for place, value in taps.items()}
    last = Place("logits") if isinstance(module, Decoder | MakeMoE) else Place("combined")
    answer, values, gradients = own_call(module, x, replayed, grads)
    trace |= {TAPPED: trace[last], last: answer, **values, OWN: answer}
    named = to_torch(module, gradients, layout=layout_of(module)) if grads else {}
    return trace | {Place("gradient", None, name): value for name, value in named.items()}


def layout_of(module: nnx.Module) -> str | None:
    """The names that the other side has in memory."""
    return tables_of(module)[FUSED].name if isinstance(module, Decoder) else None


def own_call(
    module: nnx.Module, x: np.ndarray, replay: jax.Array | None, grads: bool
) -> tuple[np.ndarray, dict[Place, np.ndarray], Any]:
    """The module's answer, its losses and, with `grads`, the gradients of its objective, which is a tree of its parameters."""
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


def _objective(module: nnx.Module, x: jax.Array, replay: jax.Array | None) -> Any:
    """What is differentiated, and (answer, {loss: value})."""
    if isinstance(module, Decoder):
        output = module.run(x, expert_LBTK=replay)
        balance = pool_balance_loss(output.stats, module.config.moe)
        loss = next_token_loss(output.logits_BTV, x) + module.config.balance_loss_weight * balance
        return loss, (output.logits_BTV, {"balance_loss": balance, "loss": loss})
    if isinstance(module, MakeMoE):
        logits_BTV = module(x, training=False, expert_LBTK=replay)
        if x.shape[1] < 2:
            return logits_BTV.sum() * 0, (logits_BTV, {})
        loss = next_token_loss(logits_BTV, x)
        return loss, (logits_BTV, {"loss": loss})
    if isinstance(module, SoftMoE):
        y_BTD = module(x)
    else:
        assert isinstance(module, MoE)
        y_BTD, _ = module(x, training=False, expert_BTK=None if replay is None else replay[0])
    return (y_BTD * cotangent(x)).sum(), (y_BTD, {})


def next_token_loss(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The mean cross-entropy of every token but the first, in fp32 or wider."""
    log_probs = jax.nn.log_softmax(logits_BTV[:, :-1].astype(wide(logits_BTV.dtype)))
    return -jnp.take_along_axis(log_probs, tokens_BT[:, 1:, None], axis=-1).mean()


def folder_there_and_back(path: Path, model: Decoder) -> StageResult:
    """The loaded weights under the names of the files, against the files."""
    with open_folder(path) as folder:
        ours = to_torch(model, layout=folder.plan.table.name)
        differ = [name for name, header in folder.headers.items() if not same_bits(ours[name], np.asarray(header.read()))]
    return _tensors_that_differ(differ, len(ours))


def checkpoint_there_and_back(checkpoint: Checkpoint) -> StageResult:
    """The weights under `torch_ref`'s names and back under ours, against themselves."""
    state = to_torch(checkpoint.module)
    dtype = np.dtype(next(iter(checkpoint.weights.values())).dtype)
    copy = from_torch(abstract_module(checkpoint.family, checkpoint.config, dtype), state)
    before, after = checkpoint.weights, Checkpoint(checkpoint.family, copy).weights
    return _tensors_that_differ([name for name in before if not same_bits(before[name], after[name])], len(before))


def _tensors_that_differ(names: list[str], count: int) -> StageResult:
    where = f"{len(names)} of {count} tensors differ, first {names[0]}" if names else ""
    verdict = "wrong number" if names else "same"
    return StageResult("weights there and back", None, "checkpoint", float(len(names)), 0.0, verdict, where)
