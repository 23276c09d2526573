"""The mixtures of transformers by themselves: their state dicts in memory and on disk into one `MoE`, and back."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

import jax_moe  # noqa: E402
from jax_moe import presets  # noqa: E402
from jax_moe.porting import PortError  # noqa: E402
from parity_tests.shared.compare import MismatchError, check_close, check_exact  # noqa: E402
from parity_tests.table.family_cases import GRANITE, MIXTRAL, OLMOE, QWEN2, QWEN3, draw_weights  # noqa: E402

WIDTH = 8
# family: classes in transformers, sizes, preset, names in memory, names on disk
BLOCKS: dict[str, tuple[str, str, dict[str, Any], Any, str, str]] = {
    "mixtral": ("Mixtral", "SparseMoeBlock", MIXTRAL, presets.mixtral(WIDTH, 20, 5, 2), "hf_fused", "mixtral"),
    "qwen2_moe": (
        "Qwen2Moe", "SparseMoeBlock", QWEN2, presets.qwen2_moe(WIDTH, 14, 6, 3, shared_dim=10), "hf_fused_shared",
        "hf_experts_shared",
    ),
    "qwen3_moe": ("Qwen3Moe", "SparseMoeBlock", QWEN3, presets.qwen3_moe(WIDTH, 14, 7, 3), "hf_fused", "hf_experts"),
    "olmoe": ("Olmoe", "SparseMoeBlock", OLMOE, presets.olmoe(WIDTH, 14, 6, 3), "hf_fused", "hf_experts"),
    "granitemoe": (
        "GraniteMoe", "MoE", GRANITE, presets.granite_moe(WIDTH, 14, 5, 2), "hf_granitemoe_in_memory", "hf_granitemoe",
    ),
}
LIMIT = 2e-6  # measured: 4e-7 of the largest entry


def block(name: str) -> Any:
    """The layer as transformers makes it, its weights drawn."""
    prefix, kind, sizes = BLOCKS[name][:3]
    config = getattr(transformers, f"{prefix}Config")(hidden_size=WIDTH, experts_implementation="eager", **sizes)
    if name == "qwen3_moe":
        config.norm_topk_prob = True  # the preset's
    module = getattr(transformers.models, name)
    made = getattr(getattr(module, f"modeling_{name}"), f"{prefix}{kind}")(config).eval()
    draw_weights(made, seed=3)
    return made


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_by_itself(name: str) -> None:
    """Loaded from memory the answer is the block's; back come the same bits; through the names on disk too."""
    *_, config, memory, disk = BLOCKS[name]
    theirs = block(name)
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    layer = jax_moe.MoE(config, rngs=nnx.Rngs(0))
    jax_moe.from_torch(layer, theirs.state_dict())
    x_BTD = np.random.default_rng(0).normal(size=(2, 7, WIDTH)).astype(np.float32)
    with torch.no_grad():
        answer = theirs(torch.from_numpy(x_BTD.copy()))
    expected = {"y": (answer[0] if isinstance(answer, tuple) else answer).numpy()}
    check_close({"y": np.asarray(layer(jnp.asarray(x_BTD))[0])}, expected, LIMIT, name)
    check_exact(jax_moe.to_torch(layer, layout=memory), state, f"{name}: back")
    again = jax_moe.from_torch(jax_moe.MoE(config, rngs=nnx.Rngs(1)), jax_moe.to_torch(layer, layout=disk))
    check_exact(jax_moe.to_torch(again, layout=memory), state, f"{name}: by way of {disk}")
    theirs.load_state_dict(
        {key: torch.from_numpy(value) for key, value in jax_moe.to_torch(again, layout=memory).items()}
    )
    layer.experts.gate[...], layer.experts.up[...] = layer.experts.up[...], layer.experts.gate[...]
    with pytest.raises(MismatchError):
        check_close({"y": np.asarray(layer(jnp.asarray(x_BTD))[0])}, expected, 1e3 * LIMIT, name)


def test_what_is_wrong_is_named_in_the_blocks_own_words() -> None:
    state = {key: value.numpy() for key, value in block("qwen2_moe").state_dict().items()}
    del state["shared_expert.up_proj.weight"]
    with pytest.raises(PortError) as caught:
        jax_moe.from_torch(jax_moe.MoE(BLOCKS["qwen2_moe"][3], rngs=nnx.Rngs(0)), state)
    assert caught.value.missing == ["shared_expert.up_proj.weight"] and not caught.value.unexpected


def test_gradients_under_the_blocks_names() -> None:
    """A tree is named as the weights are."""
    layer = jax_moe.MoE(BLOCKS["mixtral"][3], rngs=nnx.Rngs(0))
    tree = nnx.state(layer, nnx.Param)
    named = jax_moe.to_torch(layer, tree, layout="hf_fused")
    check_exact(named, jax_moe.to_torch(layer, layout="hf_fused"), "as a tree")
