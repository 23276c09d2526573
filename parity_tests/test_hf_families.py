"""Every Hugging Face family against `transformers`: logits, choices, gradients, twenty steps, and files bit for bit."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

pytest.importorskip("torch", reason="the reference is PyTorch")
pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

import torch

import jax_moe
from jax_moe.losses import pool_balance_loss
from jax_moe.porting.files import read_safetensors
from parity_tests import hf_cases
from parity_tests.compare import MismatchError, check_close, check_exact
from parity_tests.hf_cases import CASES, Case, batch, draw_weights, reference_choices, run_reference, save_reference

LEARNING_RATE, DECAY, STEPS = 3e-3, 0.01, 20
# Measured worst over all cases: 7.9e-7, 1.5e-15, 2.6e-6, 2.3e-7 and 3.3e-6.
LOGITS, LOGITS_WIDE, GRADIENTS, LOSS, CURVES = 5e-6, 1e-14, 2e-5, 2e-6, 1e-5
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes the time here, not running
MARGIN = 1e-4  # chosen and not chosen router logits lie at least this far apart: rounding cannot change a choice


def optimiser() -> optax.GradientTransformation:
    """AdamW as torch has it."""
    return optax.adamw(LEARNING_RATE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=DECAY)


def training_loss(model: jax_moe.Decoder, batch: dict[str, Any]) -> tuple[jax.Array, Any]:
    """Cross-entropy of the next token over the labels that count, plus the weighted balance loss; and the output."""
    output = model.run(batch["tokens"], mask_BT=batch["mask"])
    labels = batch["labels"][:, 1:]
    counts = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(output.logits_BTV[:, :-1], jnp.where(counts, labels, 0))
    loss = (losses * counts).sum() / counts.sum()
    config = model.config
    return loss + config.balance_loss_weight * pool_balance_loss(output.stats, config.moe), output


@cache
def stepper(graphdef: Any) -> Any:
    """One jitted step: loss, output, gradients, and weights and optimiser after it."""

    @partial(jax.jit, compiler_options=QUICK)
    def step(params: Any, state: Any, batch: dict[str, Any]) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            return training_loss(nnx.merge(graphdef, params), batch)

        (value, output), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimiser().update(gradients, state, params)
        return value, output, gradients, optax.apply_updates(params, updates), state

    return step


def to_jax(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """The batch on the device."""
    return {name: jnp.asarray(value) for name, value in batch.items()}


class Pair:
    """A case on both sides: the reference, and the decoder loaded from the folder that the reference wrote."""

    def __init__(self, case: Case, folder: Path):
        self.case = case
        self.reference = case.reference(case.config()).train()
        draw_weights(self.reference, seed=1)
        self.folder = save_reference(self.reference, folder / "theirs")
        self.model = jax_moe.load_pretrained(self.folder)
        self.graphdef, self.params = nnx.split(self.model)
        self.layout = jax_moe.porting.families.tables_of(self.model)[1].name


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """The pairs made so far, by name."""
    return {}


@pytest.fixture
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The pair of the test's case, made once."""
    case = request.param
    if case.name not in pairs:
        pairs[case.name] = Pair(case, tmp_path_factory.mktemp(case.name))
    return pairs[case.name]


every_case = pytest.mark.parametrize("pair", CASES, indirect=True, ids=[case.name for case in CASES])


@every_case
def test_one_step(pair: Pair) -> None:
    """Logits of real tokens, all choices of real tokens, the loss, and the gradient of every parameter."""
    data = batch(pair.case, seed=2)
    pair.reference.zero_grad()
    expected = run_reference(pair.reference, data)
    expected.loss.backward()
    params, step = pair.params, stepper(pair.graphdef)
    loss, output, gradients, _, _ = step(params, optimiser().init(params), to_jax(data))
    mask, moe = data["mask"], pair.model.config.moe
    choices, gap = reference_choices(expected.router_logits, mask, moe.top_k)
    assert gap > MARGIN, f"a choice hangs on {gap}"
    assert all(len(np.unique(layer)) == moe.num_experts for layer in choices), "some expert was never chosen"
    ours = np.asarray(output.expert_LBTK)[:, mask]
    check_exact({"experts": ours}, {"experts": choices.astype(ours.dtype)}, "chosen experts")
    errors = {
        "logits": check_close(
            {"logits": np.asarray(output.logits_BTV)[mask]}, {"logits": expected.logits.detach().numpy()[mask]}, LOGITS, "logits"
        ),
        "loss": check_close({"loss": np.asarray(loss)}, {"loss": expected.loss.detach().numpy()}, LOSS, "loss"),
    }
    theirs = {name: p.grad.numpy() for name, p in pair.reference.named_parameters()}
    mine = jax_moe.to_torch(pair.model, gradients, layout=pair.layout)
    errors["gradients"] = check_close(mine, theirs, GRADIENTS, "gradients")
    print(pair.case.name, {name: f"{error:.1e}" for name, error in errors.items()}, f"gap {gap:.1e}")


@every_case
def test_twenty_steps(pair: Pair) -> None:
    """AdamW on the same batches: the same losses."""
    reference = pair.case.reference(pair.case.config()).train()
    reference.load_state_dict(pair.reference.state_dict())
    theirs = torch.optim.AdamW(reference.parameters(), lr=LEARNING_RATE, weight_decay=DECAY)
    params, state = pair.params, optimiser().init(pair.params)
    curves: tuple[list[float], list[float]] = ([], [])
    for number in range(STEPS):
        data = batch(pair.case, seed=100 + number % 4)
        theirs.zero_grad()
        loss = run_reference(reference, data).loss
        loss.backward()
        theirs.step()
        value, _, _, params, state = stepper(pair.graphdef)(params, state, to_jax(data))
        curves[0].append(float(value))
        curves[1].append(loss.item())
    mine, expected = ({"curve": np.asarray(curve)} for curve in curves)
    error = check_close(mine, expected, CURVES, "loss curve")
    assert curves[1][-1] < curves[1][3], "nothing was learned"
    print(pair.case.name, f"curve {error:.1e}")


@every_case
def test_round_trip(pair: Pair, tmp_path: Path) -> None:
    """Loaded and saved: every tensor bit for bit, config.json too; the fused layout loads to the same weights."""
    jax_moe.save_pretrained(pair.model, tmp_path / "ours", max_shard_bytes=20_000)
    saved = {}
    for file in sorted((tmp_path / "ours").glob("*.safetensors")):
        saved |= read_safetensors(file)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    check_exact(saved, read_safetensors(pair.folder / "model.safetensors"), "saved tensors")
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (pair.folder / file).read_bytes()
    fused = jax_moe.load_pretrained(save_reference(pair.reference, tmp_path / "fused", fused=True))
    same = [jax_moe.to_torch(model, layout=pair.layout) for model in (pair.model, fused)]
    check_exact(same[1], same[0], "weights from the fused layout")
    again = type(pair.reference).from_pretrained(tmp_path / "ours")
    state = {name: value.numpy() for name, value in again.state_dict().items()}
    check_exact(state, {n: v.numpy() for n, v in pair.reference.state_dict().items()}, "what transformers loads of ours")


@every_case
def test_logits_in_fp64(pair: Pair) -> None:
    """The reference with every float32 widened: logits to fp64's precision."""
    data = batch(pair.case, seed=3)
    with hf_cases.widened(), torch.no_grad():
        reference = pair.case.reference(pair.case.config()).double()
        reference.load_state_dict(pair.reference.state_dict())
        expected = run_reference(reference, data).logits.numpy()
    with jax.enable_x64(True):
        model = jax_moe.load_pretrained(pair.folder, dtype="float64")
        forward = jax.jit(lambda model, tokens, mask: model(tokens, mask_BT=mask), compiler_options=QUICK)
        logits = forward(model, data["tokens"], data["mask"])
    mask = data["mask"]
    error = check_close({"logits": np.asarray(logits)[mask]}, {"logits": expected[mask]}, LOGITS_WIDE, "logits in fp64")
    print(pair.case.name, f"logits64 {error:.1e}")


def swap(model: jax_moe.Decoder) -> None:
    """Gate and up of every expert."""
    experts = model.moe.experts
    experts.gate[...], experts.up[...] = experts.up[...], experts.gate[...]


def shift_layers(model: jax_moe.Decoder) -> None:
    """The mixtures of two layers in each other's place."""
    model.moe.router.kernel[...] = jnp.roll(model.moe.router.kernel[...], 1, axis=0)


def mix_heads(model: jax_moe.Decoder) -> None:
    """Query heads reversed: other key heads serve them."""
    model.blocks.attention.query[...] = model.blocks.attention.query[...][:, :, ::-1]
    model.blocks.attention.out[...] = model.blocks.attention.out[...][:, ::-1]


@pytest.mark.parametrize("fault", [swap, shift_layers, mix_heads], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("pair", CASES[:1], indirect=True, ids=["mixtral"])
def test_planted_fault_is_caught(pair: Pair, fault: Any) -> None:
    """Weights in the wrong place, with every shape right."""
    data = batch(pair.case, seed=2)
    expected = {"logits": run_reference(pair.reference, data).logits.detach().numpy()}
    step = stepper(pair.graphdef)

    def logits(params: Any) -> dict[str, np.ndarray]:
        return {"logits": np.asarray(step(params, optimiser().init(params), to_jax(data))[1].logits_BTV)}

    check_close(logits(pair.params), expected, LOGITS, "without a fault")
    model = jax_moe.load_pretrained(pair.folder)  # its own: a fault is made in place
    fault(model)
    with pytest.raises(MismatchError, match="logits"):
        check_close(logits(nnx.state(model)), expected, 1e3 * LOGITS, fault.__name__)
