"""Mixed precision and rematerialisation: what is cast and what is not, both frameworks against fp64, what each costs.

Long because casting and remat are tested together, on the same small model: what a call sees, keeps and returns.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_moe
from jax_moe import presets
from jax_moe.config.precision import PRECISIONS, Precision
from jax_moe.moe import Router
from jax_moe.norms import RMSNorm
from jax_moe.precision import cast_to_compute
from jax_moe.remat import rematerialised
from moe_parity.relative import norm, relative_error
from parity_tests.shared.filled import filled
from parity_tests.shared.quick import QUICK

MIXED = PRECISIONS["mixed"]
# Every expert is chosen and has room, so that rounding cannot flip a choice: only rounding errors remain.
CONFIG = jax_moe.MakeMoEConfig(
    vocab_size=11, block_size=8, model_dim=32, num_heads=4, num_layers=2, num_experts=4, top_k=4, capacity_factor=1.0,
    dropout=0.0,
)
TOKENS = np.random.default_rng(0).integers(0, 11, (4, 9))


def small(config: jax_moe.MakeMoEConfig = CONFIG, dtype: Any = jnp.float32) -> jax_moe.MakeMoE:
    return filled(lambda: jax_moe.MakeMoE(config, rngs=nnx.Rngs(0), param_dtype=dtype))


def objective(model: nnx.Module, precision: Precision | None = None, **kwargs: Any) -> tuple[Callable, dict]:
    """(params, tokens) -> loss including the balance loss; and the params."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: Any, tokens_BT1: Any) -> jax.Array:
        module = nnx.merge(graphdef, params, rest)
        cast = module if precision is None else cast_to_compute(module, precision)
        output = cast.run(tokens_BT1[:, :-1], **kwargs)
        logits = output.logits_BTV if precision is None else output.logits_BTV.astype(precision.output)
        return jax_moe.next_token_loss(logits, tokens_BT1[:, 1:]) + output.stats.load_balance_loss.mean()

    return loss, nnx.to_pure_dict(params)


def compiled(function: Callable, *args: Any) -> Any:
    """The function compiled without the optimisations that take most of a small program's compile time."""
    return jax.jit(function).lower(*args).compile(compiler_options=QUICK)


def flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x, np.float64) for path, x in leaves}


# What is cast


@pytest.mark.usefixtures("unchecked")
def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="compute='float16': must be one of 'float64', 'float32', 'bfloat16'"):
        Precision(compute="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cast_experts='never': must be one of 'at_use', 'at_once'"):
        Precision(cast_experts="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="remat='some': must be one of 'none', 'dots', 'full'"):
        rematerialised(lambda x: x, "some")  # type: ignore[arg-type]


SOFT = jax_moe.SoftMoEConfig(
    model_dim=4, num_experts=2, num_slots=2, hidden_dims=(4,), layer_norm=True, output_layer_norm=True
)
DECODER = jax_moe.DecoderConfig.grouped(
    vocab_size=11, model_dim=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, dense_layers=(0,), dense_dim=12,
    moe=dataclasses.replace(
        presets.qwen2_moe(model_dim=16, expert_dim=8, num_experts=4, top_k=2, shared_dim=8), dispatcher="einsum"
    ),
)
MODULES: dict[str, Callable[[], nnx.Module]] = {
    "makemoe": lambda: jax_moe.MakeMoE(CONFIG), "soft": lambda: jax_moe.SoftMoE(SOFT),
    "decoder": lambda: jax_moe.Decoder(DECODER, rngs=nnx.Rngs(0)),
    "correction": lambda: jax_moe.MoE(presets.deepseek_v3(
        model_dim=8, expert_dim=4, num_experts=4, top_k=2, num_clusters=2, top_clusters=1
    )),
}


@pytest.mark.parametrize("name", MODULES)
def test_exactly_routers_norms_and_experts_stay_wide(name: str) -> None:
    """Checked by the variables of the modules."""
    make = MODULES[name]
    cast = nnx.eval_shape(lambda: cast_to_compute(make(), dataclasses.replace(MIXED, cast_experts="at_once")))
    wide = [part for _, part in nnx.iter_modules(cast) if isinstance(part, nnx.LayerNorm | RMSNorm | Router)]
    expected = {id(value) for part in wide for value in vars(part).values() if isinstance(value, nnx.Variable)}
    expected |= {id(cast.phi)} if name == "soft" else set()
    found = {
        id(value) for _, value in nnx.iter_graph(cast) if isinstance(value, nnx.Variable) and value.dtype == jnp.float32
    }
    assert found == expected and len(found) >= 1


def test_experts_are_cast_at_use_or_at_once() -> None:
    for role in ("expert", "shared"):
        assert MIXED.dtype_of(role) is None  # type: ignore[arg-type]
        assert dataclasses.replace(MIXED, cast_experts="at_once").dtype_of(role) == "bfloat16"  # type: ignore[arg-type]
    assert MIXED.dtype_of("soft_expert") == "bfloat16"  # Soft MoE's experts are cast before the call


@pytest.mark.parametrize("name", MODULES)
def test_plain_arrays_are_cast_by_what_is_declared_of_them(name: str) -> None:
    module = MODULES[name]()
    plain = nnx.to_pure_dict(nnx.state(module))
    told = r"^params: .* has no role: must be in a variable .* or named in declared=jax_moe"
    with pytest.raises(ValueError, match=told):
        cast_to_compute(plain, MIXED)
    cast = nnx.to_pure_dict(nnx.state(cast_to_compute(module, MIXED)))
    for declared in (module, jax_moe.declared(module)):
        found = cast_to_compute(plain, MIXED, declared=declared)
        assert jax.tree.map(lambda value: value.dtype, found) == jax.tree.map(lambda value: value.dtype, cast)


def products(precision: Precision) -> list[tuple[str, ...]]:
    """Operand and result dtypes of every matrix product of a loss and its gradient."""
    loss, params = objective(small(dataclasses.replace(CONFIG, dispatcher="gather", capacity_factor=1.0)), precision)
    found = []

    def walk(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                found.append((*(str(v.aval.dtype) for v in eqn.invars), *eqn.invars[1].aval.shape))
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(jax.grad(loss))(params, TOKENS).jaxpr)
    return found


def test_products_are_in_bf16_but_for_the_router_and_the_combination() -> None:
    E, D, K = CONFIG.num_experts, CONFIG.model_dim, CONFIG.top_k
    wide = [shape for left, right, *shape in products(MIXED) if left == right == "float32"]
    narrow = [shape for left, right, *shape in products(MIXED) if left == right == "bfloat16"]
    assert len(wide) + len(narrow) == len(products(MIXED))
    assert [E, D, 4 * D] in narrow and [E, 4 * D, D] in narrow  # the experts
    routers = {(D, E), (4, 8, D), (4, 8, E)}  # x W, and the gradients of both
    combination = {(1, 32, K, D), (1, 32, D), (1, 32, K)}
    assert {tuple(shape) for shape in wide} <= routers | combination


def test_the_default_changes_nothing() -> None:
    """The compiled program is the same, line by line."""
    programs = []
    for precision, kwargs in ((None, {}), (PRECISIONS["float32"], {"remat": "none"})):
        loss, params = objective(small(), precision, **kwargs)
        programs.append(jax.jit(jax.grad(loss)).lower(params, TOKENS).as_text())
    assert programs[0] == programs[1]


# How near the truth


def by_norm(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """|error| / |truth| for every name."""
    return {name: relative_error(actual[name], truth, norm) for name, truth in expected.items()}


def all_by_norm(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """|error| / |truth| over all names."""
    return by_norm(*({"": np.concatenate([tree[name].ravel() for name in expected])} for tree in (actual, expected)))[
        ""
    ]


def our_side(precision: Precision | None) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients by torch's names; in fp64 without a precision."""
    with jax.enable_x64(precision is None):
        model = small()
        if precision is None:
            graphdef, state = nnx.split(model)
            model = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.float64), state))
        loss, params = objective(model, precision)
        value, gradient = compiled(jax.value_and_grad(loss), params, TOKENS)(params, TOKENS)
        assert {x.dtype for x in jax.tree.leaves(gradient)} == {
            jnp.dtype("float64" if precision is None else "float32")
        }
        named = jax_moe.to_torch(model, gradient)
    return float(value), {name: np.asarray(value, np.float64) for name, value in named.items()}


def theirs(precision: Precision, **kwargs: Any) -> tuple[float, dict[str, np.ndarray]]:
    """As `our_side`, for PyTorch."""
    import torch

    import torch_ref

    reference = torch_ref.MakeMoE(CONFIG).eval()
    reference.load_state_dict({name: torch.tensor(value) for name, value in jax_moe.to_torch(small()).items()})
    silence = torch_ref.Randomness(noise_BTE=torch.zeros(CONFIG.num_layers, 4, 8, CONFIG.num_experts))
    tokens = torch.from_numpy(TOKENS)
    output = torch_ref.call_in(precision, reference, tokens[:, :-1], method="run", randomness=silence, **kwargs)
    loss = torch_ref.next_token_loss(output.logits_BTV, tokens[:, 1:]) + output.stats.load_balance_loss.mean()
    loss.backward()
    found = {name: value.grad for name, value in reference.named_parameters() if value.grad is not None}
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    return loss.item(), {name: grad.double().numpy() for name, grad in found.items()}


def test_mixed_is_as_near_the_truth_in_both() -> None:
    pytest.importorskip("torch", reason="the other side of the comparison is PyTorch")
    truth, gradients = our_side(None)
    (loss_j, ours_j), (loss_t, theirs_t) = our_side(MIXED), theirs(MIXED)
    expected = {name: value for name, value in gradients.items() if np.linalg.norm(value) > 1e-9 and name in theirs_t}
    assert len(expected) > 60
    error_j, error_t = all_by_norm(ours_j, expected), all_by_norm(theirs_t, expected)
    assert max(abs(loss_j - truth), abs(loss_t - truth)) < 4e-3  # measured: 6e-4
    assert 2e-3 < max(error_j, error_t) < 0.06  # measured: 0.012 and 0.010; below 2e-3 nothing would be in bf16
    assert 0.5 < error_j / error_t < 2


# Weights that are stored in bf16 forget small updates


def trained(precision: Precision, steps: int = 20) -> dict[str, np.ndarray]:
    """The weights after steps of AdamW, stored in the dtype `params` throughout."""
    loss, params = objective(small(dataclasses.replace(CONFIG, num_layers=1)), precision)
    optimizer = optax.adamw(1e-4)
    params = jax.tree.map(lambda x: x.astype(precision.params), params)

    def run(params: Any, moments: Any) -> Any:
        def step(carry: tuple, _: None) -> tuple:
            params, moments = carry
            update, moments = optimizer.update(jax.grad(loss)(params, jnp.asarray(TOKENS)), moments, params)
            return (optax.apply_updates(params, update), moments), None

        return jax.lax.scan(step, (params, moments), None, length=steps)[0][0]

    moments = optimizer.init(params)
    return flat(compiled(run, params, moments)(params, moments))


def test_master_weights_keep_what_bf16_forgets() -> None:
    """AdamW moves a weight by about the learning rate: 1e-4 is below half a bf16 step of a weight above 0.05."""
    start, truth = flat(objective(small(dataclasses.replace(CONFIG, num_layers=1)))[1]), trained(PRECISIONS["float32"])
    name = "head.kernel"
    moved = np.linalg.norm(truth[name] - start[name])
    errors = {}
    for what, precision in (("mixed", MIXED), ("fault", dataclasses.replace(MIXED, params="bfloat16"))):
        errors[what] = np.linalg.norm(trained(precision)[name] - truth[name]) / moved
    assert errors["mixed"] < 0.1  # measured: 0.015
    assert errors["fault"] > 0.5  # planted: bf16 master weights; measured: 0.95


# What is computed a second time


@pytest.mark.parametrize("kind", ["capacity", "grouped", "decoder"])
def test_remat_changes_memory_and_no_number(kind: str) -> None:
    if kind == "decoder":
        make: Callable = lambda: jax_moe.Decoder(DECODER, rngs=nnx.Rngs(0), param_dtype=jnp.float64)  # noqa: E731
    else:
        factor = 1.0 if kind == "capacity" else None
        config = dataclasses.replace(CONFIG, top_k=2, num_layers=4, dropout=0.1, capacity_factor=factor)
        config = dataclasses.replace(config, dispatcher="gather" if factor else "grouped")
        make = lambda: jax_moe.MakeMoE(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)  # noqa: E731
    answers, memory = {}, {}
    tokens = TOKENS[:1] if kind == "grouped" else TOKENS  # fewer sizes of tiles to compile
    with jax.enable_x64(True):
        model = filled(make)
        for remat in ("none", "dots", "full") if kind == "capacity" else ("none", "full"):
            loss, params = objective(model, key=jax.random.key(0), remat=remat)
            program = compiled(jax.value_and_grad(loss), params, tokens)
            answers[remat] = flat(program(params, tokens))
            memory[remat] = program.memory_analysis().temp_size_in_bytes
    for remat in list(memory)[1:]:
        for name, value in answers["none"].items():
            np.testing.assert_allclose(answers[remat][name], value, rtol=0, atol=1e-14, err_msg=name)
    assert sorted(memory.values(), reverse=True) == list(memory.values())  # capacity, measured: 1.6, 1.1 and 0.8 MB
    assert memory["full"] < memory["none"]


def test_remat_in_torch_changes_no_number() -> None:
    """Also under mixed precision: a recomputed layer sees the cast weights."""
    pytest.importorskip("torch", reason="the remat of torch_ref is PyTorch's")
    loss, gradients = theirs(MIXED)
    for remat in ("dots", "full"):
        again, more = theirs(MIXED, remat=remat)
        assert again == loss
        for name, value in gradients.items():
            np.testing.assert_array_equal(more[name], value, err_msg=name)


def test_both_learners_take_both_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of train.py's learners on a batch, in mixed precision with full remat."""
    pytest.importorskip("torch", reason="one of the two is PyTorch's")
    from moe_train.configs.settings import model_config
    from moe_train.data import text as data
    from moe_train.learners import torch_learner
    from moe_train.learners.jax_learner import JaxLearner
    from moe_train.learners.models import FreshMakeMoE
    from parity_tests.train.test_train_torch import CONFIG as RUN
    from parity_tests.train.test_train_torch import TEXT

    text = data.tokenize(TEXT, "here", 8)
    config = dataclasses.replace(
        RUN, precision="mixed", remat="full", steps=4, model=dataclasses.replace(RUN.model, num_layers=1)
    )
    model, losses = model_config(config, len(text.vocabulary)), []
    tokens = data.batch(text, config.seed, "train", 0, config.batch_size, 8)
    ours = JaxLearner(config, FreshMakeMoE(model))
    monkeypatch.setattr(torch_learner, "JaxLearner", lambda *_: ours)  # the source of its initial weights, made once
    for learner in (ours, torch_learner.TorchLearner(config, model)):
        losses.append([float(learner.train_step(step, tokens)) for step in range(3)])
        assert {value.dtype for value in learner.weights().values()} == {np.dtype("float32")}
    error = np.abs(np.subtract(*losses))
    assert 1e-5 < error.max() < 0.05  # measured: 0.008; in fp32 they agree to 4e-6
