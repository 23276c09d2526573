"""Names in a folder that are no weights, or weights that its config.json contradicts."""

from pathlib import Path

import numpy as np
import pytest

import jax_moe
from jax_moe.porting import PortError
from jax_moe.porting.formats.safetensors import read_safetensors, write_safetensors
from parity_tests.porting.decoder_cases import decoder, weights
from parity_tests.shared.compare import check_exact


def test_rotary_frequencies_are_skipped(tmp_path: Path) -> None:
    """Tensors that older versions of transformers wrote, per layer and for the model, are ignored."""
    jax_moe.save_pretrained(decoder("mixtral"), tmp_path / "old", model_type="mixtral")
    file = tmp_path / "old" / "model.safetensors"
    state = read_safetensors(file)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)] + [
        "model.rotary_emb.inv_freq"
    ]
    write_safetensors(file, state | {name: np.ones(2, np.float32) for name in names})
    jax_moe.save_pretrained(jax_moe.load_pretrained(tmp_path / "old"), tmp_path / "new")
    check_exact(weights(tmp_path / "new"), state, "without the frequencies")
    write_safetensors(file, state | {"model.layers.0.self_attn.rotary_emb.freq": np.ones(2, np.float32)})
    with pytest.raises(PortError, match=r"1 unexpected: .*rotary_emb\.freq$"):
        jax_moe.load_pretrained(tmp_path / "old")


@pytest.mark.parametrize("other", ["values", "shape", "dtype"])
def test_another_head_beside_a_tied_config(other: str, tmp_path: Path) -> None:
    """The message names the setting; with it false the head is read."""
    jax_moe.save_pretrained(decoder("granitemoe"), tmp_path / "tied", model_type="granitemoe")
    file, config = tmp_path / "tied" / "model.safetensors", tmp_path / "tied" / "config.json"
    state = read_safetensors(file)
    embedding = state["model.embed_tokens.weight"]
    head = {"values": embedding + 1, "shape": embedding[:3], "dtype": embedding.astype(np.float16)}[other]
    write_safetensors(file, state | {"lm_head.weight": head})
    with pytest.raises(PortError, match=r"1 wrong: lm_head\.weight .*tie_word_embeddings=true says; set it to false"):
        jax_moe.load_pretrained(tmp_path / "tied")
    if other == "values":
        config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
        check_exact(
            {"head": np.asarray(jax_moe.load_pretrained(tmp_path / "tied").head[...]).T}, {"head": head}, "untied"
        )
