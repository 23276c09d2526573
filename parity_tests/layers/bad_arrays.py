"""Wrong array arguments and the message for each. Run as a program, not under pytest, where jaxtyping and beartype
would refuse most of them before the functions are reached."""

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

B, T, D, E, K = 2, 5, 8, 4, 2
GENERATOR = np.random.default_rng(0)
CHOICES = np.stack([GENERATOR.permutation(E)[:K] for _ in range(B * T)]).reshape(B, T, K)


def numbers(*shape: int) -> np.ndarray:
    return GENERATOR.normal(size=shape).astype(np.float32)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, bool)


X = numbers(B, T, D)
TOKENS = GENERATOR.integers(0, 5, (B, 4))
DUPLICATES, OUTSIDE, BELOW = CHOICES.copy(), CHOICES.copy(), CHOICES.copy()
DUPLICATES[1, 3] = 2
OUTSIDE[0, 1, 1] = 9
BELOW[1, 4, 0] = -1
# The arrays that a call of each layer takes besides x_BTD, by the same names everywhere, and one of each.
SPARSE = ("noise_BTE", "jitter_BTD", "keep_BTKD", "expert_BTK")
OF_ATTENTION = ("attention_keep_BHTU", "output_keep_BTD")
TAKES: dict[str, tuple[str, ...]] = {
    "moe": ("mask_BT", *SPARSE), "soft": ("mask_BT",), "attention": ("mask_BT", *OF_ATTENTION),
    "block": ("mask_BT", *SPARSE, *OF_ATTENTION), "soft block": ("mask_BT", *OF_ATTENTION),
}
GIVEN = {
    "mask_BT": np.arange(T) >= np.asarray([[1], [0]]), "noise_BTE": numbers(B, T, E),
    "jitter_BTD": 1 + numbers(B, T, D) / 9, "keep_BTKD": GENERATOR.random((B, T, K, D)) > 0.3, "expert_BTK": CHOICES,
    "attention_keep_BHTU": GENERATOR.random((B, 2, T, T)) > 0.3, "output_keep_BTD": GENERATOR.random((B, T, D)) > 0.3,
}
OF_X = "the B and T of x_BTD"
BOOL = "must be bool; {0} == 1 converts ones and zeros"
# {case: (who is called, its arguments, what the error says)}; "{array}" is numpy's kind of array in the framework
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "mask of one row": ("moe", {"mask_BT": ones(1, T)}, f"mask_BT has shape (1, 5): must be (2, 5), {OF_X}"),
    "short mask": ("moe", {"mask_BT": ones(B, 4)}, f"mask_BT has shape (2, 4): must be (2, 5), {OF_X}"),
    "mask transposed": ("moe", {"mask_BT": ones(T, B)}, f"mask_BT has shape (5, 2): must be (2, 5), {OF_X}"),
    "mask of three dims": ("moe", {"mask_BT": ones(B, T, 1)}, f"mask_BT has shape (2, 5, 1): must be (2, 5), {OF_X}"),
    "float mask": (
        "moe", {"mask_BT": np.zeros((B, T), np.float32)},
        f"mask_BT has dtype float32: {BOOL.format('mask_BT')}, mask_BT == 0 an additive mask",
    ),
    "mask of ones": (
        "moe", {"mask_BT": np.ones((B, T), np.int32)}, f"mask_BT has dtype int32: {BOOL.format('mask_BT')}"
    ),
    "choices of other positions": (
        "moe", {"expert_BTK": CHOICES[:, :4]}, f"expert_BTK has shape (2, 4, 2): must be (2, 5, 2), {OF_X} and top_k"
    ),
    "float choices": (
        "moe", {"expert_BTK": CHOICES.astype(np.float32)},
        "expert_BTK has dtype float32: must be integer; cast it to integers",
    ),
    "an expert that is not there": (
        "moe", {"expert_BTK": OUTSIDE}, "expert_BTK names expert 9: must be 0 to 3 (num_experts=4)"
    ),
    "a negative expert": ("moe", {"expert_BTK": BELOW}, "expert_BTK names expert -1: must be 0 to 3 (num_experts=4)"),
    "an expert twice": (
        "moe", {"expert_BTK": DUPLICATES},
        "expert_BTK names expert 2 twice for one token: must be 2 different experts per token",
    ),
    "an expert that is not there, capacity": (
        "capacity", {"expert_BTK": OUTSIDE}, "expert_BTK names expert 9: must be 0 to 3 (num_experts=4)"
    ),
    "noise of another width": (
        "moe", {"noise_BTE": numbers(B, T, 3)},
        f"noise_BTE has shape (2, 5, 3): must be (2, 5, 4), {OF_X} and num_experts",
    ),
    "noise of one sequence": (
        "moe", {"noise_BTE": numbers(1, T, E)},
        f"noise_BTE has shape (1, 5, 4): must be (2, 5, 4), {OF_X} and num_experts",
    ),
    "jitter of one sequence": (
        "moe", {"jitter_BTD": numbers(1, T, D)},
        "jitter_BTD has shape (1, 5, 8): must be (2, 5, 8), the B, T and D of x_BTD",
    ),
    "keep of numbers": (
        "moe", {"keep_BTKD": np.ones((B, T, K, D), np.int32)}, f"keep_BTKD has dtype int32: {BOOL.format('keep_BTKD')}"
    ),
    "keep without choices": (
        "moe", {"keep_BTKD": ones(B, T, D)},
        "keep_BTKD has shape (2, 5, 8): must be (2, 5, 2, 8), the B, T and D of x_BTD and top_k",
    ),
    "integer input": (
        "moe", {"x": TOKENS}, "x_BTD has dtype int64: must be floating; cast it to the dtype to compute in"
    ),
    "vectors without a batch": (
        "moe", {"x": numbers(T, D)}, "x_BTD has shape (5, 8): must have 3 dims [B, T, D]; x_BTD[None] is a batch of one"
    ),
    "images": ("moe", {"x": numbers(B, T, T, D)}, "x_BTD has shape (2, 5, 5, 8): must have 3 dims [B, T, D]"),
    "another width": ("moe", {"x": numbers(B, T, 7)}, "x_BTD has width 7: must be model_dim=8"),
    "a list": ("moe", {"x": X.tolist()}, "x_BTD is a list: must be {array} of floatings [B, T, D]; "),
    "soft: float mask": ("soft", {"mask_BT": np.ones((B, T), np.float32)}, "mask_BT has dtype float32: must be bool; "),
    "soft: integers": ("soft", {"x": TOKENS[..., None]}, "x_BTD has dtype int64: must be floating; "),
    "attention: keep": (
        "attention", {"attention_keep_BHTU": ones(B, 1, T, T)},
        "attention_keep_BHTU has shape (2, 1, 5, 5): must be (2, 2, 5, 5), the B, T and T of x_BTD and num_heads",
    ),
    "attention: output": (
        "attention", {"output_keep_BTD": ones(1, T, D)},
        "output_keep_BTD has shape (1, 5, 8): must be (2, 5, 8), the B, T and D of x_BTD",
    ),
    "attention: vectors": ("attention", {"x": numbers(T, D)}, "x_BTD has shape (5, 8): must have 3 dims"),
    "attention: width": ("attention", {"x": numbers(B, T, 6)}, "x_BTD has width 6: must be model_dim=8"),
    "block: an expert that is not there": (
        "block", {"expert_BTK": OUTSIDE}, "expert_BTK names expert 9: must be 0 to 3 (num_experts=4)"
    ),
    **{
        f"{who}: {name} of another shape": (who, {name: GIVEN[name][:1]}, f"{name} has shape (1, ")
        for who, names in TAKES.items() for name in names
    },
    **{
        f"{who}: {name} of another kind": (who, {name: GIVEN[name].astype(complex)}, f"{name} has dtype complex")
        for who, names in TAKES.items() for name in names
    },
    **{
        f"soft block: {name}": ("soft block", {name: GIVEN[name]}, f"{name}: must be left out; Soft MoE draws nothing")
        for name in SPARSE
    },
    "model: mask": (
        "model", {"mask_BT": ones(1, 4)}, "mask_BT has shape (1, 4): must be (2, 4), the B and T of tokens_BT"
    ),
    "model: draws": (
        "model", {"randomness": {"noise_BTE": numbers(B, 4, E)}},
        "noise_BTE has shape (2, 4, 4): must be (3, 2, 4, 4), num_layers, the B and T of tokens_BT and num_experts",
    ),
    "model: an expert that is not there": (
        "model", {"expert_LBTK": np.stack([OUTSIDE[:, :4]] * 3)},
        "expert_LBTK names expert 9: must be 0 to 3 (num_experts=4)",
    ),
    "model: choices of one layer": (
        "model", {"expert_LBTK": CHOICES[None, :, :4]},
        "expert_LBTK has shape (1, 2, 4, 2): must be (3, 2, 4, 2), num_layers, the B and T of tokens_BT and top_k",
    ),
    "model: no batch": (
        "model", {"x": TOKENS[0]}, "tokens_BT has shape (4,): must have 2 dims [B, T]; tokens_BT[None] is"
    ),
    "model: a list": ("model", {"x": [1, 2, 3]}, "tokens_BT is a list: must be {array} of integers [B, T]; "),
    "model: float tokens": (
        "model", {"x": TOKENS.astype(np.float32)}, "tokens_BT has dtype float32: must be integer; "
    ),
    "generate: a list": ("generate", {"x": [1, 2, 3]}, "tokens_BT is a list: must be {array} of integers [B, T]; "),
    "generate: no batch": ("generate", {"x": TOKENS[0]}, "tokens_BT has shape (4,): must have 2 dims [B, T]; "),
    "generate: no position": ("generate", {"x": TOKENS[:, :0]}, "tokens_BT has 0 positions: must be 1 to block_size=4"),
    "generate: a large token": ("generate", {"x": TOKENS + 2**32}, "token 4294967"),
    "generate: half a token": ("generate", {"max_new_tokens": 2.5}, "max_new_tokens=2.5: must be at least 1"),
    "generate: infinite": ("generate", {"temperature": float("inf")}, "temperature=inf: must be finite"),
    "losses: mask": (
        "router_z_loss", {"logits_GSE": numbers(2, 3, E), "mask_GS": ones(1, 3)},
        "mask_GS has shape (1, 3): must be (2, 3), the G and S of logits_GSE",
    ),
    "losses: float mask": (
        "router_entropy", {"logits_GSE": numbers(2, 3, E), "mask_GS": numbers(2, 3)},
        "mask_GS has dtype float32: must be bool",
    ),
    "losses: mean": (
        "masked_mean", {"x_GS": numbers(2, 3), "mask_GS": ones(3, 2)},
        "mask_GS has shape (3, 2): must be (2, 3), the G and S of x_GS",
    ),
    "losses: an expert that is not there": (
        "expert_load", {"expert_GSK": OUTSIDE, "num_experts": E, "dtype": "float32"},
        "expert_GSK names expert 9: must be 0 to 3",
    ),
    "losses: weights": (
        "importance", {"expert_GSK": CHOICES, "weight_GSK": numbers(B, T, 1), "num_experts": E},
        "weight_GSK has shape (2, 5, 1): must be (2, 5, 2), the G, S and K of expert_GSK",
    ),
    "losses: smooth load": (
        "smooth_load",
        {"clean_GSE": numbers(2, 3, E), "noisy_GSE": numbers(1, 3, E), "scale_GSE": numbers(2, 3, E), "top_k": 2},
        "noisy_GSE has shape (1, 3, 4): must be (2, 3, 4), the G, S and E of clean_GSE",
    ),
    "losses: top_k": (
        "smooth_load",
        {"clean_GSE": numbers(2, 3, E), "noisy_GSE": numbers(2, 3, E), "scale_GSE": numbers(2, 3, E), "top_k": 5},
        "top_k=5: must be 1 to 4",
    ),
    "losses: two loads": (
        "load_balance_loss", {"load_E": numbers(E), "prob_E": numbers(1, E), "top_k": 2, "config": None},
        "prob_E.shape=(1, 4): must be (4,), the shape of load_E",
    ),
    "losses: targets": (
        "next_token_loss", {"logits_BTV": numbers(2, 3, E), "target_BT": TOKENS},
        "target_BT has shape (2, 4): must be (2, 3), the B and T of logits_BTV",
    ),
    "losses: a target beyond the vocabulary": (
        "next_token_loss", {"logits_BTV": numbers(2, 4, 5), "target_BT": TOKENS - 100}, "token -"
    ),
    "losses: counts": (
        "tokens_per_expert", {"expert_GSK": OUTSIDE, "num_experts": E}, "expert_GSK names expert 9: must be 0 to 3"
    ),
    "bias: loads as shares": (
        "bias", {"bias_E": numbers(E), "tokens_E": numbers(E), "rate": 0.1},
        "tokens_E has dtype float32: must be integer",
    ),
    "bias: half precision": (
        "bias", {"bias_E": numbers(E).astype(np.float16), "tokens_E": np.arange(E), "rate": 0.1},
        "bias_E.dtype='float16': must be float32 or wider",
    ),
    "bias: loads of one layer": (
        "bias", {"bias_E": numbers(2, E), "tokens_E": np.arange(E), "rate": 0.1},
        "tokens_E.shape=(4,): must be (2, 4), the shape of bias_E",
    ),
    "losses: a list": ("squared_cv", {"x_E": [1.0, 2.0]}, "x_E is a list: must be {array} of floatings [E]"),
}
# In jax_moe alone
JAX_CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a limit above the capacity": (
        "capacity", {"capacity_limit": np.asarray(99)}, "capacity_limit=99: must be 0 to 5, the slots of an expert"
    ),
    "several limits": ("capacity", {"capacity_limit": np.ones(2, int)}, "capacity_limit has shape (2,): must be ()"),
    "decoder: mask": (
        "decoder", {"mask_BT": ones(1, 4)}, "mask_BT has shape (1, 4): must be (2, 4), the B and T of tokens_BT"
    ),
    "decoder: positions": (
        "decoder", {"position_BT": np.arange(4)[None]},
        "position_BT has shape (1, 4): must be (2, 4), the B and T of tokens_BT",
    ),
    "decoder: choices of one layer": (
        "decoder", {"expert_LBTK": np.stack([CHOICES[:, :4]])},
        "expert_LBTK has shape (1, 2, 4, 2): must be (2, 2, 4, 2), "
        "the number of mixtures, the B and T of tokens_BT and top_k",
    ),
    "decoder: an expert that is not there": (
        "decoder", {"expert_LBTK": np.stack([OUTSIDE[:, :4]] * 2)},
        "expert_LBTK names expert 9: must be 0 to 3 (num_experts=4)",
    ),
    "decoder: a list": (
        "decoder", {"x": [[1, 2]]}, "tokens_BT is a list: must be an array of integers [B, T]; np.asarray"
    ),
    "decoder: a mask of ones": (
        "decoder", {"mask_BT": np.ones((B, 4), np.int32)}, "mask_BT has dtype int32: must be bool"
    ),
    "decoder: generate with a float mask": (
        "continue", {"mask_BT": np.ones((B, 4), np.float32)}, "mask_BT has dtype float32: must be bool; "
    ),
    "decoder: generate with another mask": (
        "continue", {"mask_BT": ones(1, 4)}, "mask_BT has shape (1, 4): must be (2, 4)"
    ),
    "decoder: generate, a list": (
        "continue", {"x": [1, 2]}, "tokens_BT is a list: must be an array of integers [B, T]"
    ),
    "decoder: generate, a large token": ("continue", {"x": TOKENS + 2**32}, "token 4294967"),
    "decoder: an end beyond the vocabulary": (
        "continue", {"stop_tokens": (2, 11)},
        "stop_tokens=(2, 11): must be tokens of 0 to 10 (vocab_size=11); leave out what the model cannot give",
    ),
    "decoder: one end": ("continue", {"stop_tokens": 2}, "stop_tokens=2: must be a tuple of tokens"),
    "decoder: padding beyond the vocabulary": (
        "continue", {"pad_token": -1}, "pad_token=-1: must be None or a token of 0 to 10"
    ),
    "traced: mask": ("traced", {"mask_BT": ones(1, T)}, f"mask_BT has shape (1, 5): must be (2, 5), {OF_X}"),
    "a torch tensor": (
        "torch", {}, "x_BTD is a torch.Tensor: must be an array of floatings [B, T, D]; of jax or numpy"
    ),
}


def callers_of_jax() -> dict[str, Callable[..., Any]]:
    """Who may be called, in jax_moe: each takes `x` in the place of its first argument."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import jax_moe
    from jax_moe import losses
    from parity_tests.porting.decoder_cases import decoder

    configs = contracts()
    arrays = lambda values: {k: jnp.asarray(v) if k == "noise_BTE" else v for k, v in values.items()}  # noqa: E731

    def randomness(values: dict[str, Any]) -> dict[str, Any]:
        draws = values.pop("randomness", None)
        return arrays(values) | ({} if draws is None else {"randomness": jax_moe.Randomness(**draws)})

    def module(kind: Any, name: str, first: Any) -> Callable[..., Any]:
        made = kind(configs[name], rngs=nnx.Rngs(0))
        return lambda x=first, **values: made(x, **randomness(values))

    model, moe, qwen = jax_moe.MakeMoE(configs["model"]), jax_moe.MoE(configs["moe"]), decoder("qwen2_moe")
    settings = {"max_new_tokens": 2, "key": jax.random.key(0)}
    return {
        "moe": module(jax_moe.MoE, "moe", X), "capacity": module(jax_moe.MoE, "capacity", X),
        "soft": module(jax_moe.SoftMoE, "soft", X), "attention": module(jax_moe.Attention, "attention", X),
        "block": module(jax_moe.Block, "block", X), "soft block": module(jax_moe.Block, "soft block", X),
        "model": module(jax_moe.MakeMoE, "model", TOKENS),
        "generate": lambda x=TOKENS, **values: jax_moe.generate(model, x, **settings | values),
        "decoder": lambda x=TOKENS, **values: qwen.run(x, **values),
        "continue": lambda x=TOKENS, **values: jax_moe.generate(qwen, x, **settings | values),
        "traced": lambda **values: jax.jit(lambda x, **given: moe(x, **given)[0])(X, **values),
        "bias": jax_moe.update_correction_bias,
        "torch": lambda: moe(__import__("torch").ones(B, T, D)),
    } | {name: getattr(losses, name) for name in losses_called()}


def callers_of_torch() -> dict[str, Callable[..., Any]]:
    """The same in torch_ref; numpy arrays are made tensors."""
    import torch

    import torch_ref
    from torch_ref import losses

    configs = contracts()

    def tensor(value: Any) -> Any:
        if isinstance(value, dict):
            return torch_ref.Randomness(**{name: tensor(one) for name, one in value.items()})
        if isinstance(value, str):
            return getattr(torch, value)
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    def with_tensors(function: Callable[..., Any], first: Any = None) -> Callable[..., Any]:
        def call(**values: Any) -> Any:
            given = () if first is None else (tensor(values.pop("x", first)),)
            return function(*given, **{name: tensor(value) for name, value in values.items()})

        return call

    kinds = {"moe": torch_ref.MoE, "capacity": torch_ref.MoE, "soft": torch_ref.SoftMoE,
             "attention": torch_ref.Attention, "block": torch_ref.Block, "soft block": torch_ref.Block,
             "model": torch_ref.MakeMoE}
    model = torch_ref.MakeMoE(configs["model"])
    calls = {name: with_tensors(kind(configs[name]), TOKENS if name == "model" else X) for name, kind in kinds.items()}
    calls["generate"] = with_tensors(
        lambda x, **values: torch_ref.generate(model, x, **{"max_new_tokens": 2} | values), TOKENS
    )
    calls["bias"] = with_tensors(torch_ref.update_correction_bias)
    return calls | {name: with_tensors(getattr(losses, name)) for name in losses_called()}


def losses_called() -> set[str]:
    return {who for name, (who, _, _) in CASES.items() if name.startswith("losses")}


def contracts() -> dict[str, Any]:
    """Small ones, shared by both frameworks."""
    from jax_moe import presets
    from jax_moe.config.attention import AttentionConfig
    from jax_moe.config.models import BlockConfig, MakeMoEConfig
    from jax_moe.config.moe import SoftMoEConfig

    moe = presets.makemoe(D, num_experts=E, top_k=K, capacity_factor=None)
    attention = AttentionConfig(model_dim=D, num_heads=2, dropout=0.1)
    both_ways = dataclasses.replace(attention, causal=False)
    soft = SoftMoEConfig(model_dim=D, num_experts=2, num_slots=2)
    return {
        "moe": moe, "capacity": presets.makemoe(D, num_experts=E, top_k=K), "attention": attention,
        "soft": soft, "block": BlockConfig(attention=attention, moe=moe),
        "soft block": BlockConfig(attention=both_ways, moe=soft),
        "model": MakeMoEConfig(
            vocab_size=5, block_size=4, model_dim=D, num_heads=2, num_layers=3, num_experts=E, top_k=K,
            capacity_factor=None,
        ),
    }


def told(call: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """The error's words, its type before them unless it is ValueError; "nothing" where there is none."""
    try:
        call(**dict(arguments))
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(framework: str) -> None:
    """Prints {case: what was told} as JSON."""
    callers = callers_of_jax() if framework == "jax" else callers_of_torch()
    cases = CASES | (JAX_CASES if framework == "jax" else {})
    print(json.dumps({name: told(callers[who], arguments) for name, (who, arguments, _) in cases.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
