"""The original projects' behaviour as the third judge: state dicts, outputs, gradients and 200 characters of text."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="this leg has no PyTorch")

import jax_moe  # noqa: E402
import torch_ref  # noqa: E402
from parity_tests.layers import originals  # noqa: E402
from torch_ref.models.makemoe import SparseMoE  # noqa: E402

WIDE = jnp.dtype("float64")
TOLERANCE = 1e-14  # of the largest entry, or of 1


@pytest.fixture(autouse=True, scope="module")
def fp64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def agree(got: object, want: torch.Tensor, what: str = "") -> None:
    got_n, want_n = np.asarray(got, np.float64), want.detach().double().numpy()
    np.testing.assert_allclose(got_n, want_n, rtol=0, atol=TOLERANCE * max(np.abs(want_n).max(), 1.0), err_msg=what)


def tokens_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(make: type, *args: object, **kwargs: object) -> torch.nn.Module:
    """An original with weights of its own initialisation, the same ones every time, without noise or dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*args, **kwargs).to(torch.float64)


def numpy_of(state: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in state.items()}


def check_there_and_back(layer: nnx.Module, original: torch.nn.Module, **layout: str) -> None:
    """What to_torch returns loads strictly into the original and is bit for bit what it was."""
    before = {name: value.clone() for name, value in original.state_dict().items()}
    returned = jax_moe.to_torch(layer, **layout)
    original.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in returned.items()}, strict=True)
    for name, value in original.state_dict().items():
        assert torch.equal(value, before[name].to(value.dtype)), name


def check_layer(
    layer: nnx.Module, call: Callable, original: torch.nn.Module, answer: torch.Tensor, x: torch.Tensor, **layout: str
) -> None:
    """The answer, and the gradients of sum(answer * cos(its position)) by the input and by name."""
    graphdef, state = nnx.split(layer)

    def loss(state: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = call(nnx.merge(graphdef, state), x)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum(), y

    (_, y), (tree, x_gradient) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        state, jnp.asarray(x.detach().numpy())
    )
    agree(y, answer, "answer")
    if answer.requires_grad:  # not where everything was dropped
        (answer * torch.cos(torch.arange(answer.numel(), dtype=answer.dtype)).reshape(answer.shape)).sum().backward()
    agree(x_gradient, torch.zeros_like(x) if x.grad is None else x.grad, "input")
    named, wanted = jax_moe.to_torch(layer, tree, **layout), dict(original.named_parameters())
    assert set(named) == set(wanted)
    for name, parameter in wanted.items():
        agree(named[name], torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, name)


# --- makeMoE's layer ------------------------------------------------------------------------------------------------
# batch, length, top_k, capacity factor, noise injected or silenced. A factor of 0.5 drops half;
# 0.3 with 5 tokens is int(0.75) = 0 slots: everything is dropped
LAYERS = [
    (2, 7, 2, 1.0, True), (2, 7, 2, 1.0, False), (2, 7, 1, 1.0, True), (3, 8, 2, 0.5, True), (3, 8, 4, 4.0, True),
    (1, 5, 2, 0.3, True),
]


@pytest.mark.parametrize(("batch", "length", "top_k", "factor", "noisy"), LAYERS)
def test_sparse_moe(batch: int, length: int, top_k: int, factor: float, noisy: bool) -> None:
    original = made(originals.SparseMoE, 8, 4, top_k, factor).eval()
    x, noise = tokens_of(1, batch, length, 8).requires_grad_(), tokens_of(2, batch, length, 4) * noisy
    original.router.draw = lambda like: noise
    want = original(x)

    config = jax_moe.presets.makemoe(8, num_experts=4, top_k=top_k, capacity_factor=factor)
    reference = SparseMoE(config).to(x.dtype).eval()
    reference.load_state_dict(original.state_dict(), strict=True)
    agree(reference(x, noise_BTE=noise)[0].detach(), want)

    # einsum serves every capacity, none included
    config = dataclasses.replace(config, dispatcher="einsum")
    layer = nnx.eval_shape(lambda: jax_moe.MoE(config, rngs=nnx.Rngs(0), param_dtype=WIDE))
    jax_moe.from_torch(layer, original.state_dict())
    noise_j = jnp.asarray(noise.numpy())

    def call(layer: jax_moe.MoE, x: jax.Array) -> jax.Array:
        return layer(x, noise_BTE=noise_j)[0]

    check_layer(layer, call, original, want, x, layout="makemoe")
    check_there_and_back(layer, original, layout="makemoe")


def test_a_capacity_off_by_one_is_caught() -> None:
    original = made(originals.SparseMoE, 8, 4, 2, 1.0).eval()
    original.router.draw = originals.no_noise
    x = tokens_of(1, 2, 7, 8)
    config = jax_moe.presets.makemoe(8, num_experts=4, top_k=2).with_capacity(1.0, rounding="floor", minimum=8)  # 7 + 1
    reference = SparseMoE(config).to(x.dtype).eval()
    reference.load_state_dict(original.state_dict(), strict=True)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        agree(reference(x, noise_BTE=torch.zeros(2, 7, 4, dtype=x.dtype))[0].detach(), original(x))


# --- Mixtral's block ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_mixtral_block(top_k: int) -> None:
    original = made(originals.MixtralBlock, 8, 12, 4, top_k)
    x = tokens_of(3, 2, 7, 8).requires_grad_()
    want, want_logits = original(x)

    config = jax_moe.presets.mixtral(8, 12, 4, top_k)
    reference = torch_ref.MixtralSparseMoeBlock(config).to(x.dtype).eval()
    reference.load_state_dict(original.state_dict(), strict=True)
    got, got_logits = reference(x)
    agree(got.detach(), want)
    agree(got_logits.detach(), want_logits)

    layer = nnx.eval_shape(lambda: jax_moe.MoE(config, rngs=nnx.Rngs(0), param_dtype=WIDE))
    jax_moe.from_torch(layer, original.state_dict())

    def call(layer: jax_moe.MoE, x: jax.Array) -> jax.Array:
        return layer(x)[0]

    check_layer(layer, call, original, want, x, layout="mixtral")
    check_there_and_back(layer, original, layout="mixtral")


# --- Soft MoE -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("hidden", [[8], [12], [8, 6]], ids=str)
def test_soft_moe(hidden: list[int]) -> None:
    original = made(originals.SoftMoE, 8, 3, 2, hidden)
    x = tokens_of(4, 2, 5, 8).requires_grad_()
    want = original(x)

    config = jax_moe.SoftMoEConfig(model_dim=8, num_experts=3, num_slots=2, hidden_dims=tuple(hidden))
    reference = torch_ref.SoftMoE(config).to(x.dtype)
    reference.load_state_dict(original.state_dict(), strict=True)
    agree(reference(x).detach(), want)

    layer = nnx.eval_shape(lambda: jax_moe.SoftMoE(config, rngs=nnx.Rngs(0), param_dtype=WIDE))
    jax_moe.from_torch(layer, original.state_dict())

    def call(layer: jax_moe.SoftMoE, x: jax.Array) -> jax.Array:
        return layer(x)

    check_layer(layer, call, original, want, x)
    check_there_and_back(layer, original)


# --- the language model ---------------------------------------------------------------------------------------------
VOCAB, BLOCK, WIDTH, HEADS, LAYERS_DEEP, EXPERTS, TOP_K = 17, 8, 16, 4, 2, 4, 2


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """200 characters call every function thousands of times; the checks run in all other tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@functools.cache
def language_models(factor: float | None) -> tuple[torch.nn.Module, torch_ref.MakeMoE, jax_moe.MakeMoE]:
    """The original, torch_ref and jax_moe with its weights. If dropless, the original gets room for every token."""
    room = EXPERTS / TOP_K if factor is None else factor
    original = made(originals.LanguageModel, VOCAB, BLOCK, WIDTH, HEADS, LAYERS_DEEP, EXPERTS, TOP_K, room).silence()
    config = jax_moe.MakeMoEConfig(
        vocab_size=VOCAB, block_size=BLOCK, model_dim=WIDTH, num_heads=HEADS, num_layers=LAYERS_DEEP,
        num_experts=EXPERTS, top_k=TOP_K, capacity_factor=factor,
    )
    reference = torch_ref.MakeMoE(config).to(torch.float64).eval()
    reference.load_state_dict(original.state_dict(), strict=True)
    model = nnx.eval_shape(lambda: jax_moe.MakeMoE(config, rngs=nnx.Rngs(0), param_dtype=WIDE))
    jax_moe.from_torch(model, original.state_dict())
    return original, reference, model


@pytest.mark.parametrize("factor", [1.0, None], ids=["capacity 1", "dropless"])
def test_language_model(factor: float | None, without_type_checks: None) -> None:
    original, reference, model = language_models(factor)
    tokens = torch.randint(VOCAB, (3, BLOCK), generator=torch.Generator().manual_seed(5))
    want = original(tokens)
    silence = torch_ref.Randomness(noise_BTE=torch.zeros(LAYERS_DEEP, 3, BLOCK, EXPERTS, dtype=want.dtype))
    agree(reference(tokens, randomness=silence).detach(), want)
    agree(jax.jit(lambda tokens: model(tokens))(jnp.asarray(tokens.numpy(), jnp.int32)), want)
    check_there_and_back(model, original)


@pytest.mark.parametrize(
    ("factor", "batch", "length"), [(1.0, 1, 1), (1.0, 3, 20), (None, 1, 20), (None, 3, 3)],
    ids=["capacity, short prompt", "capacity, long prompts", "dropless, long prompt", "dropless, short prompts"],
)
def test_greedy_text_is_the_same(factor: float | None, batch: int, length: int, without_type_checks: None) -> None:
    original, reference, model = language_models(factor)
    prompt = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(6))
    want = original.greedy(prompt, 200)
    assert len(want[0, length:].unique()) >= 4, "a constant text would prove nothing"
    by_reference = torch_ref.generate(reference, prompt, max_new_tokens=200, temperature=0)
    by_model = jax_moe.generate(model, jnp.asarray(prompt.numpy(), jnp.int32), max_new_tokens=200, temperature=0)
    assert torch.equal(by_reference, want)
    np.testing.assert_array_equal(np.asarray(by_model), want.numpy())


def test_short_prompts_have_no_slot_as_in_the_original() -> None:
    config, sizes = jax_moe.MakeMoEConfig(num_experts=EXPERTS, top_k=TOP_K).moe, range(1, 5)
    assert [config.expert_capacity(n) for n in sizes] == [int(n * TOP_K / EXPERTS * 1.0) for n in sizes] == [0, 1, 1, 2]
