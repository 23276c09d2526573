"""Text models in the folders of the models around them, as `transformers` writes these: loaded, saved, compared."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

import jax_moe  # noqa: E402
from jax_moe.porting.formats.safetensors import read_safetensors  # noqa: E402
from parity_tests.shared.compare import check_close, check_exact  # noqa: E402
from parity_tests.table.family_cases import CASES, VOCABULARY, draw_weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick")
HEADS = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION: dict[str, dict[str, Any]] = {
    "llama4": {
        **HEADS, "intermediate_size": 16, "vision_output_dim": 8, "image_size": 8, "patch_size": 4,
        "projector_input_dim": 8, "projector_output_dim": 8,
    },
    "gemma4": {
        **HEADS, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 8, "position_embedding_size": 8,
    },
    "qwen3_5_moe": {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 22,
        "num_position_embeddings": 16,
    },
}
# The text model with its head; transformers 5.24's whole Llama 4 fails without images
TEXT = {"llama4": lambda model: model.language_model, "gemma4": lambda model: model, "qwen3_5_moe": lambda model: model}
AROUND = {"llama4": 26, "gemma4": 16, "qwen3_5_moe": 21}  # tensors that are carried


@pytest.mark.parametrize("name", VISION)
def test_the_whole_folder_goes_through(name: str, tmp_path: Path) -> None:
    """Its logits are the text model's, and every tensor and config.json come back; measured: 1.9e-6."""
    case = next(case for case in CASES if case.name == name)
    text = case.config().to_dict() | {"pad_token_id": 0}
    kind = getattr(transformers, f"{case.family}Config")
    config = kind(text_config=text, vision_config=VISION[name], tie_word_embeddings=text["tie_word_embeddings"])
    model = getattr(transformers, f"{case.family}ForConditionalGeneration")._from_config(
        config, attn_implementation="eager", experts_implementation="eager",
    ).eval()
    draw_weights(model, seed=1)
    model.save_pretrained(tmp_path / "theirs")
    loaded = jax_moe.load_pretrained(tmp_path / "theirs")
    assert loaded.origin is not None and len(loaded.origin.carried) == AROUND[name]
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        expected = TEXT[name](model)(torch.from_numpy(tokens)).logits.numpy()
    check_close({"logits": np.asarray(loaded(jnp.asarray(tokens)))}, {"logits": expected}, 1e-5, name)
    jax_moe.save_pretrained(loaded, tmp_path / "ours")
    theirs, ours = (read_safetensors(tmp_path / each / "model.safetensors") for each in ("theirs", "ours"))
    check_exact(ours, theirs, name)
    config = (tmp_path / "theirs/config.json").read_bytes()
    assert (tmp_path / "ours/config.json").read_bytes() == config
    assert jax_moe.moe_layers(tmp_path / "ours") == loaded.config.moe_layers
