"""Training that crosses over: weights and optimizer state from torch.optim to optax and back, in memory and through files."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="crosses over from PyTorch, which is not installed")

import jax_moe  # noqa: E402
import torch_ref  # noqa: E402
from jax_moe.cli import main  # noqa: E402
from jax_moe.parity.train_jax import JaxTrainer, make_optimizer, makemoe_loss  # noqa: E402
from jax_moe.parity.train_runs import Sides, changed_tokens, makemoe_sides, relative, run_both, weights_error  # noqa: E402
from jax_moe.parity.train_settings import TrainSettings  # noqa: E402
from jax_moe.parity.train_torch import TorchTrainer  # noqa: E402
from jax_moe.porting.checkpoint import Checkpoint  # noqa: E402
from jax_moe.porting.optimizer_state import optimizer_from_torch, optimizer_to_torch  # noqa: E402
from jax_moe.porting.torch_conventions import adamw_as_torch, clip_as_torch  # noqa: E402
from parity_tests.compare import MismatchError, check_close, check_exact  # noqa: E402
from parity_tests.filled import filled  # noqa: E402

CONFIG = jax_moe.MakeMoEConfig(vocab_size=11, block_size=8, model_dim=16, num_heads=2, num_layers=2, num_experts=4)
SETTINGS = TrainSettings(steps=200, num_tokens=8, learning_rate=3e-3, final_learning_rate=3e-4)
QUICK = (("xla_backend_optimization_level", 0),)  # compiling takes the time here, not running
LOSS, WEIGHTS = 5e-14, 1e-12  # of 200 fp64 steps; measured 2.6e-15 and 6.6e-14
THIRD = 50


@cache
def checkpoint() -> Checkpoint:
    return Checkpoint("makemoe", filled(lambda: jax_moe.MakeMoE(CONFIG, rngs=nnx.Rngs(0))))


def sides(settings: TrainSettings, dtype: str) -> Sides:
    """Both trainers; ours compiled in a hurry."""
    made = makemoe_sides(checkpoint(), settings, dtype)
    return made._replace(ours=JaxTrainer(made.ours.model, settings, makemoe_loss, compiler_options=QUICK))


@pytest.fixture
def double() -> Any:
    """fp64 in JAX."""
    with jax.enable_x64(True):
        yield


def to_jax(theirs: TorchTrainer, ours: JaxTrainer) -> None:
    """Weights and optimizer state, as a user would move them."""
    jax_moe.from_torch(ours.model, theirs.module.state_dict())
    ours.params = jax.tree.map(jnp.copy, nnx.state(ours.model, nnx.Param))
    state = jax.jit(ours.optimizer.init)(ours.params)
    ours.state = optimizer_from_torch(ours.model, theirs.optimizer.state_dict(), state, names=theirs.names)


def to_pytorch(ours: JaxTrainer, theirs: TorchTrainer) -> None:
    """The way back."""
    nnx.update(ours.model, ours.params)
    theirs.module.load_state_dict({name: torch.from_numpy(v) for name, v in jax_moe.to_torch(ours.model).items()})
    state = optimizer_to_torch(ours.model, ours.state, theirs.optimizer.state_dict(), names=theirs.names)
    theirs.optimizer.load_state_dict(state)


def test_two_hundred_steps_are_the_same() -> None:
    runs = run_both(sides, SETTINGS, "float64")
    assert runs.passed and runs.first_flip is None
    np.testing.assert_array_less(runs.drift_S, LOSS)
    assert runs.weights_error <= WEIGHTS, runs.weights_where
    loss = runs.theirs.loss_S
    assert loss[20:60].mean() - loss[-40:].mean() > 0.2  # measured: 0.4
    moved = changed_tokens(runs.ours, dataclasses.replace(runs.ours, expert_SNLTK=np.roll(runs.ours.expert_SNLTK, 1, axis=0)))
    assert (moved > 0).all()  # the router does choose


def test_fp32_drifts_within_bounds() -> None:
    runs = run_both(sides, dataclasses.replace(SETTINGS, steps=60), "float32")
    assert runs.passed
    assert runs.drift_S.max() < 1e-5  # measured: 1.2e-6
    assert runs.weights_error < 1e-4  # measured: 1e-5


def test_a_run_that_crosses_over_twice(double: None) -> None:
    whole = sides(SETTINGS, "float64")
    mixed = sides(SETTINGS, "float64")
    theirs = whole.theirs.run(whole.draw, range(3 * THIRD))
    ours = whole.ours.run(whole.draw, range(3 * THIRD))
    first = mixed.theirs.run(mixed.draw, range(THIRD))
    to_jax(mixed.theirs, mixed.ours)
    second = mixed.ours.run(mixed.draw, range(THIRD, 2 * THIRD))
    to_pytorch(mixed.ours, mixed.theirs)
    last = mixed.theirs.run(mixed.draw, range(2 * THIRD, 3 * THIRD))
    loss = np.concatenate([first.loss_S, second.loss_S, last.loss_S])
    for alone in (theirs, ours):
        assert relative(loss, alone.loss_S).max() < LOSS  # measured: 3e-15
    for weights in (whole.theirs.weights(), whole.ours.weights()):
        assert weights_error(mixed.theirs.weights(), weights)[0] < WEIGHTS  # measured: 5e-14


def without_bias_correction(ours: JaxTrainer) -> None:
    adam = ours.state[1][0]  # clip, (adam, decay, schedule)
    ours.state = (ours.state[0], (adam._replace(count=adam.count + 10**6), *ours.state[1][1:]))


def step_off_by_one(ours: JaxTrainer) -> None:
    adam = ours.state[1][0]
    ours.state = (ours.state[0], (adam._replace(count=adam.count + 1), *ours.state[1][1:]))


def schedule_off_by_one(ours: JaxTrainer) -> None:
    *rest, schedule = ours.state[1]
    ours.state = (ours.state[0], (*rest, schedule._replace(count=schedule.count + 1)))


def moments_swapped(ours: JaxTrainer) -> None:
    adam = ours.state[1][0]
    ours.state = (ours.state[0], (adam._replace(mu=adam.nu, nu=jax.tree.map(jnp.square, adam.mu)), *ours.state[1][1:]))


def another(optimizer: Callable[[], optax.GradientTransformation]) -> Callable[[JaxTrainer], None]:
    def plant(ours: JaxTrainer) -> None:
        state, settings = ours.state, dataclasses.replace(SETTINGS)
        other = JaxTrainer(ours.model, settings, makemoe_loss, optimizer(), QUICK)
        ours.optimizer, ours._update = other.optimizer, other._update
        assert jax.tree.structure(state) == jax.tree.structure(other.state)

    return plant


def float32_schedule() -> optax.GradientTransformation:
    from jax_moe.parity.train_jax import schedule

    return optax.chain(clip_as_torch(SETTINGS.clip_norm), optax.adamw(schedule(SETTINGS), weight_decay=SETTINGS.weight_decay))


def optax_clipping() -> optax.GradientTransformation:
    from jax_moe.parity.train_jax import schedule

    return optax.chain(
        optax.clip_by_global_norm(SETTINGS.clip_norm), adamw_as_torch(schedule(SETTINGS), weight_decay=SETTINGS.weight_decay)
    )


FAULTS: dict[str, Callable[[JaxTrainer], None]] = {
    "bias correction off": without_bias_correction,
    "step count off by one": step_off_by_one,
    "schedule off by one": schedule_off_by_one,
    "moments swapped": moments_swapped,
    "weight decay 1e-4": another(lambda: make_optimizer(dataclasses.replace(SETTINGS, weight_decay=1e-4))),
    "optax's clipping": another(optax_clipping),
    "schedule in float32": another(float32_schedule),
}


@pytest.fixture(scope="module")
def crossed() -> tuple[Any, dict[str, np.ndarray], Any]:
    """A torch run after 30 steps, its weights six steps later, and the numbers of the steps."""
    with jax.enable_x64(True):
        made = sides(SETTINGS, "float64")
        made.theirs.run(made.draw, range(30))
        before = {name: value.clone() for name, value in made.theirs.module.state_dict().items()}
        state = made.theirs.optimizer.state_dict()
        state = {**state, "state": {i: {k: v.clone() for k, v in one.items()} for i, one in state["state"].items()}}
        made.theirs.run(made.draw, range(30, 36))
        after = made.theirs.weights()
        made.theirs.module.load_state_dict(before)
        made.theirs.optimizer.load_state_dict(state)
        return made, after, made.draw


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_after_a_crossing_are_caught(crossed: Any, double: None, fault: str | None) -> None:
    made, after, draw = crossed
    ours = JaxTrainer(made.ours.model, SETTINGS, makemoe_loss, compiler_options=QUICK)
    to_jax(made.theirs, ours)
    if fault is not None:
        FAULTS[fault](ours)
    ours.run(draw, range(30, 36))
    if fault is None:
        check_close(ours.weights(), after, 1e-13, "healthy")  # measured: 5e-15
        return
    with pytest.raises(MismatchError):
        check_close(ours.weights(), after, 1e-11, fault)  # a hundred times what the healthy run is allowed


# --- without training


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
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(optax.constant_schedule(0.1), momentum=0.9, nesterov=True)),
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
            check_exact({k: v.numpy() for k, v in back["state"][i].items()}, {k: v.numpy() for k, v in entry.items()}, name)


def test_momentum_goes_on_as_it_was() -> None:
    """SGD with momentum and L2 decay: two steps in PyTorch and three in optax are five in PyTorch."""
    layer, theirs, names = trained(partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1))
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True))
    parameters = theirs.param_groups[0]["params"]
    jax_moe.from_torch(layer, dict(zip(names, parameters, strict=True)))
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    state = optimizer_from_torch(layer, theirs.state_dict(), optimizer.init(params), names=names)
    for step in range(3):
        gradients = {name: np.full(tuple(p.shape), 0.1 * step, np.float32) for name, p in zip(names, parameters, strict=True)}
        for name, parameter in zip(names, parameters, strict=True):
            parameter.grad = torch.from_numpy(gradients[name])
        theirs.step()
        updates, state = optimizer.update(jax_moe.from_torch_tree(layer, gradients), state, params)
        params = optax.apply_updates(params, updates)
    expected = {name: p.detach().numpy() for name, p in zip(names, parameters, strict=True)}
    check_close(jax_moe.to_torch(layer, params), expected, 2e-6, "five steps")  # measured: 2e-7


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
    rest, last = {**group, "params": group["params"][:-1]}, {**group, "params": group["params"][-1:], "weight_decay": 0.0}
    return {**state, "param_groups": [rest, last]}


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda s: broken(s, exp_avg=None, exp_avg_sq=None), "2 missing: exp_avg of router.linear.weight, exp_avg_sq of"),
    "misshapen": (lambda s: broken(s, exp_avg=torch.zeros(2, 2)), r"exp_avg of router.linear.weight is \(2, 2\), must be \(3, 4\)"),
    "amsgrad": (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "amsgrad": True}]}, "amsgrad=True: must be False"),
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
        ([str(target)], "2 missing: exp_avg of token_embedding_table.weight, exp_avg_sq of blocks.0.sa.heads.0.query.weight"),
        ([str(target), "--dtype", "bfloat16"], "dtype='bfloat16': must be left out"),
        ([f"{target}.safetensors"], "must be a folder, or end in .pt"),
        ([str(target), "--to", "hf"], "to='hf': must be torch or folder"),
    ):
        assert main(["port", str(training_file), *words]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert list(training_file.parent.iterdir()) == [training_file]
