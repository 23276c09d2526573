"""`unchosen="skip"`, experts without tokens left alone: PyTorch's steps; state converts both ways and through files.

Long because steps, state, files and a whole run are tested on the same two sides.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")

import jax_moe  # noqa: E402
import torch_ref  # noqa: E402
from jax_moe.config.moe import MoEConfig  # noqa: E402
from jax_moe.optimizers import adamw_as_torch  # noqa: E402
from jax_moe.porting.optimizer.own_file import FILE  # noqa: E402
from jax_moe.unchosen import accumulated  # noqa: E402
from moe_cli.main import main  # noqa: E402
from moe_parity.training.jax_side import JaxTrainer, expert_counts, makemoe_loss  # noqa: E402
from parity_tests.layers import originals  # noqa: E402
from parity_tests.porting.decoder_cases import decoder  # noqa: E402
from parity_tests.shared.compare import MismatchError, check_close  # noqa: E402
from parity_tests.shared.filled import filled  # noqa: E402
from parity_tests.shared.state_dicts import check_same_state, check_same_weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick", "small_programs")
CONFIG = jax_moe.presets.switch(4, 6, 5)  # top-1 with a capacity
STEPS, TOKENS = 8, 3


@pytest.fixture(autouse=True)
def fp64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def numbers(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(1, TOKENS, 4))


def sides(config: MoEConfig = CONFIG) -> tuple[jax_moe.MoE, torch_ref.MoE]:
    layer = filled(lambda: jax_moe.MoE(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype("float64")))
    module = torch_ref.MoE(config).double().eval()  # Switch's jitter is not drawn
    module.load_state_dict({name: torch.from_numpy(value) for name, value in jax_moe.to_torch(layer).items()})
    return layer, module


def torch_run(module: torch_ref.MoE, parts: int = 1, steps: int = STEPS) -> tuple[dict[str, np.ndarray], Any]:
    """Weights and optimizer after a loop that leaves the gradients of experts without tokens at None."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.3)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        chosen_E = torch.zeros(5, dtype=torch.bool)
        for part in range(parts):
            y, stats = module(torch.from_numpy(numbers(step * parts + part)))
            ((y**2).sum() / parts).backward()
            chosen_E |= torch_ref.chosen_experts(stats)
        torch_ref.skip_unchosen(module, chosen_E)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return {name: value.detach().numpy().copy() for name, value in module.named_parameters()}, optimizer


def jax_run(layer: jax_moe.MoE, optimizer: Any, parts: int = 1) -> tuple[Any, Any]:
    """Weights and optimizer state after the same steps."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            y, stats = nnx.merge(graphdef, params, rest)(x)
            return (y**2).sum(), jax_moe.chosen_experts(stats)

        gradients, chosen_E = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params, chosen=chosen_E)
        return optax.apply_updates(params, updates), state

    for number in range(STEPS * parts):
        params, state = step(params, state, jnp.asarray(numbers(number)))
    return params, state


def skipping(unchosen: str = "skip", **kwargs: Any) -> Any:
    return adamw_as_torch(0.1, weight_decay=0.3, max_norm=1.0, unchosen=unchosen, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", [1, 2])
def test_steps_are_those_of_pytorch(parts: int) -> None:
    layer, module = sides()
    expected, theirs = torch_run(module, parts)
    taken = {int(theirs.state[p]["step"]) if p in theirs.state else 0 for p in module.parameters()}
    assert len(taken) > 2, "experts must have taken different numbers of steps"
    optimizer = skipping() if parts == 1 else accumulated(skipping(), parts)
    params, state = jax_run(layer, optimizer, parts)
    check_close(jax_moe.to_torch(layer, params), expected, 2e-14, "healthy")  # measured: 2.3e-15
    names = [name for name, _ in module.named_parameters()]
    back = jax_moe.optimizer_to_torch(layer, state, theirs.state_dict(), names=names)
    assert steps_by_number(back) == steps_by_number(theirs.state_dict())
    with pytest.raises(MismatchError):
        decayed, _ = jax_run(
            layer, skipping("decay") if parts == 1 else optax.MultiSteps(skipping("decay"), parts), parts
        )
        check_close(jax_moe.to_torch(layer, decayed), expected, 1e-3, "unchosen experts decayed")


def steps_by_number(state_dict: dict[str, Any]) -> dict[int, int]:
    return {i: int(entry["step"]) for i, entry in state_dict["state"].items()}


def test_multi_steps_alone_forgets_who_was_chosen_and_is_refused() -> None:
    layer, module = sides()
    _, theirs = torch_run(module)
    state = optax.MultiSteps(skipping(), 2).init(nnx.state(layer, nnx.Param))
    with pytest.raises(ValueError, match=r"MultiStepsState: must be jax_moe.unchosen.accumulated's"):
        jax_moe.optimizer_to_torch(
            layer, state, theirs.state_dict(), names=[name for name, _ in module.named_parameters()]
        )


def test_what_chosen_must_be() -> None:
    layer, _ = sides()
    params = nnx.state(layer, nnx.Param)
    optimizer = skipping()
    with pytest.raises(ValueError, match="chosen=None: must be which experts had tokens"):
        optimizer.update(params, optimizer.init(params), params)
    for wrong in (jnp.ones(4, bool), jnp.ones(5), {"experts": jnp.ones(5, bool), "other": jnp.ones(5, bool)}):
        with pytest.raises(ValueError, match=r"must be \{'experts': \(\(5,\), 'bool'\)\}"):
            optimizer.update(params, optimizer.init(params), params, chosen=wrong)
    with pytest.raises(Exception, match="unchosen"):  # ValueError, or the type checker's error
        skipping("drop")
    dense = {"kernel": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"declared=None: must be the module or jax_moe\.declared"):
        optimizer.init(dense)
    optimizer = skipping(declared={})
    optimizer.update(dense, optimizer.init(dense), dense)  # nothing to choose


def test_who_had_tokens() -> None:
    x, mask = np.random.default_rng(0).normal(size=(2, 4, 4)), np.asarray([[True] * 4, [False] * 4])
    everything_dropped = jax_moe.presets.makemoe(4, num_experts=5, capacity_factor=0.1)
    for config, replay, expected in (
        (CONFIG, [[[0], [0], [2], [2]], [[4]] * 4], [True, False, True, False, False]),  # expert 4 got only padding
        (everything_dropped, [[[0, 1]] * 4] * 2, [False] * 5),
    ):
        layer, module = sides(config)
        choice = np.asarray(replay)
        stats = layer(jnp.asarray(x), mask_BT=jnp.asarray(mask), expert_BTK=jnp.asarray(choice, jnp.int32))[1]
        theirs = module(torch.from_numpy(x), mask_BT=torch.from_numpy(mask), expert_BTK=torch.from_numpy(choice))[1]
        assert jax_moe.chosen_experts(stats).tolist() == torch_ref.chosen_experts(theirs).tolist() == expected
    with pytest.raises(ValueError, match=r"chosen_LE=\(2, 5\): must be \[L, E\] of .*, which have \[5\] experts"):
        torch_ref.skip_unchosen(module, torch.ones(2, 5, dtype=torch.bool))


# --- state


def test_state_there_and_back() -> None:
    """Bit for bit, untrained experts having no entry; optax's AdamW refuses the state and says what to do."""
    layer, module = sides()
    _, theirs = torch_run(module, steps=2)
    names = [name for name, _ in module.named_parameters()]
    assert len(theirs.state_dict()["state"]) < len(names), "an expert must never have been chosen"
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    fresh = skipping(declared=layer).init(params)
    state = jax_moe.optimizer_from_torch(layer, theirs.state_dict(), fresh, names=names)
    back = jax_moe.optimizer_to_torch(layer, state, theirs.state_dict(), names=names)
    check_same_state(back, theirs.state_dict())
    theirs.load_state_dict(back)
    with pytest.raises(
        ValueError, match=r"takes no step in PyTorch; .*unchosen='skip'.*step of experts\[\d\] is \d, must be 2"
    ):
        jax_moe.optimizer_from_torch(layer, theirs.state_dict(), skipping("decay").init(params), names=names)
    broken = theirs.state_dict()
    number = next(i for i, name in enumerate(names) if name.endswith("up.weight") and i in broken["state"])
    broken = {**broken, "state": {**broken["state"], number: {**broken["state"][number], "step": torch.tensor(99.0)}}}
    with pytest.raises(ValueError, match=r"step of experts.* is 99, must be \d as of its expert's other parameters"):
        jax_moe.optimizer_from_torch(layer, broken, fresh, names=names)


def test_equal_counts_fit_both_kinds() -> None:
    layer, module = sides()
    optimizer = torch.optim.AdamW(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    names, params = [name for name, _ in module.named_parameters()], nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    for unchosen in ("skip", "decay"):
        fresh = skipping(unchosen, declared=jax_moe.declared(layer)).init(params)
        state = jax_moe.optimizer_from_torch(layer, optimizer.state_dict(), fresh, names=names)
        assert jax.tree.structure(state) == jax.tree.structure(fresh)
        check_same_state(
            jax_moe.optimizer_to_torch(layer, state, optimizer.state_dict(), names=names), optimizer.state_dict()
        )


# --- files


@pytest.fixture
def training_file(tmp_path: Path) -> tuple[Path, Any]:
    """What the original makeMoE loop saves: its own modules, batches so small that experts get no tokens."""
    torch.manual_seed(0)
    module = originals.LanguageModel(11, 8, 16, 2, 2, 9, 2, 3.0, 0.0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for _ in range(4):
        tokens = torch.randint(0, 11, (1, 4))
        loss = torch.nn.functional.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt", [name for name, _ in module.named_parameters()]


def test_port_of_the_originals_training_file(
    training_file: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, names = training_file
    folder, back = path.parent / "folder", path.parent / "back.pt"
    assert main(["port", str(path), str(folder), "--top-k", "2"]) == 0
    assert "after 4 steps (0 to 3 where experts had no tokens)" in capsys.readouterr().out
    assert main(["port", str(folder), str(back)]) == 0
    before, after = (torch.load(file, weights_only=True) for file in (path, back))
    check_same_weights(after["model"], before["model"])
    check_same_state(after["optimizer"], before["optimizer"])
    assert len(set(steps_by_number(before["optimizer"]).values())) > 2
    config = jax_moe.MakeMoEConfig(vocab_size=11, block_size=8, model_dim=16, num_heads=2, num_layers=2, num_experts=9)
    model = filled(lambda: jax_moe.MakeMoE(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = jax_moe.load_optimizer(folder, skipping(declared=jax_moe.declared(model)).init(params))
    check_same_state(jax_moe.optimizer_to_torch(model, state, before["optimizer"], names=names), before["optimizer"])
    with pytest.raises(
        ValueError, match=r"optimizer.safetensors: .*step of blocks.moe.experts\[0, \d\] is \d, must be 4"
    ):
        jax_moe.load_optimizer(folder, skipping("decay").init(params))
    assert (folder / FILE).is_file()


def test_sgd_whose_experts_have_no_momentum_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A round trip bit for bit; optax's momentum of zero behaves as torch's None."""
    torch.manual_seed(0)
    module = originals.SparseMoE(4, 6, 1, 6.0, 0.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.randn(1, 2, 4)).sum().backward()
    optimizer.step()
    whole = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
    assert len(whole["optimizer"]["state"]) < len(whole["model"])
    torch.save(whole, tmp_path / "theirs.pt")
    assert main(["port", str(tmp_path / "theirs.pt"), str(tmp_path / "folder"), "--top-k", "1"]) == 0
    assert main(["port", str(tmp_path / "folder"), str(tmp_path / "back.pt")]) == 0
    assert "optimizer state (momentum_buffer), read back" in capsys.readouterr().out
    check_same_state(torch.load(tmp_path / "back.pt", weights_only=True)["optimizer"], whole["optimizer"])
    layer = filled(lambda: jax_moe.MoE(jax_moe.presets.makemoe(4, num_experts=6, top_k=1), rngs=nnx.Rngs(0)))
    fresh = optax.sgd(0.1, momentum=0.9).init(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    names = [name for name, _ in module.named_parameters()]
    from_file = jax_moe.load_optimizer(tmp_path / "folder", fresh)
    for state in (from_file, jax_moe.optimizer_from_torch(layer, whole["optimizer"], fresh, names=names)):
        back = jax_moe.optimizer_to_torch(layer, state, whole["optimizer"], names=names)
        for i in range(len(names)):
            held = whole["optimizer"]["state"].get(i, {}).get("momentum_buffer")
            got = back["state"][i]["momentum_buffer"]
            assert torch.equal(got, torch.zeros_like(got) if held is None else held)


def test_decoders_count_their_routed_experts_alone() -> None:
    """Dense layers and shared experts are trained in every step."""
    model = decoder("qwen2_moe")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = skipping(declared=jax_moe.declared(model))
    state = optimizer.init(params)
    stats = model.run(jnp.asarray([[1]], jnp.int32)).stats
    chosen_LE = jax_moe.chosen_experts(stats)
    assert not chosen_LE.all() and chosen_LE.any(axis=1).all()
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params, chosen=chosen_LE)
    counts = expert_counts(state)
    assert list(counts) == ["moe.experts"] and (counts["moe.experts"] == np.asarray(chosen_LE)).all()
    still = [path for path, value in jax.tree_util.tree_flatten_with_path(updates)[0] if (value == 0).any()]
    assert {jax.tree_util.keystr(path, simple=True, separator=".") for path in still} == {
        f"moe.experts.{name}" for name in ("up", "gate", "down")
    }


# --- the microscope's trainer


def test_a_decayed_expert_is_caught() -> None:
    """Sixteen steps of makeMoE's own modules and of ours; with decay in place of skipping the comparison fails."""
    pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")
    from parity_tests.table.run_checks import OPTIONS, SKIPPING, original_sides

    settings = dataclasses.replace(SKIPPING, steps=16)
    made = original_sides(settings, "float64")
    made.theirs.run(made.draw, range(16))
    made.ours.run(made.draw, range(16))
    check_close(made.ours.weights(), made.theirs.weights(), 1e-14, "skipped")  # measured: 1.3e-15
    ours = JaxTrainer(
        original_sides(settings, "float64").ours.model, settings, makemoe_loss,
        adamw_as_torch(partial(rate, settings), weight_decay=0.01, max_norm=settings.clip_norm), OPTIONS,
    )
    ours.run(made.draw, range(16))
    with pytest.raises(MismatchError):
        check_close(ours.weights(), made.theirs.weights(), 1e-6, "decayed")


def rate(settings: Any, step: jax.Array) -> jax.Array:
    from moe_parity.training.jax_side import schedule

    return schedule(settings)(step)  # type: ignore[return-value]
