"""A Hugging Face folder in both frameworks: our Decoder against `transformers`, on one batch of random tokens, in fp32.

Needs PyTorch and transformers, imported when `compare` runs. Of the folder only config.json and the weights are used, no code.
"""

import importlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.losses import pool_balance_loss
from jax_moe.models.decoder import Decoder
from jax_moe.porting.api import to_torch
from jax_moe.porting.families import tables_of
from jax_moe.porting.families.hf import family_named
from jax_moe.porting.files import same_bits
from jax_moe.porting.hf_folder import open_folder
from jax_moe.porting.parity import CPU, Check, relative_error
from jax_moe.porting.pretrained import load_pretrained
from jax_moe.porting.torch_files import import_torch

# Measured worst over the 15 models of parity_tests/hf_cases.py and one of 24 layers: 9.8e-7, 2.1e-7 and 3.6e-6.
LOGITS, LOSS, GRADIENTS = 1e-5, 2e-6, 2e-5
SMALL = 1e-3  # a gradient's scale is its norm, and at least this share of the largest
FUSED = 1  # the place among a family's tables of the names that transformers has in memory


class Answers(NamedTuple):
    """What one side computes."""

    logits_BTV: np.ndarray
    expert_LSK: np.ndarray  # the experts of every token in every mixture, best first
    loss: float  # cross-entropy of the next token plus the weighted balance loss
    gradients: dict[str, np.ndarray]
    gap: float  # the smallest distance of two router logits at which a choice could change; ours: 0


def compare(path: Path, *, batch_size: int = 2, num_tokens: int | None = None, seed: int = 0) -> list[Check]:
    """The checks. Raises ValueError if PyTorch or transformers is absent."""
    transformers = import_transformers()
    with jax.default_device(jax.devices(CPU)[0]), jax.default_matmul_precision("highest"):
        stored = load_pretrained(path)
        checks = [_there_and_back(path, stored)]
        model = load_pretrained(path, dtype="float32")
        tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (batch_size, num_tokens or 16))
        return checks + _errors(_run_jax(model, tokens), _run_reference(transformers, path, model, tokens))


def import_transformers() -> Any:
    """transformers, or a ValueError that says how to get it."""
    import_torch("parity")
    try:
        return importlib.import_module("transformers")
    except ImportError:
        hint = "pip install 'jax-moe[hf]'"
        raise ValueError(f"parity of a Hugging Face folder needs transformers, which is not installed: {hint}") from None


def _there_and_back(path: Path, model: Decoder) -> Check:
    """The loaded weights under the names of the files, against the files."""
    with open_folder(path) as folder:
        ours = to_torch(model, layout=folder.plan.table.name)
        differ = [name for name, header in folder.headers.items() if not same_bits(ours[name], np.asarray(header.read()))]
    return Check("weights there and back", float(len(differ)), 0.0, ", ".join(differ[:1]))


@partial(jax.jit, static_argnums=0)
def _loss_and_gradients(graphdef: Any, params: Any, tokens_BT: jax.Array) -> Any:
    def loss(params: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params)
        output = model.run(tokens_BT)
        log_probs = jax.nn.log_softmax(output.logits_BTV[:, :-1])
        entropy = -jnp.take_along_axis(log_probs, tokens_BT[:, 1:, None], axis=-1).mean()
        return entropy + model.config.balance_loss_weight * pool_balance_loss(output.stats, model.config.moe), output

    return jax.value_and_grad(loss, has_aux=True)(params)


def _run_jax(model: Decoder, tokens: np.ndarray) -> Answers:
    graphdef, params = nnx.split(model)
    (value, output), gradients = _loss_and_gradients(graphdef, params, jnp.asarray(tokens))
    layout = tables_of(model)[FUSED].name
    choices = np.asarray(output.expert_LBTK)
    return Answers(
        np.asarray(output.logits_BTV), choices.reshape(len(choices), -1, choices.shape[-1]), float(value),
        to_torch(model, gradients, layout=layout), 0.0,
    )


def _run_reference(transformers: Any, path: Path, model: Decoder, tokens: np.ndarray) -> Answers:
    torch = import_torch("parity")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    assert model.origin is not None
    kind = getattr(transformers, family_named(model.origin.model_type).architecture)
    reference = kind.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", local_files_only=True,
        output_router_logits=True,
    ).eval()
    inputs = torch.from_numpy(tokens)
    output = reference(inputs, labels=inputs, use_cache=False)
    output.loss.backward()
    gradients = {
        name: np.zeros(tuple(value.shape), np.float32) if value.grad is None else value.grad.numpy()
        for name, value in reference.named_parameters()
    }
    logits_LSE = torch.stack([one.detach() for one in output.router_logits])
    values, order = torch.sort(logits_LSE, dim=-1, descending=True, stable=True)
    K = model.config.moe.top_k
    gap = (values[..., :-1] - values[..., 1:])[..., :K]
    return Answers(
        output.logits.detach().numpy(), order[..., :K].numpy(), output.loss.item(), gradients,
        float(gap.min()) if gap.numel() else float("inf"),
    )


def _errors(ours: Answers, theirs: Answers) -> list[Check]:
    other = float((ours.expert_LSK != theirs.expert_LSK).sum())
    near = f"of {ours.expert_LSK.size:,}; the closest router logits are {theirs.gap:.1e} apart"
    checks = [
        Check("logits, float32", relative_error(ours.logits_BTV, theirs.logits_BTV), LOGITS),
        Check("other experts chosen", other, 0.0, near),
        Check("loss, float32", relative_error(np.asarray(ours.loss), np.asarray(theirs.loss)), LOSS),
    ]
    if ours.gradients.keys() != theirs.gradients.keys():
        odd = sorted(ours.gradients.keys() ^ theirs.gradients.keys())
        return [*checks, Check("gradients, float32", float("inf"), GRADIENTS, f"names differ: {', '.join(odd[:5])}")]
    least = SMALL * max(float(np.linalg.norm(value)) for value in theirs.gradients.values())
    errors = {name: _by_norm(ours.gradients[name], value, least) for name, value in theirs.gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    where = f"{worst}, the worst of {len(errors)} by norm"
    return [*checks, Check("gradients, float32", errors[worst], GRADIENTS, where)]


def _by_norm(ours: np.ndarray, theirs: np.ndarray, least: float) -> float:
    """|ours - theirs| / max(|theirs|, least) by norm; infinite if a value is not finite."""
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    difference = float(np.linalg.norm(ours - theirs))
    return 0.0 if difference == 0 else difference / max(float(np.linalg.norm(theirs)), least)
