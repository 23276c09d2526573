"""`jax-moe inspect` on Hugging Face folders: counts, memory, the contract in words, and no weight read."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_moe
from jax_moe.config.as_json import config_from_json, config_to_json
from jax_moe.config.models import DecoderConfig
from jax_moe.parameters import declared
from jax_moe.porting.families import family_named
from jax_moe.porting.state_dict import abstract_decoder
from jax_moe.porting.table.plan import make_plan
from parity_tests.cli.commands import command, fails, run
from parity_tests.porting.decoder_cases import CONFIGS, decoder, weights

MIXTRAL_8X7B = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_hidden_layers": 32, "num_local_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 32000, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768,
    "router_aux_loss_coef": 0.02, "torch_dtype": "bfloat16",
}


def holes(folder: Path, values: dict[str, Any], shards: int) -> Path:
    """A folder of those sizes in bf16 whose sparse files hold headers only: they take no disk, and hold no weights."""
    family = family_named(values["model_type"])
    config = family.config(values)
    plan = make_plan(family.on_disk(config), declared(abstract_decoder(config)))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    where = {}
    for number in range(shards):
        file, about, end = f"model-{number + 1:05d}-of-{shards:05d}.safetensors", {}, 0
        for name in list(plan.their_shapes)[number::shards]:
            start, end = end, end + 2 * int(np.prod(plan.their_shapes[name], dtype=np.int64))
            about[name] = {"dtype": "BF16", "shape": list(plan.their_shapes[name]), "data_offsets": [start, end]}
            where[name] = file
        text = json.dumps(about).encode()
        with (folder / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral-8x7B in its published size, 87 GiB without weights."""
    return holes(tmp_path_factory.mktemp("holes") / "Mixtral-8x7B-v0.1", MIXTRAL_8X7B, 19)


def test_inspect_counts_the_published_mixtral(mixtral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """46.7 and 12.9 billion parameters, as its authors say; the exact numbers are worked by hand."""
    D, F, L, V, E, K = 4096, 14336, 32, 32000, 8, 2
    layer = 2 * D * D + 2 * D * 1024 + E * D + 2 * D  # q, o; k, v; router; norms
    expert, outside = 3 * D * F, 2 * V * D + D
    total, active = L * (layer + E * expert) + outside, L * (layer + K * expert) + outside
    assert (round(total / 1e8), round(active / 1e8)) == (467, 129)
    out = run(capsys, "inspect", mixtral)
    other = total - L * E * expert
    rows = dict(re.findall(r"^  (\w.*?)  +((?:[\d.,]+ GiB *)+)$", out, re.MULTILINE))
    devices = (1, 2, 4, 8)
    expected = {
        "weights, on every device": [2 * total] * 4,
        "weights, experts split": [2 * (other + L * E * expert / n) for n in devices],
        "training, on every device": [16 * total] * 4,
        "training, experts split": [16 * (other + L * E * expert / n) for n in devices],
    }
    assert {what: row.split("GiB")[:4] for what, row in rows.items()}.keys() == expected.keys()
    for what, sizes in expected.items():
        assert re.findall(r"[\d.]+", rows[what]) == [f"{size / 2**30:.1f}" for size in sizes], what
    for words in (
        f"mixtral, {total:,} parameters, {active:,} of them active", "19 files, 87.0 GiB, 995 tensors",
        "87.0 GiB bfloat16", "32 heads of width 128, each key and value head serving 4",
        "softmax over all, then the best 2 of 8", "weights: divided by their sum",
        "8 of 4096 -> 14336 -> 4096, gated silu", "f summing to the top-k",
        "precision: router in the model's dtype, its weights in fp32",
    ):
        assert words in out, words


def test_inspect_reads_no_weight_and_loads_no_framework_of_theirs(mixtral: Path) -> None:
    """87 GiB in a process limited to 8 GiB; neither torch nor transformers nor orbax is imported."""
    check = "import atexit, resource, sys\nresource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))\n"
    check += "heavy = ('torch', 'transformers', 'orbax')\n"
    check += "atexit.register(lambda: print('loaded', [name for name in heavy if name in sys.modules]))"
    done = command("inspect", mixtral, before=check)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("loaded []\n")


WORDS = {
    "mixtral": ["a window of 3 positions\n", "rotary, base 1,000,000", "layers: 3, each with a mixture"],
    "qwen2_moe": [
        "2 with a mixture, 1 dense of width 5 (layer 1)", "a window of 3 positions in layers 0, 2",
        "shared expert: width 4, behind a sigmoid gate", "biases on queries, keys and values",
    ],
    "qwen3_moe": [
        "each head's queries and keys normed", "stretched 2 times from 8 positions (yarn)", "2 dense of width 5"
    ],
    "olmoe": [
        "normed over their full width", "clipped to +-3.5", "weight 0.02", "queries, keys and values and the output"
    ],
    "granitemoe": [
        "tied head", "scores times 0.2",
        "embeddings times 2, residual branches times 0.5, logits divided by 3",
        "the best 2 of 4, then softmax over them",
    ],
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_inspect_says_the_contract(model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In words, and in the config.json of an Orbax folder."""
    model = decoder(model_type)
    jax_moe.save_pretrained(model, tmp_path / "model", model_type=model_type)
    out = run(capsys, "inspect", tmp_path / "model")
    for words in WORDS[model_type]:
        assert words in out, words
    assert (
        config_from_json(DecoderConfig, json.loads(json.dumps(config_to_json(model.config))), "config") == model.config
    )


def test_inspect_on_chosen_devices_and_with_names(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three devices share four experts: the fullest device holds two."""
    out = run(capsys, "inspect", whole, "--devices", "3", "--names")
    held = weights(whole)
    total = sum(value.size for value in held.values())
    experts = sum(value.size for name, value in held.items() if ".experts." in name)
    split = 16 * (total - experts / 2)
    assert re.search(rf"training, experts split +{split / 1024:.1f} KiB\n", out)
    for name, value in held.items():
        assert re.search(rf"^{re.escape(name)} +float32  {re.escape(str(list(value.shape)))}$", out, re.MULTILINE), name
    assert "devices=0: must be at least 1" in fails(capsys, "inspect", whole, "--devices", "0")
    split = run(capsys, "inspect", whole, "--mesh", "expert=4,sequence=2")
    assert re.search(rf"training +{16 * (total - experts * 3 / 4) / 1024:.1f} KiB\n", split)
    assert "mesh expert=3: must be a divisor of 4, the experts" in fails(capsys, "inspect", whole, "--mesh", "expert=3")
    assert "mesh='experts=2': must be of the axes" in fails(capsys, "inspect", whole, "--mesh", "experts=2")
    for words in (("--mesh", "expert=2"), ("--devices", "2")):
        assert f"{words[0][2:]}=" in fails(capsys, "inspect", whole, "--layers", "0", *words)
    both = fails(capsys, "inspect", whole, "--mesh", "expert=2", "--devices", "2")
    assert "devices=2: must be left out with --mesh" in both
    assert "top_k: must be left out for a folder" in fails(capsys, "inspect", whole, "--top-k", "1")
