"""Ways to break a sharded Hugging Face folder, each with a pattern for the error."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe.porting.formats.safetensors import read_safetensors, write_safetensors


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes config.json; None removes a field."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_shard(folder: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Changes the tensors of a shard, not the index."""
    file = shard(folder)
    state = read_safetensors(file)
    edit(state)
    write_safetensors(file, state)


def shard(folder: Path) -> Path:
    """The second shard."""
    return sorted(folder.glob("model-*.safetensors"))[1]


def lie(folder: Path) -> None:
    """Writes a header that promises more bytes than the file has."""
    raw = shard(folder).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    last = max((v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"][1])
    last["data_offsets"][1] += 4000
    text = json.dumps(header).encode()
    shard(folder).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def reindex(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    """Changes the index."""
    file = folder / "model.safetensors.index.json"
    values = json.loads(file.read_text())
    edit(values["weight_map"])
    file.write_text(json.dumps(values))


def spoil(state: dict[str, np.ndarray]) -> None:
    """Puts a NaN into a tensor."""
    next(iter(state.values())).flat[1] = np.nan


def misshape(state: dict[str, np.ndarray]) -> None:
    """Adds a row to a tensor."""
    name = next(iter(state))
    state[name] = np.zeros((99, *state[name].shape[1:]), np.float32)


def narrow(state: dict[str, np.ndarray]) -> None:
    """Makes a tensor one of integers."""
    state |= {name: value.astype(np.int8) for name, value in state.items()}


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config.json: must be JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"must be a JSON object"),
    "unknown family": (
        lambda f: edit_config(f, model_type="llama"), r"model_type='llama': must be one of mixtral, qwen2_moe"
    ),
    "weights of another name": (
        lambda f: edit_config(f, transformers_weights="x.safetensors"),
        r"config.json: transformers_weights='x.safetensors': must be left out: weights are read from model.safetensors",
    ),
    "no family": (lambda f: edit_config(f, model_type=None), r"model_type=None: must be one of"),
    "two faults": (
        lambda f: edit_config(f, hidden_size=None, num_hidden_layers="2"),
        r"num_hidden_layers='2': must be an int.*hidden_size is missing|hidden_size is missing.*num_hidden_layers='2'",
    ),
    "heads": (lambda f: edit_config(f, num_key_value_heads=3), r"num_kv_heads=3: must be a divisor of num_heads=4"),
    "top k": (
        lambda f: edit_config(f, num_experts_per_tok=9), r"num_experts_per_tok=9: must be at most the number of exp"
    ),
    "activation": (lambda f: edit_config(f, hidden_act="mish"), r"hidden_act='mish': must be one of silu"),
    "rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "spiral"}), r"rope_type='spiral': must be one of default"
    ),
    "no factor": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "linear"}), r"rope_parameters.factor is missing"
    ),
    "quantised by nothing known": (
        lambda f: edit_config(f, quantization_config={"bits": 4}),
        r"config.json: quantization_config.quant_method=None: must be one of fp8, mxfp4, compressed-tensors",
    ),
    "window": (lambda f: edit_config(f, use_sliding_window=False), r"use_sliding_window must be true"),
    "too few layers": (lambda f: edit_config(f, num_hidden_layers=2, layer_types=None), r"unexpected: .*layers\.2\."),
    "too many layers": (lambda f: edit_config(f, num_hidden_layers=4, layer_types=None), r"missing: .*layers\.3\."),
    "layers without end": (
        lambda f: edit_config(f, num_hidden_layers=10**12, layer_types=None),
        r"config.json: num_hidden_layers=10{12}: must be at most 10,000",
    ),
    "experts without end": (
        lambda f: edit_config(f, num_experts=10**12), r"num_layers \* num_experts=20{12}: must fit the weig"
    ),
    "another width": (lambda f: edit_config(f, moe_intermediate_size=7), r"misshapen: .*is \(6, 8\), must be \(7, 8\)"),
    "another shape": (lambda f: edit_shard(f, misshape), r"1 misshapen: .*is \(99"),
    "missing shard": (lambda f: shard(f).unlink(), r"model-00002-of-\d+.safetensors is missing"),
    "cut short": (
        lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-5]), r"model-00002.*is not one or is cut short"
    ),
    "empty shard": (lambda f: shard(f).write_bytes(b""), r"model-00002.*is not one or is cut short"),
    "lying header": (lie, r"model-00002.*is not one or is cut short"),
    "extra tensor": (
        lambda f: edit_shard(f, lambda s: s.update(more=np.ones(2, np.float32))), r"holds more, which the index"
    ),
    "lost tensor": (
        lambda f: edit_shard(f, lambda s: s.pop(next(iter(s)))), r"lacks lm_head.weight, which the index says"
    ),
    "integers": (lambda f: edit_shard(f, narrow), r"tensors must be one of F64, F32, F16, BF16: lm_head.weight is I8"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), r"must hold model.safetensors or"),
    "index elsewhere": (
        lambda f: reindex(f, lambda m: m.update({next(iter(m)): "../x.safetensors"})), r"a file in this folder"
    ),
    "index of nothing": (lambda f: reindex(f, lambda m: m.clear()), r"weight_map must say"),
    "NaN": (lambda f: edit_shard(f, spoil), r"1 wrong: lm_head.weight holds NaN or infinity"),
}
