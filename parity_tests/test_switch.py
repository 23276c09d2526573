"""Switch Transformers' sparse layer: against transformers where it is right, against the papers where it is not.

Checked with transformers 5.23.0, whose layer routes each sequence apart and drops. Each finding is a test whose name
begins with `test_finding`; it holds the disagreement as a fact about transformers, and what we do instead.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is PyTorch")
pytest.importorskip(
    "transformers", minversion="5.23", reason="needs the extra 'hf', at 5.23: before, the layer routed otherwise"
)

import torch
import transformers

import jax_moe
from jax_moe import presets
from jax_moe.config import BalanceConfig, CapacityConfig, MoEConfig
from jax_moe.porting import PortError
from jax_moe.porting.torch_files import numpy_to_tensor
from parity_tests.compare import MismatchError, check_close, check_exact
from parity_tests.switch_cases import SIZES, Sizes, call, hf, mirror, mirror_numbers, numbers, our_numbers, ours, paper, state_of

FP32 = 5e-6  # measured: 6.0e-7
WIDE = 1e-14  # measured: 2.0e-15
every_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"B{s.batch}T{s.length}E{s.experts}C{s.slots}")


def contract(sizes: Sizes, **settings: Any) -> MoEConfig:
    """The preset at these sizes, by default as transformers has it: constant capacity, loss a sequence."""
    settings = {"expert_capacity": sizes.slots, "balance_per_sequence": True, "jitter_eps": 0.0, **settings}
    return presets.switch(sizes.width, sizes.expert_width, sizes.experts, **settings)


def their_numbers(layer: Any, x_BTD: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs, both losses by transformers' own functions, and gradients."""
    x = torch.from_numpy(x_BTD).requires_grad_()
    logits = layer.router(x)[2]
    z_loss = hf.router_z_loss_func(logits)
    balance = hf.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    return numbers(layer(x), balance, z_loss, x, dict(layer.named_parameters()))


def paper_numbers(
    state: dict[str, np.ndarray], x_BTD: np.ndarray, slots: int, group: str, balance: str
) -> tuple[dict[str, np.ndarray], list[int]]:
    """The papers' equations in fp64, and the tokens they drop."""
    B, T, D = x_BTD.shape
    weights = {name: torch.from_numpy(value.astype(np.float64)).requires_grad_() for name, value in state.items()}
    x = torch.from_numpy(x_BTD).requires_grad_()
    groups = [list(range(b * T, (b + 1) * T)) for b in range(B)] if group == "sequence" else [list(range(B * T))]
    y_RD, balance_loss, z_loss, dropped = paper(weights, x.reshape(-1, D), groups, slots, balance)
    return numbers(y_RD.reshape(B, T, D), balance_loss, z_loss, x, weights), dropped


@every_size
def test_against_transformers(sizes: Sizes) -> None:
    """Output, balance loss, z-loss and all gradients in fp32, tokens dropped; ours and torch_ref's."""
    theirs, x = sizes.theirs().train(), sizes.tokens().astype(np.float32)
    expected = their_numbers(theirs, x)
    layer = ours(contract(sizes), state_of(theirs))
    found, stats = our_numbers(layer, x)
    if sizes.length > 1:
        assert 0.1 < float(stats.dropped_fraction) < 0.9
    errors = [check_close(found, expected, FP32, "ours"), check_close(mirror_numbers(layer, x), expected, FP32, "torch_ref")]
    print(sizes, errors)


@pytest.mark.parametrize(("sizes", "group", "balance"), [
    (SIZES[0], "sequence", "batch"), (SIZES[0], "batch", "group"), (SIZES[1], "sequence", "group"), (SIZES[1], "batch", "batch"),
    (SIZES[2], "sequence", "group"), (SIZES[3], "batch", "batch"),
])
def test_against_the_papers(sizes: Sizes, group: str, balance: str) -> None:
    """Eq. 3's capacity with a factor that drops, both groups, both countings of the balance loss, in fp64."""
    x = sizes.tokens(2)
    state = {name: value.astype(np.float64) for name, value in state_of(sizes.theirs()).items()}
    config = contract(sizes, expert_capacity=None, capacity_factor=0.8).with_capacity(0.8, group=group)
    config = dataclasses.replace(config, balance=BalanceConfig(counted_in=balance))
    tokens = sizes.length * (1 if group == "sequence" else sizes.batch)
    slots = int(np.ceil(tokens * 4 / (5 * sizes.experts)))
    expected, dropped = paper_numbers(state, x, slots, group, balance)
    with jax.enable_x64(True):
        layer = ours(config, state)
        found, stats = our_numbers(layer, x)
        assert float(stats.dropped_fraction) == pytest.approx(len(dropped) / (sizes.batch * sizes.length), abs=1e-15)
        errors = [check_close(found, expected, WIDE, "ours"), check_close(mirror_numbers(layer, x), expected, WIDE, "torch_ref")]
    assert dropped or sizes.length == 1
    print(sizes, group, balance, errors)


def test_the_two_countings_of_the_balance_loss_differ() -> None:
    """A mean of products is not the product of means, so a test that mixed them up would be seen."""
    sizes, x = SIZES[1], SIZES[1].tokens()
    state = state_of(sizes.theirs())
    losses = [float(paper_numbers(state, x, sizes.slots, "sequence", balance)[0]["balance"]) for balance in ("batch", "group")]
    assert abs(losses[0] - losses[1]) > 0.05  # measured: 1.27 and 1.37


# Dropped tokens


def test_a_dropped_token_gets_exactly_nothing_and_keeps_its_residual() -> None:
    """The layer's answer is 0 there; around it `x + layer(norm(x))` leaves the token as it was, bit for bit."""
    sizes = SIZES[1]
    theirs, x = sizes.theirs().eval(), sizes.tokens().astype(np.float32)
    y_BTD, _ = call(ours(contract(sizes), state_of(theirs)), x)
    _, dropped = paper_numbers(state_of(theirs), x.astype(np.float64), sizes.slots, "sequence", "batch")
    zero = np.flatnonzero((np.asarray(y_BTD).reshape(-1, sizes.width) == 0).all(axis=1)).tolist()
    assert zero == sorted(dropped) and 5 < len(dropped) < 30
    with torch.no_grad():
        answer = theirs(torch.from_numpy(x)).reshape(-1, sizes.width)
        assert (answer[dropped] == 0).all(), "transformers 5.23 adds nothing either"
        block = hf.SwitchTransformersLayerFF(_config(sizes), is_sparse=True).eval()
        block.mlp = theirs
        block.layer_norm = torch.nn.Identity()  # so that the mixture sees x itself
        through = block(torch.from_numpy(x)).reshape(-1, sizes.width).numpy()
    check_exact({"x": through[dropped]}, {"x": x.reshape(-1, sizes.width)[dropped]}, "a dropped token after the block")


def _config(sizes: Sizes) -> Any:
    return transformers.SwitchTransformersConfig(d_model=sizes.width, d_ff=sizes.expert_width, num_experts=sizes.experts)


def test_finding_transformers_4_kept_the_dropped_token() -> None:
    """Finding: transformers 4 put p(x) * x in a dropped token's place, and the residual then counted it twice.

    Its layer began from a clone of the hidden states and multiplied everything by the router's probability. The paper
    passes such a token "directly to the next layer through the residual connection"; so do transformers 5.23 and we.
    """
    sizes = SIZES[1]
    state, x = state_of(sizes.theirs()), sizes.tokens()
    expected, dropped = paper_numbers(state, x, sizes.slots, "sequence", "group")
    logits = x.reshape(-1, sizes.width) @ state["router.classifier.weight"].T.astype(np.float64)
    best = torch.from_numpy(logits).softmax(-1).max(-1).values.numpy()
    kept = expected["y"].reshape(-1, sizes.width).copy()
    kept[dropped] = best[dropped, None] * x.reshape(-1, sizes.width)[dropped]
    found, _ = our_numbers(ours(contract(sizes), state), x.astype(np.float32))
    check_close({"y": found["y"]}, {"y": expected["y"]}, FP32, "the paper's")
    with pytest.raises(MismatchError, match="y"):
        check_close({"y": found["y"]}, {"y": kept.reshape(x.shape)}, 0.1, "transformers 4's")


# What transformers has otherwise


def test_finding_the_capacity_is_a_constant() -> None:
    """Finding: `expert_capacity` (64) does not follow the length: 64 slots for 8 tokens as for 8000.

    Eq. 3 says tokens / experts * factor, which the preset computes. A loaded layer gets transformers' constant.
    """
    fixed, paper = presets.switch(expert_capacity=64), presets.switch()
    assert [fixed.expert_capacity(length) for length in (8, 512, 8000)] == [8, 64, 64]
    assert [paper.expert_capacity(length) for length in (8, 512, 8000)] == [2, 80, 1250]
    assert fixed.with_capacity(2.0).expert_capacity(512) == 128, "a factor takes the constant's place"


def test_finding_padding_takes_slots() -> None:
    """Finding: `router_ignore_padding_tokens` is stored and read nowhere; padding is routed, counted and can drop text.

    In Mesh TensorFlow padding takes no slot. Ours with a mask: text after padding gets what it gets without.
    """
    sizes = Sizes(1, 8, 6, 10, 2, 2)
    theirs, text = sizes.theirs(router_ignore_padding_tokens=True).eval(), sizes.tokens().astype(np.float32)
    padded = np.concatenate([np.repeat(text[:, :1], 4, axis=1), text], axis=1)
    with torch.no_grad():
        alone, behind = theirs(torch.from_numpy(text)).numpy(), theirs(torch.from_numpy(padded)).numpy()[:, 4:]
    assert np.abs(alone - behind).max() > 0.1, "transformers ignores padding by now"
    layer, mask = ours(contract(sizes), state_of(theirs)), np.arange(12)[None] >= 4
    copy = mirror(layer)
    with torch.no_grad():
        answers = [(call(layer, padded, mask_BT=mask), call(layer, text))]
        answers += [(copy(torch.from_numpy(padded), mask_BT=torch.from_numpy(mask)), copy(torch.from_numpy(text)))]
    for (y_BTD, stats), (plain_BTD, plain) in answers:
        found = {"y": y_BTD[:, 4:], "balance": stats.load_balance_loss, "z": stats.router_z_loss}
        wanted = {"y": plain_BTD, "balance": plain.load_balance_loss, "z": plain.router_z_loss}
        arrays = [{name: np.asarray(value) for name, value in one.items()} for one in (found, wanted)]
        check_close(arrays[0], arrays[1], 1e-7, "behind padding")  # measured: 0
        assert not np.asarray(y_BTD[:, :4]).any()


def test_finding_jitter_reaches_the_experts_in_fp32() -> None:
    """Finding: in fp32 the router multiplies its argument in place, so the experts see the jittered input; in bf16,
    where the router works on a wider copy, they see the clean one. The paper jitters "the input to the router" only.
    """
    sizes = SIZES[1]
    theirs, x = sizes.theirs(router_jitter_noise=0.1).train(), sizes.tokens().astype(np.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        in_place = theirs(torch.from_numpy(x.copy())).numpy()
    torch.manual_seed(0)
    jitter = torch.empty(x.shape).uniform_(0.9, 1.1).numpy()
    config = contract(sizes, jitter_eps=0.1)
    block = dataclasses.replace(config, router=dataclasses.replace(config.router, jitter_scope="block"))
    state = state_of(theirs)
    kinds = {"router": config, "block": block}
    answers = {name: call(ours(kind, state), x, jitter_BTD=jitter)[0] for name, kind in kinds.items()}
    check_close({"y": np.asarray(answers["block"])}, {"y": in_place}, FP32, "what transformers computes")
    with pytest.raises(MismatchError, match="y"):
        check_close({"y": np.asarray(answers["router"])}, {"y": in_place}, 0.01, "the experts see the clean input")
    torch.manual_seed(0)
    theirs, given = theirs.to(torch.bfloat16), torch.from_numpy(x).to(torch.bfloat16)
    before = given.clone()
    with torch.no_grad():
        theirs(given)
    assert torch.equal(given, before), "transformers changes its argument in bf16 too"


def test_finding_bf16_chooses_from_rounded_probabilities() -> None:
    """Finding: probabilities are rounded to the input's dtype before the argmax; two that round alike go to the lower
    expert, not the likelier. We choose in fp32, as "selective precision" says, and round the weight afterwards.
    """
    sizes = Sizes(1, 1, 2, 3, 2, 1)
    theirs = sizes.theirs()
    with torch.no_grad():
        theirs.router.classifier.weight.copy_(torch.tensor([[1.0, 0.0], [1.001, 0.0]]))
    theirs = theirs.to(torch.bfloat16)
    theirs.router.classifier.weight.data = torch.tensor([[1.0, 0.0], [1.001, 0.0]])
    x = torch.tensor([[[1.0, 0.5]]], dtype=torch.bfloat16)
    chosen, weight, logits = theirs.router(x)
    assert logits.argmax(-1).item() == 1 and chosen.argmax(-1).item() == 0
    layer = ours(contract(sizes), state_of(sizes.theirs()))
    layer.router.kernel[...] = jnp.asarray([[1.0, 1.001], [0.0, 0.0]])
    _, routing, _, _, _ = layer.routing(jnp.asarray([[[1.0, 0.5]]], jnp.bfloat16))
    assert routing.expert_GSK.ravel().tolist() == [1]
    assert float(routing.weight_GSK.astype(jnp.bfloat16)[0, 0, 0]) == float(weight.detach().float().ravel()[0])


def test_a_bf16_answer_is_transformers_to_the_bit() -> None:
    """bf16 weights and input: the router in fp32, its probability rounded, one product: no bit differs."""
    sizes = SIZES[1]
    theirs, x = sizes.theirs().to(torch.bfloat16).eval(), torch.from_numpy(sizes.tokens()).to(torch.bfloat16)
    state = state_of(theirs)
    with torch.no_grad():
        expected = theirs(x).float().numpy()
    y_BTD, _ = call(ours(contract(sizes), state), jnp.asarray(x.float().numpy(), jnp.bfloat16))
    check_exact({"y": np.asarray(y_BTD, np.float32)}, {"y": expected}, "bf16")


@pytest.mark.parametrize("sparse", [1, 2])
def test_finding_losses_of_a_stack(sparse: int) -> None:
    """Finding: with every layer sparse both losses are silently 0; otherwise layers are joined along the sequence.

    The paper adds each layer's loss. Joined, f and P are averaged over layers first, so that layers which lean to
    different experts pass for balanced; and the joined z-loss is the mean over layers, not the sum.
    """
    config = transformers.SwitchTransformersConfig(
        vocab_size=11, d_model=8, d_kv=4, d_ff=6, num_heads=2, num_layers=4, num_decoder_layers=4, num_experts=4,
        decoder_start_token_id=0,
        num_sparse_encoder_layers=4 // sparse, num_sparse_decoder_layers=4 // sparse, router_jitter_noise=0.0, dropout_rate=0.0,
    )
    torch.manual_seed(3)
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    routers = [m for m in model.encoder.modules() if isinstance(m, hf.SwitchTransformersTop1Router)]
    seen: list[Any] = []
    for router in routers:
        torch.nn.init.normal_(router.classifier.weight, std=3.0)
        router.register_forward_hook(lambda _m, _i, output: seen.append(output[2]))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(2, 11, (2, 7)))
    with torch.no_grad():
        output = model(input_ids=tokens, labels=tokens, output_router_logits=True)
    assert len(seen) == len(routers) == 4 // sparse
    if sparse == 1:
        assert (output.encoder_z_loss, output.encoder_aux_loss) == (0, 0)
        return
    joined = torch.cat(seen, dim=1)
    layers = [float(hf.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))) for logits in seen]
    z_losses = [float(hf.router_z_loss_func(logits)) for logits in seen]
    pooled = float(hf.load_balancing_loss_func(joined.softmax(-1), joined.argmax(-1)))
    assert float(output.encoder_aux_loss) == pytest.approx(pooled, rel=1e-6)
    assert float(output.encoder_z_loss) == pytest.approx(np.mean(z_losses), rel=1e-6)
    assert pooled < np.mean(layers) - 0.05


# Names


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(dtype: str, bias: bool) -> None:
    """Into our layer and back: the same names, bits and dtypes; transformers loads them strictly; the layout is found."""
    sizes = SIZES[2]
    theirs = sizes.theirs(router_bias=bias).to(getattr(torch, dtype))
    state, config = state_of(theirs), contract(sizes)
    config = dataclasses.replace(config, router=dataclasses.replace(config.router, bias=bias))
    back = jax_moe.to_torch(ours(config, state), layout="switch")
    check_exact(back, state, "round trip")
    sizes.theirs(router_bias=bias).to(getattr(torch, dtype)).load_state_dict(
        {name: numpy_to_tensor(value) for name, value in back.items()}, strict=True
    )


def test_loading_is_strict() -> None:
    """Everything that is wrong at once, under transformers' names."""
    state = state_of(SIZES[0].theirs())
    state["experts.expert_3.wi_0.weight"] = state.pop("experts.expert_3.wi.weight")
    state["router.classifier.weight"] = state["router.classifier.weight"][:3]
    with pytest.raises(PortError) as caught:
        ours(contract(SIZES[0]), state)
    assert (caught.value.missing, caught.value.unexpected) == (
        ["experts.expert_3.wi.weight"], ["experts.expert_3.wi_0.weight"]
    )
    assert caught.value.misshapen == ["router.classifier.weight is (3, 6), must be (4, 6)"]


# Planted faults, and settings that are refused


def swapped(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Two experts in each other's place."""
    names = {"experts.expert_0.": "experts.expert_1.", "experts.expert_1.": "experts.expert_0."}
    return {next((b + n.removeprefix(a) for a, b in names.items() if n.startswith(a)), n): v for n, v in state.items()}


@pytest.mark.parametrize("fault", ["experts", "slots", "order", "balance"])
def test_planted_fault_is_caught(fault: str) -> None:
    """Experts swapped, one slot too many, the surest tokens first, the other counting of the balance loss.

    Without a fault the same comparison is `test_against_transformers`.
    """
    sizes, config = SIZES[1], contract(SIZES[1])
    theirs, x = sizes.theirs().train(), sizes.tokens().astype(np.float32)
    expected, state = their_numbers(theirs, x), state_of(theirs)
    if fault == "experts":
        state = swapped(state)
    elif fault == "balance":
        config = dataclasses.replace(config, balance=BalanceConfig())
    else:
        change = {"slots": sizes.slots + 1} if fault == "slots" else {"priority": "probability"}
        config = dataclasses.replace(config, capacity=dataclasses.replace(config.capacity, **change))
    with pytest.raises(MismatchError):
        check_close(our_numbers(ours(config, state), x)[0], expected, 1e3 * FP32, fault)


@pytest.fixture
def as_users_call_it() -> Iterator[None]:
    """Without the type checks that run under pytest only: a user meets the contract's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize(("make", "message"), [
    (lambda: CapacityConfig(slots=0), "slots=0: must be an integer of at least 1"),
    (lambda: presets.switch(expert_capacity=2.5), "slots=2.5: must be an integer of at least 1"),
    (lambda: BalanceConfig(counted_in="token"), "counted_in='token': must be one of 'batch', 'group'"),
    (
        lambda: BalanceConfig(counted_in="group", pooled="over_layers"),
        "counted_in='group': must be 'batch' when pooled='over_layers'",
    ),
])
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


def test_groups_of_padding_do_not_count() -> None:
    """A sequence of padding alone has no share in the loss that is counted in groups."""
    sizes, x = SIZES[1], SIZES[1].tokens().astype(np.float32)
    layer = ours(contract(sizes), state_of(sizes.theirs()))
    mask = np.array([[True], [False], [True]]).repeat(sizes.length, axis=1)
    wanted = float(call(layer, x[[0, 2]])[1].load_balance_loss)
    assert float(call(layer, x, mask_BT=mask)[1].load_balance_loss) == pytest.approx(wanted, rel=1e-6)
    _, stats = mirror(layer)(torch.from_numpy(x), mask_BT=torch.from_numpy(mask))
    assert stats.load_balance_loss.item() == pytest.approx(wanted, rel=1e-6)
    _, stats = call(layer, x, mask_BT=np.zeros_like(mask))
    assert float(stats.load_balance_loss) == 0
