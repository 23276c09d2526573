"""Cached generation against the uncached decoder: logits, padding, stops, callbacks, cost of a step. No torch."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import Decoder, DecoderConfig, generate, presets
from jax_moe.attention.positions import Positions
from jax_moe.config.attention import RopeConfig
from jax_moe.generation import loop
from jax_moe.generation.cache import Cache, decode, empty_cache, prefill
from jax_moe.generation.loop import bucket
from jax_moe.porting.families import FAMILIES
from parity_tests.layers.test_decoder import SIZES, decoder
from parity_tests.shared.compare import MismatchError, check_close
from parity_tests.shared.filled import filled

pytestmark = pytest.mark.usefixtures("quick", "small_programs")
START, PROMPT, LENGTH = (2, 0, 1), 5, 12
TEXT = np.random.default_rng(1).integers(0, 19, (3, LENGTH)).astype(np.int32)
MASK = np.arange(LENGTH) >= np.asarray(START)[:, None]
MODELS: dict[str, dict[str, Any]] = {
    "windows": {"sliding_window": 3, "sliding_layers": (0, 2)},
    "experts in one stack": {"moe": dataclasses.replace(presets.mixtral(12, 6, 4, 2), dispatcher="grouped")},
    "dense": {"dense_layers": (0, 2), "dense_dim": 5, "moe": presets.olmoe(12, 6, 8, 2)},
    "switched": {
        "num_layers": 2, "qkv_bias": True, "output_bias": True, "qk_norm": "full_width", "clip_qkv": 0.8,
        "sinks": True, "norm": "rms_wide",
        "tied_embeddings": True, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_divisor": 1.5,
        "rope": RopeConfig(kind="yarn", factor=4.0, original_max_positions=8), "moe": presets.granite_moe(12, 6, 4, 3),
    },
}
FP32, FP64 = 3e-6, 5e-15  # measured 3.4e-7 and 9.2e-16


@pytest.fixture(scope="module")
def model() -> Decoder:
    return decoder(sliding_window=4, sliding_layers=(0, 2))


def cached_logits(model: Decoder, off: int = 0, blind: bool = False) -> np.ndarray:
    """Logits after the prompt and every further token of TEXT; `off` and `blind` plant faults in the steps."""
    start_B = jnp.asarray(START, jnp.int32)

    @jax.jit
    def begin(model: Decoder, tokens: jax.Array) -> tuple[jax.Array, Cache]:
        return prefill(model, tokens, start_B, LENGTH + 3)

    @jax.jit
    def proceed(model: Decoder, token: jax.Array, slot: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return decode(model, token, slot, start_B, cache)

    real = Positions.scope
    logits, cache = begin(model, jnp.asarray(TEXT[:, :PROMPT]))
    found = [logits]
    with pytest.MonkeyPatch.context() as patch:
        if blind:
            patch.setattr(Positions, "scope", lambda self, *_: real(self, None))
        for slot in range(PROMPT, LENGTH):
            logits, cache = proceed(model, jnp.asarray(TEXT[:, slot]), jnp.asarray(slot + off, jnp.int32), cache)
            found.append(logits)
    return np.stack(found, axis=1)


def whole_logits(model: Decoder) -> np.ndarray:
    """The same logits from a single call without a cache."""
    positions = jnp.asarray(np.maximum(np.cumsum(MASK, axis=1) - 1, 0), jnp.int32)
    arrays = {"mask_BT": jnp.asarray(MASK), "position_BT": positions}
    return np.asarray(jax.jit(lambda model: model(jnp.asarray(TEXT), **arrays))(model))[:, PROMPT - 1 :]


def compare(found: np.ndarray, expected: np.ndarray, tolerance: float) -> float:
    return check_close({"logits": found}, {"logits": expected}, tolerance, "cached logits")


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_those_of_one_call(name: str) -> None:
    model = decoder(**MODELS[name])
    compare(cached_logits(model), whole_logits(model), FP32)


# Settings of config.json that `DecoderConfig.grouped` cannot say
SETTINGS: dict[str, dict[str, Any]] = {
    "llama4": {
        "model_type": "llama4_text", "intermediate_size": 6, "num_local_experts": 4, "attention_chunk_size": 4,
        "no_rope_layers": [1, 0, 1], "moe_layers": [1, 2], "floor_scale": 3, "attn_scale": 0.3,
        "num_experts_per_tok": 2,
    },
    "gemma4": {
        "model_type": "gemma4_text", "enable_moe_block": True, "hidden_size_per_layer_input": 0, "intermediate_size": 5,
        "moe_intermediate_size": 6, "num_experts": 4, "top_k_experts": 2, "sliding_window": 3, "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "attention_k_eq_v": True,
        "num_global_key_value_heads": 1, "final_logit_softcapping": 5.0,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_cached_logits_of_families(name: str) -> None:
    """Chunks that begin in the prompt and go on, and queries that grow: by position in the text, not by slot; layers
    whose caches have heads of another width.
    """
    with jax.enable_x64(True):
        sizes = {
            "vocab_size": 19, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 4,
        }
        config = FAMILIES[name].config(sizes | SETTINGS[name])
        model = filled(lambda: Decoder(config, rngs=nnx.Rngs(0), param_dtype="float64"))
        expected = whole_logits(model)
        compare(cached_logits(model), expected, 5e-14)  # measured 7.9e-15
        with pytest.raises(MismatchError):
            compare(cached_logits(model, blind=True), expected, 1e-3)


def test_cached_logits_in_fp64_and_planted_faults() -> None:
    with jax.enable_x64(True):
        config = DecoderConfig.grouped(**SIZES | MODELS["windows"])
        model = filled(lambda: Decoder(config, rngs=nnx.Rngs(0), param_dtype="float64"))
        expected = whole_logits(model)
        compare(cached_logits(model), expected, FP64)
        for fault in ({"off": 1}, {"blind": True}):
            with pytest.raises(MismatchError):
                compare(cached_logits(model, **fault), expected, 1e-3)


def test_greedy_tokens_are_the_best_of_the_text_before_them(model: Decoder) -> None:
    prompt, mask = TEXT[:, :PROMPT], MASK[:, :PROMPT]
    tokens = np.asarray(generate(model, prompt, max_new_tokens=7, temperature=0, mask_BT=mask))
    np.testing.assert_array_equal(tokens[:, :PROMPT], prompt)
    for row, start in enumerate(START):
        logits = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens[None, row, start:])))
        np.testing.assert_array_equal(tokens[row, PROMPT:], logits[0, PROMPT - start - 1 : -1].argmax(-1))
    assert len(set(tokens[:, PROMPT:].ravel())) > 3


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 16, 17, 64, 65, 127, 128, 129, 1000, 1025)] == [
        16, 16, 32, 64, 80, 128, 128, 160, 1024, 1280
    ]
    assert all(n <= bucket(n) <= max(n * 1.25, n + 15) for n in range(1, 5000))


def test_neither_length_compiles_again_nor_does_the_bucket_show(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[str] = []
    for name in ("prefill", "decode"):
        function = getattr(loop, name)
        monkeypatch.setattr(loop, name, lambda *args, f=function, n=name: (traced.append(n), f(*args))[1])
    jax.clear_caches()

    def run(length: int, new: int) -> np.ndarray:
        return np.asarray(generate(model, TEXT[:, :length], max_new_tokens=new, temperature=0))

    first = run(5, 9)
    assert traced == ["prefill", "decode"]
    np.testing.assert_array_equal(run(5, 4), first[:, :9])
    run(9, 6)
    assert traced == ["prefill", "decode"], "a longer prompt or fewer tokens compiled again"
    monkeypatch.setattr(loop, "bucket", lambda length: length)
    np.testing.assert_array_equal(run(5, 9), first)
    assert len(traced) == 4


def test_stop_tokens_end_a_text_and_the_work(model: Decoder) -> None:
    request = partial(generate, model, TEXT[:, :PROMPT], max_new_tokens=10, key=jax.random.key(0))
    free = np.asarray(request())[:, PROMPT:]
    stops = [int(free[row, step]) for row, step in enumerate((1, 4, 3))]
    expected, ends = free.copy(), []
    for row in expected:
        ends.append(int(np.argmax(np.isin(row, stops))))
        row[ends[-1] + 1 :] = 18
    assert 0 < max(ends) <= 4 and len(set(ends)) > 1, "the texts end at different steps, all before the last"
    steps: list[int] = []
    found = np.asarray(request(stop_tokens=stops, pad_token=18, callback=lambda step, tokens: steps.append(step)))
    np.testing.assert_array_equal(found[:, PROMPT:], expected)
    assert steps == list(range(max(ends) + 1))
    np.testing.assert_array_equal(request(stop_tokens=stops, pad_token=18), found)
    first_stop = np.asarray(request(stop_tokens=stops))[:, -1]
    assert (first_stop == stops[0]).all(), "without a pad token the first stop token fills up"


def test_a_callback_sees_every_step_and_may_end_it(model: Decoder) -> None:
    request = partial(generate, model, TEXT[:, :PROMPT], max_new_tokens=6, key=jax.random.key(0), top_k=5)
    seen: list[tuple[int, np.ndarray]] = []
    whole = np.asarray(request(callback=lambda step, tokens: seen.append((step, tokens))))
    assert [step for step, _ in seen] == list(range(6))
    np.testing.assert_array_equal(np.stack([tokens for _, tokens in seen], axis=1), whole[:, PROMPT:])
    np.testing.assert_array_equal(request(), whole)

    class EnoughError(Exception):
        pass

    def enough(step: int, tokens: np.ndarray) -> None:
        if step == 2:
            raise EnoughError("of that")

    with pytest.raises(EnoughError, match=r"^of that$"):
        request(callback=enough)


def test_sampling(model: Decoder) -> None:
    request = partial(generate, model, TEXT[:, :PROMPT], max_new_tokens=8)
    greedy = np.asarray(request(temperature=0))
    np.testing.assert_array_equal(request(key=jax.random.key(0), top_k=1), greedy)
    first, second = (np.asarray(request(key=jax.random.key(seed), top_k=5)) for seed in (0, 1))
    assert (first != second).any() and (first != greedy).any()


BAD = [
    ({"tokens": [[19]]}, r"token 19: must be 0 to 18 \(vocab_size=19\)"),
    ({"tokens": [[]]}, "tokens_BT has 0 positions: must be at least 1"),
    (
        {"mask_BT": [[True, False]]},
        "mask_BT='False after a token': must be False on the left alone: .* padding after its text",
    ),
    ({"mask_BT": [[False, False]]}, "mask_BT='all False': must be True somewhere: sequence 0 has no token"),
    ({"stop_tokens": (3, 19)}, r"stop_tokens=\(3, 19\): must be tokens of 0 to 18 \(vocab_size=19\); leave out .*"),
    ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
    ({"temperature": 1.0}, r"temperature=1.0: must be 0 without a key: sampling needs key="),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[case[1] for case in BAD])
def test_errors(model: Decoder, settings: dict[str, Any], message: str) -> None:
    settings = {"tokens": [[1, 2]], "max_new_tokens": 3, "temperature": 0, **settings}
    if "mask_BT" in settings:
        settings["mask_BT"] = np.asarray(settings["mask_BT"], bool)
    tokens = np.asarray(settings.pop("tokens"), np.int32)
    with pytest.raises(ValueError, match=f"^{message}$"):
        generate(model, tokens, **settings)


def test_a_capacity_is_refused() -> None:
    model = decoder(moe=presets.mixtral(12, 6, 4, 2).with_capacity(1.0))
    with pytest.raises(ValueError, match=r"^capacity=.*: must be None to generate with a cache"):
        generate(model, TEXT, max_new_tokens=3, temperature=0)


def compiled_step(num_experts: int, dispatcher: Any = "auto") -> Any:
    """The compiled step of a batch of two."""
    moe = presets.mixtral(32, 64, num_experts, 2)
    config = DecoderConfig.grouped(**SIZES | {"model_dim": 32, "moe": dataclasses.replace(moe, dispatcher=dispatcher)})
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return jax.jit(decode, donate_argnums=4).lower(model, *step_arguments(model)).compile()


def step_arguments(model: Decoder) -> list[Any]:
    """The abstract arguments of a step of a batch of two."""
    integers = [jax.ShapeDtypeStruct(dims, jnp.int32) for dims in ((2,), (), (2,))]
    return [*integers, jax.eval_shape(lambda start_B: empty_cache(model.config, start_B, 16, jnp.float32), integers[2])]


def test_a_step_does_not_touch_experts_that_were_not_chosen() -> None:
    """Memory traffic and scratch space of a step hardly grow with E; those of other dispatchers do."""
    def cost(program: Any) -> np.ndarray:
        return np.asarray([program.cost_analysis()["bytes accessed"], program.memory_analysis().temp_size_in_bytes])

    few, many = (cost(compiled_step(num)) for num in (8, 64))
    all_experts = cost(compiled_step(64, "einsum"))
    expert = 3 * 32 * 64 * 4
    # the router's rows grow: 56 a layer, and the counts over E
    assert (many - few < 2 * expert).all(), f"{(many - few) / expert} experts' bytes more for 56 more experts"
    assert (all_experts - few > 50 * expert).all(), "the measure would not see a dispatcher that touches all"


def test_the_step_does_not_grow_with_depth() -> None:
    def equations(layers: int) -> int:
        dense = {"dense_layers": tuple(range(0, layers, 2)), "dense_dim": 5}
        config = DecoderConfig.grouped(**SIZES | {"num_layers": layers, **dense})
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        return str(jax.make_jaxpr(decode)(model, *step_arguments(model))).count(" = ")

    assert equations(6) == equations(24)
