"""The optimizer state of a Hugging Face model: `optimizer.pt` beside weights, `optimizer.safetensors` in an Orbax
folder.

`optimizer.pt` is torch.optim's state_dict(), as transformers' Trainer writes it into a checkpoint. It numbers the
parameters: their names are those that the optimizer got (`param_names`), or follow from the order of transformers'
modules.
"""

import re
from collections.abc import Callable
from pathlib import Path

from jax_moe.models.decoder import Decoder
from jax_moe.porting.decoder_folder import open_decoder
from jax_moe.porting.families.hf import decoder_tables
from jax_moe.porting.formats.hf_folder import is_hf, open_folder
from jax_moe.porting.formats.own_folder import is_folder
from jax_moe.porting.optimizer.groups import names_in_groups
from jax_moe.porting.optimizer.own_file import FILE, Optimizer, plain_groups, read_optimizer, write_optimizer
from jax_moe.porting.optimizer.state import read_state_dict, verify_moments, write_state_dict
from jax_moe.porting.optimizer.step_counts import expert_tensors
from jax_moe.porting.state_dict import decoder_shapes, from_torch_tree, tree_plan
from jax_moe.porting.table.plan import make_plan

TORCH_FILE = "optimizer.pt"
ENDS = ("model.embed_tokens.weight", "model.layers", "model.norm.weight", "lm_head.weight")
LAYER = ("self_attn.", "mlp.", "input_layernorm.", "post_attention_layernorm.", "block_sparse_moe.")


def optimizer_beside(path: Path) -> Path | None:
    """The file of a Hugging Face folder, or of an Orbax folder of one, that holds the optimizer's state."""
    file = path / (TORCH_FILE if is_hf(path) else FILE)
    return file if file.is_file() and (is_hf(path) or is_folder(path)) else None


def read_decoder_optimizer(path: Path) -> tuple[Optimizer, Callable[[Path, str], None]]:
    """The optimizer's state, and a function (folder, "hf" or "orbax") that writes it.

    Raises ValueError with everything that does not fit the weights.
    """
    file = optimizer_beside(path)
    assert file is not None
    if is_hf(path):
        with open_folder(path) as folder:
            model, model_type = folder.model, folder.model_type
    else:
        origin, model, _ = open_decoder(path)
        model_type = origin.model_type
    layout = decoder_tables(model.config, model_type)[-1].name
    try:
        optimizer = _read_torch(file, model, model_type) if is_hf(path) else read_optimizer(file, model, layout)
    except ValueError as error:
        said = str(error).removeprefix(f"{file}: ")
        raise ValueError(f"{file}: {said} (move it away to carry the weights alone)") from None

    def write(part: Path, to: str) -> None:
        if to == "orbax":
            write_optimizer(part / FILE, optimizer, model, layout)
        else:
            _write_torch(part / TORCH_FILE, optimizer, model, layout)

    return optimizer, write


def parameter_order(model: Decoder, model_type: str) -> list[str]:
    """The names of transformers' `named_parameters()`, in its order."""

    def rank(name: str) -> tuple[int, ...]:
        inside = re.match(r"model\.layers\.(\d+)\.", name)
        if inside is None:
            return (ENDS.index(name),)
        rest = name[inside.end() :]
        module = next(i for i, start in enumerate(LAYER) if rest.startswith(start))
        after = model_type == "qwen3_moe" and rest == "mlp.gate.weight"  # its experts come first
        return ENDS.index("model.layers"), int(inside[1]), module, int(after)

    plan = make_plan(decoder_tables(model.config, model_type)[-1], decoder_shapes(model))
    return sorted(plan.their_shapes, key=rank)  # within a module in the order of the table's rows


def _read_torch(file: Path, model: Decoder, model_type: str) -> Optimizer:
    from jax_moe.porting.formats.torch_pickle import read_optimizer_pt

    state_dict, layout = read_optimizer_pt(file), decoder_tables(model.config, model_type)[-1].name
    plan = tree_plan(model, layout=layout)
    order = names_in_groups(state_dict, parameter_order(model, model_type), plan.their_shapes)
    moments = read_state_dict(state_dict, order, expert_tensors(plan))
    for arrays in moments.arrays.values():
        from_torch_tree(model, arrays, layout=layout)
    return Optimizer(moments, plain_groups(state_dict["param_groups"]), order, {})


def _write_torch(file: Path, optimizer: Optimizer, model: Decoder, layout: str) -> None:
    from jax_moe.porting.formats.torch_pickle import read_optimizer_pt, write_plain_pt

    write_plain_pt(file, write_state_dict(optimizer.moments, optimizer.groups, optimizer.order))
    experts = expert_tensors(tree_plan(model, layout=layout))
    verify_moments(optimizer.moments, read_state_dict(read_optimizer_pt(file), optimizer.order, experts), file)
