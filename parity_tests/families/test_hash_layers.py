"""DeepSeek-V4's layers whose experts a table of tokens chooses, against the module in transformers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

import jax_moe  # noqa: E402
import torch_ref  # noqa: E402
from jax_moe.moe import ExpertTable  # noqa: E402
from jax_moe.porting import PortError  # noqa: E402
from jax_moe.porting.families import mixture_of  # noqa: E402
from moe_parity.sides.transformers import widened  # noqa: E402
from parity_tests.families.cases import CASES, TINY  # noqa: E402
from parity_tests.families.reference import as_file, configuration, draw, inputs, save_model  # noqa: E402
from parity_tests.shared.compare import check_close, check_exact  # noqa: E402

V, LIMIT = TINY["vocab_size"], 6e-15  # measured: 6.4e-16


def table(E: int, K: int) -> np.ndarray:
    """K different experts for each token, every expert among them."""
    rows = np.random.default_rng(0).permuted(np.broadcast_to(np.arange(E), (V, E)), axis=-1)
    return rows[:, :K].copy()


def hashed(folder: Path) -> Path:
    """A whole tiny model's folder, its first layer's table drawn."""
    from safetensors.torch import load_file, save_file

    save_model(CASES["deepseek_v4"], folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    [name] = [name for name in tensors if name.endswith("tid2eid")]
    tensors[name] = torch.from_numpy(table(6, 2))
    save_file(tensors, file, {"format": "pt"})
    return folder


def test_a_layer_that_a_table_chooses_for() -> None:
    """Answer, gradients and torch_ref in fp64."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4SparseMoeBlock

    for shape in (0, 1):
        config = configuration(CASES["deepseek_v4"], shape)
        contract = mixture_of("deepseek_v4").mixture_config(as_file(config), 0)
        assert (contract.router.table_tokens, contract.router.correction_bias) == (V, False)
        config._experts_implementation = "eager"
        names = mixture_of("deepseek_v4").mixture
        assert names is not None
        with widened():
            module = DeepseekV4SparseMoeBlock(config, 0).double().eval()
            draw(module, seed=3)
            module.gate.tid2eid.copy_(torch.from_numpy(table(contract.num_experts, contract.top_k)))
            arrays, of_answer = inputs(CASES["deepseek_v4"], shape, "float64")
            x, cotangent = torch.from_numpy(arrays["x"]), torch.from_numpy(of_answer)
            tokens = torch.from_numpy(np.random.default_rng(1).integers(0, V, x.shape[:2]))
            y = module(x.requires_grad_(), tokens)
            (y * cotangent).sum().backward()
        theirs = {name: value.grad.numpy() for name, value in module.named_parameters()}
        with jax.enable_x64(True):
            state = {name: value.numpy() for name, value in module.state_dict().items()}
            moe = jax_moe.MoE(contract, param_dtype=jnp.float64)
            jax_moe.from_torch(moe, state, layout=names.in_memory.layer, cast=True)
            graph, params, rest = nnx.split(moe, nnx.Param, ...)

            @jax.jit
            def run(params: nnx.State, x_BTD: jax.Array, graph=graph, rest=rest, tokens=tokens, cotangent=cotangent):
                y_BTD, _ = nnx.merge(graph, params, rest)(x_BTD, tokens_BT=jnp.asarray(tokens.numpy()))
                return (y_BTD * cotangent.numpy()).sum(), y_BTD

            (_, mine), found = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(params, jnp.asarray(x.detach()))
            named = jax_moe.to_torch(moe, found[0], layout=names.in_memory.layer)
            layer = torch_ref.MoE(contract).double()
            layer.load_state_dict({n: torch.from_numpy(np.array(v)) for n, v in jax_moe.to_torch(moe).items()})
        where = f"hash_moe, shape {shape}"
        check_close({"y": np.asarray(mine)}, {"y": y.detach().numpy()}, LIMIT, where)
        check_close(named | {"x": np.asarray(found[1])}, theirs | {"x": x.grad.numpy()}, LIMIT, where)
        with torch.no_grad():
            again = layer(x, tokens_BT=tokens)[0].numpy()
        check_close({"y": again}, {"y": y.detach().numpy()}, LIMIT, f"{where}: torch_ref")


def test_a_folder_with_a_table(tmp_path: Path) -> None:
    """The table loads as it stands and goes back bit for bit, in the 64-bit integers of the file."""
    folder = hashed(tmp_path / "model")
    assert jax_moe.moe_layers(folder) == (0, 1)
    moe = jax_moe.load_moe(folder, 0, dtype="bfloat16")
    assert isinstance(moe.router.expert_table, ExpertTable) and moe.experts.up.dtype == jnp.bfloat16
    check_exact({"table": np.asarray(moe.router.expert_table[...])}, {"table": table(6, 2).astype(np.int32)}, "table")
    moe = jax_moe.load_moe(folder, 0)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    jax_moe.save_moe(moe, folder, 0)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}
    moe.router.expert_table[...] = moe.router.expert_table[...][::-1]
    jax_moe.save_moe(moe, folder, 0)
    again = np.asarray(jax_moe.load_moe(folder, 0).router.expert_table[...])
    check_exact({"table": again}, {"table": table(6, 2)[::-1].astype(np.int32)}, "another table")


def test_what_does_not_fit_a_table_is_named(tmp_path: Path) -> None:
    """Tokens that are missing, foreign or not asked for; a table of zeros, as a new model of transformers has it."""
    save_model(CASES["deepseek_v4"], tmp_path / "zeros")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "zeros" / "model.safetensors"
    tensors = load_file(file)
    [name] = [name for name in tensors if name.endswith("tid2eid")]
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, file, {"format": "pt"})
    with pytest.raises(PortError, match="the table of tokens names expert 0 twice for one token"):
        jax_moe.load_moe(tmp_path / "zeros", 0)
    moe, plain = (jax_moe.load_moe(hashed(tmp_path / "model"), layer) for layer in (0, 1))
    x_BTD, tokens_BT = jnp.ones((1, 2, moe.config.model_dim)), jnp.asarray([[0, V]])
    ref = torch_ref.MoE(moe.config)
    for call in (lambda **more: moe(x_BTD, **more), lambda **more: ref(torch.ones(1, 2, moe.config.model_dim), **more)):
        with pytest.raises(ValueError, match=f"tokens_BT=None: must be given: a table of {V} tokens"):
            call()
    with pytest.raises(ValueError, match=rf"token {V}: must be 0 to {V - 1}"):
        moe(x_BTD, tokens_BT=tokens_BT)
    with pytest.raises(ValueError, match=r"tokens_BT: must be None where no table of tokens chooses"):
        plain(x_BTD, tokens_BT=tokens_BT)
    masked = moe(x_BTD, tokens_BT=tokens_BT, mask_BT=jnp.asarray([[True, False]]))[0]
    assert np.isfinite(np.asarray(masked)).all() and (np.asarray(masked)[0, 1] == 0).all()
    traced = jax.jit(lambda tokens_BT: moe(x_BTD, tokens_BT=tokens_BT)[0])(tokens_BT)
    assert np.isfinite(np.asarray(traced)[0, 0]).all() and np.isnan(np.asarray(traced)[0, 1]).all()
