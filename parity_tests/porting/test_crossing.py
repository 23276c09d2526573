"""Optimizer state from torch.optim to optax and back, in memory and through files; what does not fit is one line."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="crosses over from PyTorch, which is not installed")

import jax_moe  # noqa: E402
import torch_ref  # noqa: E402
from jax_moe.porting.optimizer.state import optimizer_from_torch, optimizer_to_torch  # noqa: E402
from moe_cli.main import main  # noqa: E402
from parity_tests.shared.compare import check_close, check_exact  # noqa: E402
from parity_tests.shared.filled import filled  # noqa: E402

CONFIG = jax_moe.MakeMoEConfig(vocab_size=11, block_size=8, model_dim=16, num_heads=2, num_layers=2, num_experts=4)


def small() -> tuple[jax_moe.MoE, torch_ref.MoE]:
    config = jax_moe.presets.mixtral(4, 6, 3, 2)
    return filled(lambda: jax_moe.MoE(config, rngs=nnx.Rngs(0))), torch_ref.MoE(config)


def trained(optimizer: Callable[[Any], Any], steps: int = 2) -> tuple[jax_moe.MoE, Any, list[str]]:
    """Our layer, a torch optimizer that has taken some steps, and the names of its parameters."""
    layer, module = small()
    torch.manual_seed(0)
    made = optimizer(module.parameters())
    for _ in range(steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        made.step()
    return layer, made, [name for name, _ in module.named_parameters()]


OPTIMIZERS: dict[str, tuple[Any, optax.GradientTransformation]] = {
    "adamw": (partial(torch.optim.AdamW, foreach=True), optax.adamw(optax.constant_schedule(1e-3))),
    "adam, clipped": (torch.optim.Adam, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))),
    "sgd, momentum": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)),
    "sgd, nesterov, schedule": (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        optax.chain(
            optax.add_decayed_weights(0.1), optax.sgd(optax.constant_schedule(0.1), momentum=0.9, nesterov=True)
        ),
    ),
    "sgd, plain": (partial(torch.optim.SGD, lr=0.1), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_state_there_and_back(name: str, steps: int) -> None:
    """Every moment bit for bit, and the same next step in both."""
    make, optimizer = OPTIMIZERS[name]
    layer, theirs, names = trained(make, steps)
    fresh = optimizer.init(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    count = steps if name.startswith("sgd") else None
    state = optimizer_from_torch(layer, theirs.state_dict(), fresh, names=names, step=count)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    back = optimizer_to_torch(layer, state, theirs.state_dict(), names=names)
    theirs.load_state_dict(back)
    assert back["param_groups"] == theirs.state_dict()["param_groups"]
    if steps and name != "sgd, plain":
        for i, entry in theirs.state_dict()["state"].items():
            check_exact(
                {k: v.numpy() for k, v in back["state"][i].items()}, {k: v.numpy() for k, v in entry.items()}, name
            )


def test_momentum_goes_on_as_it_was() -> None:
    """SGD with momentum and L2 decay: two steps in PyTorch and three in optax are five in PyTorch."""
    layer, theirs, names = trained(partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1))
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True))
    parameters = theirs.param_groups[0]["params"]
    jax_moe.from_torch(layer, dict(zip(names, parameters, strict=True)))
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    state = optimizer_from_torch(layer, theirs.state_dict(), optimizer.init(params), names=names)
    for step in range(3):
        gradients = {
            name: np.full(tuple(p.shape), 0.1 * step, np.float32) for name, p in zip(names, parameters, strict=True)
        }
        for name, parameter in zip(names, parameters, strict=True):
            parameter.grad = torch.from_numpy(gradients[name])
        theirs.step()
        updates, state = optimizer.update(jax_moe.from_torch_tree(layer, gradients), state, params)
        params = optax.apply_updates(params, updates)
    expected = {name: p.detach().numpy() for name, p in zip(names, parameters, strict=True)}
    check_close(jax_moe.to_torch(layer, params), expected, 2e-6, "five steps")  # measured: 2e-7


def test_float32_bias_correction_is_what_parts_the_updates() -> None:
    """optax corrects Adam's bias in float32, torch in float64: a difference that is named, not closed."""
    gradient = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    parameter = torch.zeros(1000, requires_grad=True)
    parameter.grad = torch.from_numpy(gradient)
    torch.optim.Adam([parameter], lr=1.0).step()
    adam = optax.scale_by_adam()
    update, _ = adam.update(gradient, adam.init(gradient))
    error = np.abs(np.asarray(update) + parameter.detach().numpy()).max()  # updates are +-1
    assert 1e-6 < error < 2e-5  # measured: 6.8e-6
    with jax.enable_x64(True):
        update, _ = adam.update(gradient.astype(np.float64), adam.init(gradient.astype(np.float64)))
    np.testing.assert_allclose(-update, parameter.detach().numpy(), rtol=1e-6)  # measured: 1e-7


def broken(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of a torch state dict with changes to its first entry's state."""
    entries = {i: dict(entry) for i, entry in state["state"].items()}
    for key, value in changes.items():
        entries[0].pop(key, None)
        if value is not None:
            entries[0][key] = value
    return {**state, "state": entries}


def two_groups(state: dict[str, Any]) -> dict[str, Any]:
    """The last parameter in a group of its own, without decay."""
    group = state["param_groups"][0]
    rest, last = (
        {**group, "params": group["params"][:-1]},
        {**group, "params": group["params"][-1:], "weight_decay": 0.0},
    )
    return {**state, "param_groups": [rest, last]}


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (
        lambda s: broken(s, exp_avg=None, exp_avg_sq=None), "2 missing: exp_avg of router.linear.weight, exp_avg_sq of"
    ),
    "misshapen": (
        lambda s: broken(s, exp_avg=torch.zeros(2, 2)), r"exp_avg of router.linear.weight is \(2, 2\), must be"
    ),
    "amsgrad": (
        lambda s: {**s, "param_groups": [{**s["param_groups"][0], "amsgrad": True}]}, "amsgrad=True: must be False"
    ),
    "another kind": (lambda s: broken(s, square_avg=torch.zeros(2)), "square_avg, step: must be that of AdamW"),
    "steps": (lambda s: broken(s, step=torch.tensor(7.0)), "step of .* is 2, must be 7"),
    "groups": (two_groups, r"param_groups 0 and 1 differ in weight_decay \(0.01 and 0.0\)"),
    "no state dict": (lambda s: {"exp_avg": 1}, "must be what torch.optim's state_dict"),
    "foreign": (lambda s: {**s, "state": {**s["state"], 99: {}}}, "1 parameters outside its groups"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_line(name: str) -> None:
    change, message = BAD[name]
    layer, theirs, names = trained(torch.optim.AdamW)
    fresh = optax.adamw(1e-3).init(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    with pytest.raises(ValueError, match=message) as raised:
        optimizer_from_torch(layer, change(theirs.state_dict()), fresh, names=names)
    assert "\n" not in str(raised.value)


def test_optimizers_that_do_not_fit_each_other() -> None:
    layer, theirs, names = trained(torch.optim.AdamW)
    params, state = nnx.to_pure_dict(nnx.state(layer, nnx.Param)), theirs.state_dict()
    read = partial(optimizer_from_torch, layer, state, names=names)
    with pytest.raises(ValueError, match="exp_avg and exp_avg_sq: must fit optax's, which has TraceState"):
        read(optax.sgd(0.1, momentum=0.9).init(params))
    with pytest.raises(ValueError, match="which has neither ScaleByAdamState nor TraceState"):
        read(optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="optax state FactoredState: must be of adamw"):
        read(optax.adafactor(1e-3).init(params))
    with pytest.raises(ValueError, match="names=None: must be the parameters' names"):
        optimizer_from_torch(layer, state, optax.adamw(1e-3).init(params))
    with pytest.raises(ValueError, match="must fit torch's optimizer, AdamW"):
        optimizer_to_torch(layer, optax.sgd(0.1, momentum=0.9).init(params), state, names=names)


# --- files


@pytest.fixture
def training_file(tmp_path: Path) -> Path:
    """A small makeMoE model after two steps of AdamW, as a training loop saves it."""
    torch.manual_seed(0)
    module = torch_ref.MakeMoE(CONFIG)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for _ in range(2):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


def test_port_carries_the_optimizer_both_ways(training_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, back = training_file.parent / "folder", training_file.parent / "back.pt"
    assert main(["port", str(training_file), str(folder)]) == 0
    assert main(["port", str(folder), str(back)]) == 0
    assert "optimizer state (exp_avg and exp_avg_sq) after 2 steps" in capsys.readouterr().out
    before, after = (torch.load(path, weights_only=True) for path in (training_file, back))
    assert before.keys() == after.keys() and after["epoch"] == 3
    assert before["optimizer"]["param_groups"] == after["optimizer"]["param_groups"]
    check_exact(*({n: v.numpy() for n, v in one["model"].items()} for one in (after, before)), "weights")
    flat = [
        {f"{i} {key}": v.numpy() for i, entry in one["optimizer"]["state"].items() for key, v in entry.items()}
        for one in (after, before)
    ]
    check_exact(*flat, "optimizer state")
    module = torch_ref.MakeMoE(CONFIG)
    module.load_state_dict(after["model"])
    torch.optim.AdamW(module.parameters()).load_state_dict(after["optimizer"])


def test_port_of_training_says_what_is_wrong(training_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = torch.load(training_file, weights_only=True)
    del whole["optimizer"]["state"][0]["exp_avg"], whole["optimizer"]["state"][3]["exp_avg_sq"]
    torch.save(whole, training_file)
    target = training_file.parent / "new"
    for words, message in (
        (
            [str(target)],
            "2 missing: exp_avg of token_embedding_table.weight, exp_avg_sq of blocks.0.sa.heads.0.query.weight",
        ),
        ([str(target), "--dtype", "bfloat16"], "dtype='bfloat16': must be left out"),
        ([f"{target}.safetensors"], "must be a folder, or end in .pt"),
        ([str(target), "--to", "hf"], "to='hf': must be torch or folder"),
    ):
        assert main(["port", str(training_file), *words]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert list(training_file.parent.iterdir()) == [training_file]
