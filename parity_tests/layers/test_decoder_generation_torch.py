"""Greedy text against `transformers.generate`: left padding and stop tokens, in every Hugging Face family.

The families include a window, chunks, dynamic rope, dense layers, a part of each head that turns and layers whose
heads differ.
`test_decoder_generation.py` tests the cache.
"""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

import jax_moe  # noqa: E402
from parity_tests.shared.compare import MismatchError, check_exact  # noqa: E402
from parity_tests.table.family_cases import CASES, TEXTS, VOCABULARY, Case, draw_weights, save_reference  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick", "small_programs")
PROMPT, NEW, PAD = 7, 14, 36
MASK = np.arange(PROMPT) >= np.asarray([0, 3, 1])[:, None]
NAMES = (
    "mixtral", "mixtral_window", "qwen2_moe_tied", "qwen3_moe_dense", "olmoe", "granitemoe", "glm4_moe", "exaone_moe",
    "ernie4_5_moe", "hunyuan_v1_moe", "flex_olmo", "dots1", "solar_open", "minimax_m2", "granitemoeshared",
    "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4", "gpt_oss", "llama4", "llama4_dense",
    "gemma4", "gemma4_whole", "phimoe_long", "qwen3_next", "qwen3_5_moe",
)
# transformers counts the padding among the positions that its queries grow with: each text by itself, without any
BY_ITSELF = ("llama4",)
CHOSEN = [case for case in CASES if case.name in NAMES]


def theirs(
    reference: "torch.nn.Module", tokens: np.ndarray, stops: list[int] | None, mask: np.ndarray = MASK
) -> np.ndarray:
    """transformers' tokens, padded to NEW like ours (it returns as soon as all sequences have stopped)."""
    mask = torch.from_numpy(mask.astype(np.int64))
    found = reference.generate(
        torch.from_numpy(tokens), attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=stops,
        pad_token_id=PAD, max_length=None,
    )
    return np.pad(found.numpy(), [(0, 0), (0, tokens.shape[1] + NEW - found.shape[1])], constant_values=PAD)


def each_by_itself(reference: "torch.nn.Module", tokens: np.ndarray, stops: list[int] | None) -> np.ndarray:
    """The same, of one text after the other without its padding, which is put before the answer."""
    found = []
    for row, real in zip(tokens, MASK, strict=True):
        alone = theirs(reference, row[None, real], stops, real[None, real])[0]
        found.append(np.concatenate([row[~real], alone]))
    return np.stack(found)


def ours(model: jax_moe.Decoder, tokens: np.ndarray, stops: list[int] | None, mask: np.ndarray = MASK) -> np.ndarray:
    """Our tokens."""
    stop_tokens = tuple(stops or ())
    found = jax_moe.generate(
        model, tokens, max_new_tokens=NEW, temperature=0, mask_BT=mask, stop_tokens=stop_tokens, pad_token=PAD
    )
    return np.asarray(found).astype(tokens.dtype)


def pair(case: Case, folder: Path) -> tuple["torch.nn.Module", jax_moe.Decoder]:
    """The reference, and the decoder from its folder. transformers' generate fails if it computes a balance loss."""
    reference = case.reference(case.config()).eval()
    draw_weights(reference, seed=1)
    reference.config.output_router_logits = False
    return reference, jax_moe.load_pretrained(save_reference(reference, folder / "model"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers' advice about lengths
@pytest.mark.parametrize("case", CHOSEN, ids=[case.name for case in CHOSEN])
def test_greedy_tokens(case: Case, tmp_path: Path) -> None:
    """Without stop tokens and with two; a forgotten mask (the planted fault) changes the tokens."""
    reference, model = pair(case, tmp_path)
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, (TEXTS, PROMPT))
    answer = each_by_itself if case.name in BY_ITSELF else theirs
    free = answer(reference, tokens, None)
    check_exact({"tokens": ours(model, tokens, None)}, {"tokens": free}, case.name)
    stops = [int(free[0, PROMPT + 5]), int(free[1, PROMPT + 2])]
    check_exact(
        {"tokens": ours(model, tokens, stops)}, {"tokens": answer(reference, tokens, stops)}, f"{case.name}, stopping"
    )
    if case.name == "mixtral":
        with pytest.raises(MismatchError, match="tokens"):
            check_exact({"tokens": ours(model, tokens, None, np.ones_like(MASK))}, {"tokens": free}, "no mask")


def test_padding_counts_in_llama4() -> None:
    """The finding behind `BY_ITSELF`, reduced: with right positions and mask, transformers' answer to a text changes by
    2% when padding stands before it, for its queries grow with the number of the slot. Ours does not
    (test_decoder_generation.py). If this fails, the batch can be compared again.
    """
    case = next(case for case in CASES if case.name == "llama4")
    reference = case.reference(case.config()).eval()
    draw_weights(reference, seed=1)
    tokens = torch.from_numpy(np.random.default_rng(3).integers(0, VOCABULARY, (1, PROMPT)))
    padded, mask = torch.nn.functional.pad(tokens, (3, 0)), torch.ones(1, PROMPT + 3, dtype=torch.int64)
    mask[:, :3] = 0
    with torch.no_grad():
        alone = reference(tokens).logits[0, -1]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = reference(padded, attention_mask=mask, position_ids=positions).logits[0, -1]
    assert (found - alone).abs().max() > 0.01 * alone.abs().max()
