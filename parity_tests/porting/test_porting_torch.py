"""Weights, gradients and moments by name against torch; `.pt` files; the commands that need torch."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="these tests compare with PyTorch, which is not installed")

import jax_moe  # noqa: E402
import torch_ref  # noqa: E402
from jax_moe import presets  # noqa: E402
from jax_moe.disk import verify  # noqa: E402
from jax_moe.porting import PortError, from_torch_tree  # noqa: E402
from jax_moe.porting.checkpoint import load  # noqa: E402
from jax_moe.porting.formats.state_file import read_state, write_state  # noqa: E402
from jax_moe.porting.torch_tensors import numpy_to_tensor, tensor_to_numpy  # noqa: E402
from moe_cli.main import main  # noqa: E402
from moe_parity.relative import relative_error  # noqa: E402
from parity_tests.cli.commands import fails  # noqa: E402
from parity_tests.porting.porting_cases import FUSED, HEADS, SOFT, STATES, TINY, bits, make, mixtral_state  # noqa: E402

CAUSAL = {"model_dim": 8, "num_heads": 2}
REFERENCES: dict[str, tuple[Callable, str | None]] = {
    "makemoe": (lambda: torch_ref.MakeMoE(TINY), None),
    "soft_moe": (lambda: torch_ref.SoftMoE(SOFT), None),
    "attention": (lambda: torch_ref.Attention(HEADS), None),
    "attention_fused": (lambda: torch_ref.Attention(FUSED), None),
    "block": (
        lambda: torch_ref.Block(torch_ref.BlockConfig(attention=HEADS, moe=presets.deepseek_v3(8, 6, 4, 2, 3, 2, 1))),
        None,
    ),
    "block_soft": (
        lambda: torch_ref.Block(
            torch_ref.BlockConfig(attention=torch_ref.AttentionConfig(causal=False, **CAUSAL), moe=SOFT)
        ),
        None,
    ),
    "moe_mixtral": (lambda: torch_ref.MixtralSparseMoeBlock(presets.mixtral(8, 6, 4, 2)), "mixtral"),
    "moe_makemoe": (lambda: torch_ref.MoE(presets.makemoe(8, 6, 4, 2)), None),
    "moe_qwen2": (lambda: torch_ref.MoE(presets.qwen2_moe(8, 6, 4, 2, shared_dim=5)), None),
    "moe_deepseek": (lambda: torch_ref.MoE(presets.deepseek_v3(8, 6, 4, 2, 3, 2, 1)), None),
    "moe_gpt_oss": (lambda: torch_ref.MoE(presets.gpt_oss(8, 6, 4, 2)), None),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", REFERENCES)
def test_state_dicts_cross_strictly_both_ways(name: str, dtype: str) -> None:
    build, layout = REFERENCES[name]
    reference = build().to(getattr(torch, dtype))
    state = reference.state_dict()
    module = jax_moe.from_torch(make(name, 1, dtype), state)
    back = jax_moe.to_torch(module, layout=layout)
    verify({key: tensor_to_numpy(value) for key, value in state.items()}, back, Path(name))
    other = build().to(getattr(torch, dtype))
    other.load_state_dict({key: numpy_to_tensor(value) for key, value in back.items()}, strict=True)
    for key, value in other.state_dict().items():
        assert value.dtype == state[key].dtype and torch.equal(value, state[key]), key


def test_tensors_keep_their_bits() -> None:
    tensor = torch.tensor([[1.0, float("nan"), -0.0], [2**-130, float("inf"), 3.14]])
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        odd = tensor.to(dtype).T  # not contiguous
        array = tensor_to_numpy(odd)
        back = numpy_to_tensor(array)
        assert back.dtype == dtype and back.shape == odd.shape and array.flags.c_contiguous
        assert tensor_to_numpy(back).tobytes() == array.tobytes()
        array[0, 0] = 7
        assert odd[0, 0] == 1 and back[0, 0] == 1


def test_gradients_and_moments_take_torchs_names() -> None:
    """One AdamW step of a tiny makeMoE in fp64, noise silenced: gradients, moments and weights by name."""
    tokens = np.random.default_rng(0).integers(0, 11, (2, 5))
    torch.manual_seed(0)
    reference = torch_ref.MakeMoE(TINY).double()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    silence = torch_ref.Randomness(noise_BTE=torch.zeros(3, 2, 4, 4, dtype=torch.float64))
    with jax.enable_x64(True):
        model = jax_moe.from_torch(make("makemoe", 1, "float64"), reference.state_dict())
        logits = reference(torch.from_numpy(tokens[:, :-1]), randomness=silence)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(tokens[:, 1:]).flatten()).backward()
        optimizer.step()
        graphdef, params = nnx.split(model)

        def loss(params: nnx.State) -> jax.Array:
            logits = nnx.merge(graphdef, params)(jnp.asarray(tokens[:, :-1]))
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(tokens[:, 1:])).mean()

        gradient = jax.jit(jax.grad(loss))(params)
        step = optax.adamw(1e-2, weight_decay=1e-2)
        update, moments = jax.jit(step.update)(gradient, step.init(params), params)
        ours = {
            "grad": jax_moe.to_torch(model, gradient),
            "exp_avg": jax_moe.to_torch(model, optax.tree.get(moments, "mu")),
            "exp_avg_sq": jax_moe.to_torch(model, optax.tree.get(moments, "nu")),
            "weight": jax_moe.to_torch(model, optax.apply_updates(params, update)),
        }
        named = dict(reference.named_parameters())
        moments_of = lambda kind: {name: optimizer.state[value][kind] for name, value in named.items()}  # noqa: E731
        theirs = {
            "grad": {name: value.grad for name, value in named.items()},
            "exp_avg": moments_of("exp_avg"), "exp_avg_sq": moments_of("exp_avg_sq"), "weight": named,
        }
        alive = {name for name in ours["grad"] if "noise" not in name and "experts" not in name}  # no noise, few tokens
        assert all(np.abs(ours["grad"][name]).max() > 0 for name in alive)
        for kind, arrays in ours.items():
            assert arrays.keys() == theirs[kind].keys()
            for name, value in arrays.items():
                # measured worst, of a tensor's largest entry: 7.5e-15, weights 3.5e-16
                error = relative_error(value, theirs[kind][name].detach().numpy())
                assert error <= (3e-15 if kind == "weight" else 5e-14), (kind, name, error)
        tree = from_torch_tree(model, theirs["exp_avg"])
        back = jax_moe.to_torch(model, tree)
        verify({name: value.numpy() for name, value in theirs["exp_avg"].items()}, back, Path("moments"))


@pytest.mark.parametrize("family", STATES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pt_files_there_and_back(family: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = STATES[family](dtype)
    torch.save({name: numpy_to_tensor(value) for name, value in state.items()}, tmp_path / "a.pt")
    assert main(["port", str(tmp_path / "a.pt"), str(tmp_path / "folder")]) == 0
    assert main(["port", str(tmp_path / "folder"), str(tmp_path / "b.pth")]) == 0
    assert main(["port", str(tmp_path / "a.pt"), str(tmp_path / "c.safetensors")]) == 0
    assert capsys.readouterr().out.count("read back bit for bit") == 3
    for path in ("b.pth", "c.safetensors"):
        verify(state, read_state(tmp_path / path), tmp_path)
    loaded = torch.load(tmp_path / "b.pth", weights_only=True)
    assert all(value.is_contiguous() for value in loaded.values())


class Payload:
    """Writes a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"phi": Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"phi": Payload(tmp_path / "ran")}, protocol=2))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    for name in ("evil.pt", "plain.pt", "module.pt"):
        said = fails(capsys, "port", tmp_path / name, tmp_path / "out")
        assert "its pickle holds code or objects other than tensors" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt", "module.pt", "plain.pt"]


def test_pt_files_that_are_not_whole_state_dicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "whole.pt"
    write_state(whole, mixtral_state())
    for spoiled in (
        whole.read_bytes()[:-100], whole.read_bytes()[:300], b"", b"hello world", bytes(range(256)), b'{"a": 1}'
    ):
        (tmp_path / "a.pt").write_bytes(spoiled)
        assert "not one or is cut short" in fails(capsys, "port", tmp_path / "a.pt", tmp_path / "out")
    torch.save(torch.zeros(3), tmp_path / "a.pt")
    assert "holds a Tensor" in fails(capsys, "port", tmp_path / "a.pt", tmp_path / "out")
    torch.save({"model": {"phi": torch.zeros(3)}, "step": 5}, tmp_path / "a.pt")
    assert "phi is (3,), must be" in fails(capsys, "port", tmp_path / "a.pt", tmp_path / "out")
    state = {name: numpy_to_tensor(value) for name, value in mixtral_state().items()}
    state["experts.1.w1.weight"] = state["experts.1.w1.weight"].double()
    state["lora"] = state.pop("experts.2.w3.weight")
    torch.save(state, tmp_path / "a.pt")
    line = fails(capsys, "port", tmp_path / "a.pt", tmp_path / "out")
    for words in (
        "missing: experts.2.w3.weight", "unexpected: lora", "experts.1.w1.weight is float64, must be float32"
    ):
        assert words in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "whole.pt"]


def test_a_jax_checkpoint_loads_into_the_reference(tmp_path: Path) -> None:
    module = make("makemoe", 4)
    write_state(tmp_path / "a.pt", jax_moe.to_torch(module))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = torch.load(tmp_path / "a.pt", weights_only=True)
    torch_ref.MakeMoE(TINY).load_state_dict(state, strict=True)
    assert bits(load(tmp_path / "a.pt").module) == bits(module)


def test_a_tensor_of_integers_is_refused() -> None:
    state = {name: numpy_to_tensor(value) for name, value in mixtral_state().items()}
    state["gate.weight"] = state["gate.weight"].long()
    with pytest.raises(PortError, match=r"gate\.weight is int64, must be float32"):
        jax_moe.from_torch(make("moe_mixtral"), state)
