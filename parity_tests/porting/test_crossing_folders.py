"""Optimizer state of Hugging Face models through folders: optimizer.pt beside the weights, Orbax, optax and back."""

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="crosses over from PyTorch, which is not installed")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

import jax_moe  # noqa: E402
import torch_ref  # noqa: E402
from jax_moe.porting.families import family_named, reference_table  # noqa: E402
from jax_moe.porting.formats.hf_folder import OPTIMIZER as TORCH_FILE  # noqa: E402
from jax_moe.porting.optimizer.groups import NOT_DECAYED  # noqa: E402
from jax_moe.porting.optimizer.own_file import FILE, load_optimizer  # noqa: E402
from jax_moe.porting.optimizer.state import optimizer_to_torch  # noqa: E402
from jax_moe.porting.state_dict import abstract_decoder, tree_plan  # noqa: E402
from parity_tests.cli.commands import fails, names, run, same_folders  # noqa: E402
from parity_tests.shared.state_dicts import check_same_state  # noqa: E402
from parity_tests.table.family_cases import CASES, draw_weights, save_reference  # noqa: E402

TRAINER = "adamw in the two groups of transformers' Trainer"
OPTIMIZERS: dict[str, Any] = {
    TRAINER: lambda pairs: torch.optim.AdamW([
        {"params": [p for n, p in pairs if not torch_norm_or_bias(n)], "weight_decay": 0.1},
        {"params": [p for n, p in pairs if torch_norm_or_bias(n)], "weight_decay": 0.0},
    ]),
    "sgd with momentum": lambda pairs: torch.optim.SGD([p for _, p in pairs], lr=0.1, momentum=0.9),
    "adamw that knows the names": lambda pairs: torch.optim.AdamW(pairs[::-1]),
}
OPTAX = {
    TRAINER: optax.adamw(1e-3, mask=lambda params: jax.tree.map(lambda value: value.ndim > 1, params)),
    "sgd with momentum": optax.sgd(0.1, momentum=0.9), "adamw that knows the names": optax.adamw(1e-3),
}


def torch_norm_or_bias(name: str) -> bool:
    return name.endswith("bias") or "norm" in name


def trained(family: str, kind: str, folder: Path) -> tuple[Any, list[str]]:
    """A folder in fp64 as left by training, its optimizer, and the parameters' names in the groups' order."""
    case = next(case for case in CASES if case.name == family)
    reference = case.reference(case.config()).double()
    draw_weights(reference, seed=1)
    pairs = list(reference.named_parameters())
    optimizer = OPTIMIZERS[kind](pairs)
    torch.manual_seed(0)
    for _ in range(2):
        for _, parameter in pairs:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    transformers.utils.logging.disable_progress_bar()
    save_reference(reference, folder)
    torch.save(optimizer.state_dict(), folder / TORCH_FILE)
    name_of = {id(parameter): name for name, parameter in pairs}
    return optimizer, [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize(
    ("family", "kind"), list(zip(("qwen3_moe_dense", "granitemoe_bias", "qwen2_moe"), OPTIMIZERS, strict=True))
)
def test_there_and_back_bit_for_bit(family: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """optimizer.pt -> Orbax folder -> optimizer.pt, and -> optax -> torch, with names from transformers."""
    theirs, orbax, back = (tmp_path / name for name in ("theirs", "orbax", "back"))
    optimizer, order = trained(family, kind, theirs)
    said = run(capsys, "port", theirs, orbax)
    assert "optimizer state (" in said and ("momentum_buffer)" in said) == kind.startswith("sgd"), said
    run(capsys, "port", orbax, back)
    same_folders(theirs, back)
    check_same_state(torch.load(back / TORCH_FILE, weights_only=True), optimizer.state_dict())
    assert TORCH_FILE in names(back) and names(orbax) >= {FILE, "config.json"}
    with jax.enable_x64(True):
        model = jax_moe.load_pretrained(theirs)
        layout = reference_table(model).name
        fresh = OPTAX[kind].init(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        state = load_optimizer(orbax, fresh)
        assert jax.tree.structure(state) == jax.tree.structure(fresh)
        again = optimizer_to_torch(model, state, optimizer.state_dict(), names=order, layout=layout)
        check_same_state(again, optimizer.state_dict())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_order_and_groups_are_those_of_transformers(case: Any) -> None:
    from transformers.trainer_pt_utils import get_parameter_names

    reference = case.reference(case.config())
    values = reference.config.to_dict()
    family = family_named(values["model_type"])
    config = family.config(values)
    plan = tree_plan(abstract_decoder(config), layout=family.in_memory(config).name)
    assert family.parameter_order(plan) == [name for name, p in reference.named_parameters() if p.requires_grad]
    # Trainer.get_decay_parameter_names
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    assert "|".join(patterns) == NOT_DECAYED
    trained = {name for name, p in reference.named_parameters() if p.requires_grad}  # a tied head is not
    decayed = trained.intersection(get_parameter_names(reference, [torch.nn.LayerNorm], patterns))
    assert decayed == {name for name in trained if not torch_norm_or_bias(name)}


def changed(file: Path, change: Any) -> None:
    torch.save(change(torch.load(file, weights_only=True)), file)


def one_group_less(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "param_groups": state["param_groups"][:1]}


def of_another_kind(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "state": {0: {"square_avg": torch.zeros(2)}}}


BAD = [
    (one_group_less, r"param_groups of 16 parameters: must be one of all 21, the two of .* \(16 and 5\), or named"),
    (of_another_kind, r"optimizer state holds square_avg: must be that of AdamW"),
    (lambda state: [1], r"must be what torch.optim's state_dict\(\) returns"),
]


def test_what_does_not_fit_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, target = tmp_path / "theirs", tmp_path / "new"
    trained("mixtral", TRAINER, theirs)
    whole = (theirs / TORCH_FILE).read_bytes()
    for change, message in BAD:
        changed(theirs / TORCH_FILE, change)
        line = fails(capsys, "port", theirs, target)
        assert re.search(message, line) and line.endswith(" (move it away to carry the weights alone)\n"), line
        (theirs / TORCH_FILE).write_bytes(whole)
    (theirs / TORCH_FILE).write_bytes(whole[:-9])
    assert f"{theirs / TORCH_FILE}: must be a whole PyTorch checkpoint" in fails(capsys, "port", theirs, target)
    (theirs / TORCH_FILE).write_bytes(whole)
    line = fails(capsys, "port", theirs, target, "--to", "hf", "--dtype", "bfloat16")
    assert "dtype='bfloat16': must be left out for weights with an optimizer's state; move " in line
    optimizer = torch.load(theirs / TORCH_FILE, weights_only=True)
    reference = {"model": {"model.layers.0.mlp.gate.weight": torch.zeros(2)}, "optimizer": optimizer}
    torch.save(reference, tmp_path / "both.pt")
    line = fails(capsys, "port", tmp_path / "both.pt", target)
    assert "must be a folder, made by `model.save_pretrained(folder)`" in line
    run(capsys, "port", theirs, target)
    shutil.copy(target / FILE, tmp_path / FILE)
    assert names(tmp_path) == {"theirs", "both.pt", "new", FILE}


def test_accumulated_gradients_are_carried_between_steps_and_refused_inside_one() -> None:
    config = jax_moe.presets.mixtral(4, 6, 3, 2)
    layer = jax_moe.MoE(config, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    module = torch_ref.MoE(config)
    theirs = torch.optim.AdamW(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    theirs.step()
    order = [name for name, _ in module.named_parameters()]
    optimizer = optax.MultiSteps(optax.adamw(1e-3), 2)
    state = jax_moe.optimizer_from_torch(layer, theirs.state_dict(), optimizer.init(params), names=order)
    assert int(state.gradient_step) == 1 and int(state.mini_step) == 0  # type: ignore[attr-defined]
    to_torch = partial(jax_moe.optimizer_to_torch, layer, like=theirs.state_dict(), names=order)
    check_same_state(to_torch(state), theirs.state_dict())
    _, half = optimizer.update(params, state, params)
    with pytest.raises(ValueError, match="mini_step=1: must be 0; half accumulated gradients are not carried"):
        to_torch(half)
    _, whole = optimizer.update(params, half, params)
    assert {float(entry["step"]) for entry in to_torch(whole)["state"].values()} == {2.0}
