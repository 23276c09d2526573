"""The gated delta net against that of `transformers`: answers and gradients of every parameter by name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

from jax_moe.attention import LinearAttention  # noqa: E402
from jax_moe.attention.positions import whole_call  # noqa: E402
from jax_moe.config import LinearAttentionConfig  # noqa: E402
from moe_parity.sides.transformers import widened  # noqa: E402
from parity_tests.shared.compare import check_close  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick")
D, J, G, A, M, C = 6, 2, 3, 4, 5, 3
ANSWERS, GRADIENTS = 4e-14, 2e-13  # relative, in fp64; measured: 4.1e-15, 2.5e-14


def split(weights: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-Next's tensors under our names: its maps stand together, key head by key head."""
    by_head = weights["in_proj_qkvz.weight"].reshape(J, 2 * A + 2 * G * M, D)
    query, key, value, gate = np.split(by_head, [A, 2 * A, 2 * A + G * M], axis=1)
    beta, decay = np.split(weights["in_proj_ba.weight"].reshape(J, 2 * G, D), 2, axis=1)
    maps = {"query": query, "key": key, "value": value, "gate": gate, "beta": beta, "decay": decay}
    taps = np.split(weights["conv1d.weight"][:, 0], [J * A, 2 * J * A])
    names = ("query_taps", "key_taps", "value_taps")
    return {
        **{name: each.transpose(2, 0, 1) for name, each in maps.items()},
        **{name: each.reshape(J, -1, C) for name, each in zip(names, taps, strict=True)},
        "decay_log": weights["A_log"].reshape(J, G), "decay_bias": weights["dt_bias"].reshape(J, G),
        "out_norm.scale": weights["norm.weight"], "out": weights["out_proj.weight"].T.reshape(J, G * M, D),
    }


@pytest.mark.parametrize(("T", "padded"), [(7, 0), (70, 0), (9, 3)])
def test_against_transformers(T: int, padded: int) -> None:
    """One chunk, more than one, and padding on the left."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    settings = transformers.Qwen3NextConfig(
        hidden_size=D, linear_num_key_heads=J, linear_num_value_heads=J * G, linear_key_head_dim=A,
        linear_value_head_dim=M, linear_conv_kernel_dim=C, num_hidden_layers=1, rms_norm_eps=1e-5,
        layer_types=["linear_attention"],
    )
    draw = np.random.default_rng(T)
    x, probe = draw.normal(size=(2, 2, T, D))
    mask = np.ones((2, T), bool)
    mask[1, :padded] = False
    with widened(), jax.enable_x64(True):
        reference = Qwen3NextGatedDeltaNet(settings, 0).double()
        for _, value in sorted(reference.named_parameters()):
            value.data.copy_(torch.from_numpy(draw.normal(size=tuple(value.shape))))
        x_torch = torch.from_numpy(x).requires_grad_()
        y = reference(x_torch, attention_mask=torch.from_numpy(mask.astype(np.int64)) if padded else None)
        (y * torch.from_numpy(probe * mask[..., None])).sum().backward()
        config = LinearAttentionConfig(
            model_dim=D, num_key_heads=J, num_value_heads=J * G, key_dim=A, value_dim=M, taps=C, norm_eps=1e-5
        )
        init = jax.nn.initializers.lecun_normal()
        layer = LinearAttention(config, rngs=nnx.Rngs(0), kernel_init=init, param_dtype=jnp.float64)
        graphdef, state = nnx.split(layer)
        named = split({name: value.detach().numpy() for name, value in reference.named_parameters()})
        for path, variable in nnx.to_flat_state(state):
            variable[...] = jnp.asarray(named.pop(".".join(map(str, path))))
        assert named == {}
        positions = whole_call(T, jnp.broadcast_to(jnp.arange(T), (2, T)), jnp.asarray(mask) if padded else None)

        @jax.jit
        def run(state: Any, x: jax.Array) -> Any:
            def loss(state: Any, x: jax.Array) -> Any:
                y, _ = nnx.merge(graphdef, state)(x, positions)
                return (y * (probe * mask[..., None])).sum(), y

            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)

        (_, ours), (gradients, x_gradient) = run(state, jnp.asarray(x))
        check_close({"y": np.asarray(ours)[mask]}, {"y": y.detach().numpy()[mask]}, ANSWERS, "answers")
        expected = split({name: value.grad.numpy() for name, value in reference.named_parameters()})
        found = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(gradients)}
        check_close(
            found | {"x": np.asarray(x_gradient)}, expected | {"x": x_torch.grad.numpy()}, GRADIENTS, "gradients"
        )
