"""Parameter groups, masked and partitioned optax states, injected hyperparameters, the layout nearest to the names."""

import itertools
from collections.abc import Callable
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
from jax_moe.optimizers import adamw_as_torch  # noqa: E402
from jax_moe.porting.families import tables_of  # noqa: E402
from jax_moe.porting.optimizer.groups import names_in_groups  # noqa: E402
from jax_moe.porting.optimizer.own_file import load_optimizer  # noqa: E402
from jax_moe.porting.state_dict import tree_plan  # noqa: E402
from moe_cli.main import main  # noqa: E402
from parity_tests.porting.decoder_cases import decoder  # noqa: E402
from parity_tests.shared.filled import filled  # noqa: E402
from parity_tests.shared.state_dicts import check_same_state, check_same_weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick")
STEPS = 2


def stepped(optimizer: Any) -> Any:
    """The optimizer after two steps on gradients of its own."""
    torch.manual_seed(0)
    for _ in range(STEPS):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


def grouped(module: Any, **second: Any) -> tuple[Any, list[str]]:
    """nanoGPT's AdamW, with matrices in a group of their own, after two steps; the names in the groups' order."""
    pairs = sorted(module.named_parameters(), key=lambda pair: pair[1].ndim < 2)
    matrices = [p for _, p in pairs if p.ndim >= 2]
    rest = {"params": [p for _, p in pairs if p.ndim < 2], **(second or {"weight_decay": 0.0})}
    made = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, rest], lr=1e-3)
    return stepped(made), [name for name, _ in pairs]


def layer_and_module() -> tuple[jax_moe.MoE, torch_ref.MoE]:
    config = jax_moe.presets.makemoe(4, num_experts=3, top_k=2)
    return filled(lambda: jax_moe.MoE(config, rngs=nnx.Rngs(0))), torch_ref.MoE(config)


def matrices(params: Any) -> Any:
    """Ours: an expert's bias is [E, F]."""
    return jax.tree_util.tree_map_with_path(lambda path, value: "bias" not in jax.tree_util.keystr(path), params)


def labels(params: Any) -> Any:
    return jax.tree.map(lambda decays: "decay" if decays else "rest", matrices(params))


SCHEDULE = optax.linear_schedule(1e-3, 1e-4, 10)
STATES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw(mask=)": lambda: optax.adamw(SCHEDULE, weight_decay=0.1, mask=matrices),
    "as torch": lambda: adamw_as_torch(SCHEDULE, weight_decay=0.1, mask=matrices, max_norm=1.0),
    "as torch, skipping": lambda: adamw_as_torch(
        SCHEDULE, weight_decay=0.1, mask=matrices, max_norm=1.0, unchosen="skip",
        declared=jax_moe.declared(layer_and_module()[0]),
    ),
    "injected": lambda: optax.inject_hyperparams(optax.adamw, static_args="mask")(
        SCHEDULE, weight_decay=0.1, mask=matrices
    ),
    "injected, constant": lambda: optax.inject_hyperparams(optax.adamw, static_args="mask")(1e-3, mask=matrices),
    "partition": lambda: optax.partition(
        {"decay": optax.adamw(1e-3, weight_decay=0.1), "rest": optax.adam(1e-3)}, labels
    ),
    "masked twice": lambda: optax.chain(
        optax.masked(optax.adamw(1e-3), matrices),
        optax.masked(optax.adam(1e-3), lambda params: jax.tree.map(lambda mask: not mask, matrices(params))),
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_groups_that_differ_in_weight_decay(name: str) -> None:
    layer, module = layer_and_module()
    theirs, names = grouped(module)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    fresh = STATES[name]().init(params)
    state = jax_moe.optimizer_from_torch(layer, theirs.state_dict(), fresh, names=names)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    counts = [
        leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0] if "count" in jax.tree_util.keystr(path)
    ]
    assert counts and all((np.asarray(count) == STEPS).all() for count in counts)
    check_same_state(jax_moe.optimizer_to_torch(layer, state, theirs.state_dict(), names=names), theirs.state_dict())
    # the state serves its optimizer
    STATES[name]().update(params, state, params, chosen=jnp.ones(3, bool))  # type: ignore[call-arg]


def test_the_next_step_is_torchs() -> None:
    """The next step with the user's mask and injected learning rate."""
    layer, module = layer_and_module()
    theirs, names = grouped(module)
    jax_moe.from_torch(layer, module.state_dict())
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    optimizer = optax.inject_hyperparams(optax.adamw, static_args="mask")(0.5, weight_decay=0.1, mask=matrices)
    state = jax_moe.optimizer_from_torch(layer, theirs.state_dict(), optimizer.init(params), names=names)
    assert float(state.hyperparams["learning_rate"]) == 0.5  # type: ignore[attr-defined]
    state.hyperparams["learning_rate"] = jnp.asarray(1e-3)  # type: ignore[attr-defined]
    gradients = {name: np.full(tuple(p.shape), 0.1, np.float32) for name, p in module.named_parameters()}
    for name, parameter in module.named_parameters():
        parameter.grad = torch.from_numpy(gradients[name])
    theirs.step()
    updates, _ = optimizer.update(jax_moe.from_torch_tree(layer, gradients), state, params)
    ours = jax_moe.to_torch(layer, optax.apply_updates(params, updates))
    for name, value in module.named_parameters():
        # measured: 3e-8
        np.testing.assert_allclose(ours[name], value.detach().numpy(), rtol=0, atol=3e-7, err_msg=name)


def test_what_one_optimizer_cannot_hold_is_refused() -> None:
    layer, module = layer_and_module()
    theirs, names = grouped(module)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    with pytest.raises(
        ValueError, match=r"0 and 1 differ in weight_decay \(0.1 and 0.0\): .* one of adamw\(mask=...\)"
    ):
        jax_moe.optimizer_from_torch(layer, theirs.state_dict(), optax.adamw(1e-3).init(params), names=names)
    other, names = grouped(module, lr=1e-4)
    with pytest.raises(ValueError, match=r"0 and 1 differ in lr \(0.001 and 0.0001\)"):
        jax_moe.optimizer_from_torch(layer, other.state_dict(), STATES["adamw(mask=)"]().init(params), names=names)
    jax_moe.optimizer_from_torch(layer, other.state_dict(), STATES["partition"]().init(params), names=names)
    half = optax.masked(optax.adamw(1e-3), matrices).init(params)
    with pytest.raises(ValueError, match=r"unexpected: exp_avg of experts.down_bias"):
        jax_moe.optimizer_from_torch(layer, theirs.state_dict(), half, names=names)
    with pytest.raises(ValueError, match="must have one of them"):
        twice = optax.chain(optax.adam(1e-3), optax.adam(1e-3)).init(params)
        jax_moe.optimizer_to_torch(layer, twice, theirs.state_dict(), names=names)


# --- layouts


def test_the_layout_nearest_to_the_names() -> None:
    """A Mixtral in transformers' memory, where experts are fused, unlike on disk."""
    model = decoder("mixtral")
    layouts = [table for table in tables_of(model) if "mixtral" in table.name]
    assert len(layouts) > 1
    for table in layouts:
        shapes = tree_plan(model, layout=table.name).their_shapes
        optimizer = stepped(torch.optim.AdamW([torch.zeros(shape) for shape in shapes.values()]))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        state = jax_moe.optimizer_from_torch(
            model, optimizer.state_dict(), optax.adamw(1e-3).init(params), names=list(shapes)
        )
        back = jax_moe.optimizer_to_torch(model, state, optimizer.state_dict(), names=list(shapes))
        check_same_state(back, optimizer.state_dict())


# --- files


CONFIG = jax_moe.MakeMoEConfig(vocab_size=11, block_size=8, model_dim=16, num_heads=2, num_layers=2, num_experts=4)


def test_a_training_file_in_nanogpts_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A round trip bit for bit, and into optax with a mask; a Trainer's folder may have such groups too."""
    module = torch_ref.MakeMoE(CONFIG)
    theirs, names = grouped(module)
    torch.save({"model": module.state_dict(), "optimizer": theirs.state_dict()}, tmp_path / "theirs.pt")
    assert main(["port", str(tmp_path / "theirs.pt"), str(tmp_path / "folder")]) == 0
    assert main(["port", str(tmp_path / "folder"), str(tmp_path / "back.pt")]) == 0
    capsys.readouterr()
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("theirs.pt", "back.pt"))
    check_same_state(after["optimizer"], before["optimizer"])
    check_same_weights(after["model"], before["model"])
    assert main(["port", str(tmp_path / "back.pt"), str(tmp_path / "again")]) == 0
    model = filled(lambda: jax_moe.MakeMoE(CONFIG, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = load_optimizer(tmp_path / "again", STATES["adamw(mask=)"]().init(params))
    check_same_state(jax_moe.optimizer_to_torch(model, state, theirs.state_dict(), names=names), theirs.state_dict())
    with pytest.raises(ValueError, match=r"optimizer.safetensors: param_groups 0 and 1 differ in weight_decay"):
        load_optimizer(tmp_path / "folder", optax.adamw(1e-3).init(params))


SHAPES = {"a.weight": (2, 3), "norm.weight": (3,), "b.bias": (2,), "ln.weight": (3,), "c.weight": (4, 3)}


def state_dict(*groups: list[str], moments: bool = True) -> dict[str, Any]:
    names = [name for group in groups for name in group]
    state = {i: {"exp_avg": np.zeros(SHAPES[name])} for i, name in enumerate(names)} if moments else {}
    sizes = np.cumsum([0, *map(len, groups)])
    return {"state": state, "param_groups": [{"params": list(range(a, b))} for a, b in itertools.pairwise(sizes)]}


def test_names_of_groups() -> None:
    every = list(SHAPES)
    by_dims = (["a.weight", "c.weight"], ["norm.weight", "b.bias", "ln.weight"])
    by_name = (["a.weight", "ln.weight", "c.weight"], ["norm.weight", "b.bias"])
    for groups in ((every,), by_dims, by_name, by_dims[::-1], by_name[::-1]):
        for moments in {True, groups[0] != every}:
            found = names_in_groups(state_dict(*groups, moments=moments), every, SHAPES)
            assert found == [name for group in groups for name in group]
    with pytest.raises(ValueError, match=r"of 2 and 3 parameters: must be .*\(3 and 2 or 2 and 3\), or named"):
        # it cannot be distinguished from the reverse order
        names_in_groups(state_dict(*by_dims, moments=False), every, SHAPES)
    with pytest.raises(ValueError, match=r"of 1 and 1 and 3 parameters: must be one of all 5"):
        names_in_groups(state_dict(["a.weight"], ["c.weight"], by_dims[1]), every, SHAPES)
    for wrong in ([1], {"param_groups": []}, {"param_groups": [[]]}, {"param_groups": 3}):
        with pytest.raises(ValueError, match=r"must be what torch.optim's state_dict"):
            names_in_groups(wrong, every, SHAPES)
