"""Where transformers' Switch layer differs from the papers or between versions, and what happens to a dropped token.

Checked with transformers 5.23.0. Each finding is a test whose name begins with `test_finding`; it holds the
disagreement as a fact about transformers, and what we do instead.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is PyTorch")
pytest.importorskip(
    "transformers", minversion="5.23", reason="needs the extra 'hf', at 5.23: before, the layer routed otherwise"
)

import torch
import transformers

from jax_moe import presets
from parity_tests.layers.switch_cases import (
    FP32,
    SIZES,
    Sizes,
    call,
    contract,
    hf,
    mirror,
    our_numbers,
    ours,
    paper_numbers,
    state_of,
)
from parity_tests.shared.compare import MismatchError, check_close, check_exact


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
    return transformers.SwitchTransformersConfig(
        d_model=sizes.width, d_ff=sizes.expert_width, num_experts=sizes.experts
    )


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
    routing = layer.run(jnp.asarray([[[1.0, 0.5]]], jnp.bfloat16)).routing
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
        num_sparse_encoder_layers=4 // sparse, num_sparse_decoder_layers=4 // sparse, router_jitter_noise=0.0,
        dropout_rate=0.0,
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
