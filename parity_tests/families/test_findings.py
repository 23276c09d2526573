"""Where a module in transformers differs from what its configuration, its paper, its files or its own training says.

Checked with transformers 5.24.0. Each finding is a test: of transformers' behaviour, and of ours.
"""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import jax_moe  # noqa: E402
from jax_moe.attention.rope import rotations  # noqa: E402
from jax_moe.porting.families import family_named, mixture_of  # noqa: E402
from parity_tests.families.cases import CASES  # noqa: E402
from parity_tests.families.reference import as_file, configuration, make_layer, save_model  # noqa: E402
from parity_tests.table.family_cases import CASES as FAMILY_CASES  # noqa: E402


def test_phimoe_trains_on_the_gradient_of_its_evaluation() -> None:
    """In evaluation the sparse mixer's weights have plain gradients. In training its choices are drawn, and each
    weight is multiplied by 1 or 1/3 that the gradient leaves out: given the choices, it is evaluation's.
    """
    from transformers.models.phimoe.modeling_phimoe import PhimoeMultiplier

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    chosen = torch.randint(0, 6, (5, 1), generator=generator)
    shares = scores.softmax(-1)
    weight = shares.gather(-1, chosen)
    (plain,) = torch.autograd.grad(weight.sum(), scores, retain_graph=True)
    factor = torch.full_like(weight, 0.3333)
    drawn = PhimoeMultiplier.apply(scores, weight.detach(), chosen, shares.detach(), factor)
    assert torch.equal(drawn, weight * factor)
    (estimate,) = torch.autograd.grad(drawn.sum(), scores)
    torch.testing.assert_close(estimate, plain, rtol=1e-14, atol=1e-16)


def test_phimoe_chooses_two_whatever_its_configuration_says() -> None:
    """The router's num_experts_per_tok is not read; ours refuses all but 2 by name."""
    from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

    config = configuration(CASES["phimoe"], 0)
    config.num_experts_per_tok = 3
    router = PhimoeTopKRouter(config).eval()
    assert router(torch.ones(4, config.hidden_size))[2].shape == (4, 2)
    with pytest.raises(ValueError, match="num_experts_per_tok=3: must be 2"):
        mixture_of("phimoe").mixture_config(as_file(config), 0)


def test_phimoe_draws_its_jitter_twice() -> None:
    """Published (and here) the mixture multiplies its input by one drawn factor in training; in transformers its router
    multiplies the same memory by another, so that the experts, too, see both.
    """
    config = as_file(configuration(CASES["phimoe"], 0)) | {"input_jitter_noise": 0.5}
    layer = make_layer(CASES["phimoe"], 0, "float32").train()
    mixture, seen = layer.own, []
    mixture.input_jitter_noise = mixture.router.input_jitter_noise = 0.5
    mixture.experts.register_forward_hook(lambda module, given, answer: seen.append(given[0].detach().clone()))
    torch.manual_seed(0)
    layer(torch.ones(3, 50, 10))
    beyond = (seen[0] < 0.5) | (seen[0] > 1.5)
    assert 0.1 < beyond.float().mean() < 0.5 and seen[0].max() <= 2.25
    router = mixture_of("phimoe").mixture_config(config, 0).router
    assert (router.noise, router.jitter_eps, router.jitter_scope) == ("input_jitter", 0.5, "block")


def test_phimoe_turns_long_texts_with_the_short_factors() -> None:
    """Beyond original_max_position_embeddings transformers' forward exchanges mscale alone: it makes the frequencies
    anew without the text's length. Its own rule for such lengths, and Microsoft's published code, have long_factor.
    """
    from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

    case = next(one for one in FAMILY_CASES if one.name == "phimoe_long")
    config, length, width = case.config(), 11, 6
    module, positions = PhimoeRotaryEmbedding(config), torch.arange(length)[None]
    said = config.rope_parameters
    for of_length, factors in ((None, said["short_factor"]), (length, said["long_factor"])):
        if of_length is not None:
            module.rope_init_fn = functools.partial(module.rope_init_fn, seq_len=of_length)
        frequency = 100.0 ** -(torch.arange(0, width, 2) / width) / torch.tensor(factors)
        cos = torch.cat([positions[..., None] * frequency] * 2, dim=-1).cos() * said["long_mscale"]
        torch.testing.assert_close(module(cos, positions)[0], cos, rtol=1e-5, atol=1e-6)
    rope = family_named("phimoe").config(as_file(config)).rope
    assert rope is not None
    ours = np.asarray(rotations(jnp.arange(length)[None], rope, width, jnp.dtype("float32"))[0])
    torch.testing.assert_close(torch.from_numpy(ours.copy()), cos, rtol=1e-5, atol=1e-6)


def test_a_published_folder_of_longcat(tmp_path: Path) -> None:
    """Zero experts have no tensors: `load_moe` reads the folder with and without them, transformers only with them."""
    save_model(CASES["longcat_flash"], tmp_path)
    moe, file = jax_moe.load_moe(tmp_path, 0), tmp_path / "model.safetensors"
    assert (moe.config.num_experts, moe.config.identity_experts, moe.experts.gate.shape[0]) == (8, 2, 6)
    spare = {f"model.layers.0.mlp.experts.{e}.{name}_proj.weight" for e in (6, 7) for name in ("gate", "up")}
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if name not in spare}, file, {"format": "pt"})
    again = jax_moe.load_moe(tmp_path, 0)
    for name, value in jax_moe.to_torch(moe).items():
        np.testing.assert_array_equal(jax_moe.to_torch(again)[name], value)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.LongcatFlashForCausalLM.from_pretrained(tmp_path)


def test_nllb_calls_two_experts_whatever_the_router_chose() -> None:
    """transformers reads the router's one-hot choices, ones and zeros, as numbers of experts. fairseq sends each token
    to both its experts, and so do the published weights' training, the family's row and ours.
    """
    layer, called = make_layer(CASES["nllb_moe"], 0, "float32"), set[str]()
    experts = layer.own.experts
    for name, expert in experts.items():
        expert.register_forward_hook(lambda module, given, answer, name=name: called.add(name))
    del experts.forward  # what the row puts right
    x = torch.randn(3, 7, 10, generator=torch.Generator().manual_seed(2))
    weights = layer.own.router(x.reshape(-1, 10))[1]
    assert (weights > 0).any(dim=0).sum() > 2 and ((weights > 0).sum(dim=1) == 2).all()
    wrong = layer(x)
    assert called == {"expert_0", "expert_1"}
    first, second = weights.topk(2, dim=-1).values.T[..., None]
    said = experts["expert_1"](x.reshape(-1, 10)) * first + experts["expert_0"](x.reshape(-1, 10)) * second
    torch.testing.assert_close(wrong.reshape(-1, 10), 0.75 * said)


def test_nllb_masks_single_numbers_in_training() -> None:
    """Expert output masking drops an expert's whole answer to a token and leaves the others (fairseq; arXiv 2207.04672,
    section 6.2.1); transformers drops single numbers and scales the others up, though evaluation scales down already.
    """
    experts = make_layer(CASES["nllb_moe"], 0, "float32").own.experts
    torch.manual_seed(0)
    kept = experts.token_dropout.train()(torch.ones(50, 10))
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1 / (1 - experts.moe_token_dropout)]))
    assert ((kept == 0).any(dim=1) & (kept > 0).any(dim=1)).any()


def test_doge_mixes_the_tokens_in_its_router() -> None:
    """What routes a token are halves of other tokens' numbers: a later token changes an earlier one's answer, so that a
    text at once and the same text token by token differ. Ours follows, as checkpoints were trained so
    (`product_keys="flat"`); each token by itself agrees with both.
    """
    layer = make_layer(CASES["doge"], 0, "float32")
    moe = jax_moe.MoE(mixture_of("doge").mixture_config(as_file(configuration(CASES["doge"], 0)), 1))
    moe = jax_moe.from_torch(moe, layer.named(layer.state_dict().items()), layout="hf_doge_in_memory")
    x = torch.randn(1, 4, 10, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, -1] += 1
    with torch.no_grad():
        whole, changed, first = layer(x), layer(other), layer(x[:, :1])
    assert not torch.allclose(whole[:, 2], changed[:, 2]) and not torch.allclose(whole[:, 0], first[:, 0])
    for given, wanted in ((x, whole), (other, changed), (x[:, :1], first)):
        found = moe(jnp.asarray(given.numpy()))[0]
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-6)  # measured: 1e-7


def test_doge_with_normalised_weights_has_no_gradient() -> None:
    """transformers divides the softmax in place, which its gradient needs."""
    layer = make_layer(CASES["doge"], 0, "float32")
    layer.own.norm_topk_prob = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        layer(torch.randn(1, 4, 10)).sum().backward()
