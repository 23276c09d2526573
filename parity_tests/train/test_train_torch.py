"""`--framework torch` against JAX: equal weights, batches and, without randomness, loss curves."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")

from moe_parity.training.jax_side import expert_counts  # noqa: E402
from moe_train import loop  # noqa: E402
from moe_train.configs.settings import ModelSettings, OptimizerSettings, TrainConfig, model_config  # noqa: E402
from moe_train.data import text as data  # noqa: E402
from moe_train.learners.jax_learner import JaxLearner  # noqa: E402
from moe_train.learners.models import FreshMakeMoE  # noqa: E402
from moe_train.learners.optimizer import make_optimizer  # noqa: E402
from moe_train.learners.torch_learner import TorchLearner  # noqa: E402
from moe_train.run import metrics  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick")
TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(60))
CONFIG = TrainConfig(
    steps=10, batch_size=8, seed=3,
    model=ModelSettings(block_size=8, model_dim=16, num_heads=2, num_layers=2, num_experts=4, dropout=0.0, noise=False),
    optimizer=OptimizerSettings(
        clip_norm=1.0, warmup_steps=3, decay="cosine", final_learning_rate=1e-4, balance_loss_weight=0.01,
        router_z_loss_weight=0.001,
    ),
)


def curve(learner: Any, text: data.Text, config: TrainConfig) -> tuple[list[float], dict[str, np.ndarray], Any]:
    """Ten losses, the weights after them, and an evaluation."""

    def batch(use: data.Use, step: int) -> np.ndarray:
        return data.batch(text, config.seed, use, step, config.batch_size, config.model.block_size)

    losses = [float(learner.train_step(step, batch("train", step))) for step in range(config.steps)]
    return losses, learner.weights(), learner.evaluate(10, "eval_val", [batch("eval_val", 10)])


def test_ten_steps_are_the_same_in_both() -> None:
    text = data.tokenize(TEXT, "here", 8)
    model = model_config(CONFIG, len(text.vocabulary))
    ours, theirs = JaxLearner(CONFIG, FreshMakeMoE(model)), TorchLearner(CONFIG, model)
    start = ours.weights()
    for name, value in theirs.weights().items():
        np.testing.assert_array_equal(value, start[name], err_msg=name)
    (loss_j, weights_j, mean_j), (loss_t, weights_t, mean_t) = curve(ours, text, CONFIG), curve(theirs, text, CONFIG)
    np.testing.assert_allclose(loss_j, loss_t, rtol=5e-6)  # measured: 7e-7
    assert loss_j[0] - loss_j[-1] > 0.1  # measured: 0.136
    for name, value in weights_t.items():
        np.testing.assert_allclose(weights_j[name], value, rtol=0, atol=5e-6, err_msg=name)  # measured: 7e-7
    assert mean_j.dropped_fraction_L == mean_t.dropped_fraction_L and max(mean_j.dropped_fraction_L) > 0
    assert mean_j.loss == pytest.approx(mean_t.loss, rel=5e-6)  # measured: 7e-7
    for name in ("expert_load_LE", "router_entropy_L", "load_balance_loss_L"):
        np.testing.assert_allclose(getattr(mean_j, name), getattr(mean_t, name), rtol=2e-6)  # measured: 2e-7


def test_noise_is_off_at_evaluation_where_asked() -> None:
    config = dataclasses.replace(CONFIG, eval_noise=False, model=dataclasses.replace(CONFIG.model, noise=True))
    text = data.tokenize(TEXT, "here", 8)
    model = model_config(config, len(text.vocabulary))
    batches = [data.batch(text, 1, "eval_val", 0, 8, 8)]
    ours = JaxLearner(config, FreshMakeMoE(model)).evaluate(0, "eval_val", batches)
    theirs = TorchLearner(config, model).evaluate(0, "eval_val", batches)
    assert ours.loss == pytest.approx(theirs.loss, rel=5e-7)  # measured: 6e-8
    assert ours.dropped_fraction_L == theirs.dropped_fraction_L


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    settings = (
        "--framework torch --data text.txt --steps 6 --eval-every 2 --eval-batches 1 --checkpoint-every 4 "
        "--batch-size 8 --num-layers 1 --model-dim 16 --num-heads 2 --num-experts 4 --block-size 8 "
        "--warmup-steps 0 --sample-length 5 --out run"
    )

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train/train.py", *(words or settings.split())])
        code = loop.main()
        return code, capsys.readouterr().err

    return call


def test_torch_runs_resume_bit_for_bit_and_refuse_damage(command) -> None:
    assert command() == (0, "")
    folder = Path("run")
    rows, weights = metrics.read(folder), (folder / "model.safetensors").read_bytes()
    (folder / "checkpoints" / "6.pt").unlink()
    assert command("--resume", "--out", "run") == (0, "")
    without_clock = [[{**row, "tokens_per_second": None} for row in some] for some in (rows, metrics.read(folder))]
    assert without_clock[0] == without_clock[1]
    assert (folder / "model.safetensors").read_bytes() == weights
    written = json.loads((folder / "config.json").read_text())
    written["settings"]["model_dim"] = 32
    (folder / "config.json").write_text(json.dumps(written))
    code, error = command("--resume", "--out", "run")
    assert code == 2 and "6.pt: must be of this model" in error and error.count("\n") == 1
    path = folder / "checkpoints" / "6.pt"
    path.write_bytes(path.read_bytes()[:5000])
    code, error = command("--resume", "--out", "run")
    assert code == 2 and "6.pt: must be a whole checkpoint" in error and error.count("\n") == 1


def test_experts_without_tokens_are_skipped_in_both() -> None:
    """Equal curves, weights and step counts with `--unchosen skip`; small batches leave experts without tokens."""
    config = dataclasses.replace(
        CONFIG, batch_size=1, model=dataclasses.replace(CONFIG.model, block_size=4, num_experts=8),
        optimizer=dataclasses.replace(CONFIG.optimizer, unchosen="skip", weight_decay=0.5),
    )
    text = data.tokenize(TEXT, "here", 4)
    model = model_config(config, len(text.vocabulary))
    ours, theirs = JaxLearner(config, FreshMakeMoE(model)), TorchLearner(config, model)
    (loss_j, weights_j, _), (loss_t, weights_t, _) = curve(ours, text, config), curve(theirs, text, config)
    np.testing.assert_allclose(loss_j, loss_t, rtol=2e-6)  # measured: 2.3e-7
    for name, value in weights_t.items():
        np.testing.assert_allclose(weights_j[name], value, rtol=0, atol=5e-6, err_msg=name)  # measured: 7e-7
    (counts_LE,) = expert_counts(ours.state["optimizer"]).values()
    steps = {name: theirs.optimizer.state[p].get("step", 0) for name, p in theirs.model.named_parameters()}
    for (layer, expert), count in np.ndenumerate(counts_LE):
        assert {int(n) for name, n in steps.items() if name.startswith(f"blocks.{layer}.smoe.experts.{expert}.")} == {
            count
        }
    assert counts_LE.min() < 5 and counts_LE.max() == config.steps and steps["lm_head.weight"] == config.steps


@pytest.mark.parametrize("unchosen", ["skip", "decay"])
def test_clipping_is_torchs(unchosen: str) -> None:
    """With a norm as small as torch's added 1e-6, the result is a third of optax's own clipping."""
    gradient = np.asarray([3e-7, -4e-7, 0.0], np.float32)
    parameter = torch.zeros(3, requires_grad=True)
    parameter.grad = torch.from_numpy(gradient.copy())
    torch.nn.utils.clip_grad_norm_([parameter], 1e-7)
    torch.optim.AdamW([parameter], lr=1e-3, eps=1.0).step()
    optimizer = make_optimizer(
        OptimizerSettings(eps=1.0, clip_norm=1e-7, unchosen=unchosen), 10, {}  # type: ignore[arg-type]
    )
    params = {"w": jnp.zeros(3)}
    update, _ = optimizer.update({"w": jnp.asarray(gradient)}, optimizer.init(params), params)
    np.testing.assert_allclose(update["w"], parameter.detach().numpy(), rtol=2e-6)  # measured: 2.4e-7
