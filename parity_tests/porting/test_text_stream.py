"""A text printed token by token is the text that the tokenizer makes of all tokens, for every kind of decoder."""

import random
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="needs the extra 'text': tokenizers")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jax_moe.generation.text import TextStream

HALF = "\N{REPLACEMENT CHARACTER}"
TEXTS = ["the queen of g café, naïve 雪 ☃ 😀 👩‍🚀", "do n't walk , she 's here .", "g café g café", "  two  spaces\n"]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
FALLBACK = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def byte_level() -> Tokenizer:
    """As GPT-2's and Qwen's: bytes, so that a character may lie in several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """As T5's: a mark for each space, the first of them taken away."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


def fallback() -> Tokenizer:
    """As Llama's and Mixtral's: marks for spaces, bytes for what is not in the vocabulary."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Sequence(FALLBACK)
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(["the queen walks and waits"], trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT's, which takes away spaces before punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


MAKERS = {"byte_level": byte_level, "metaspace": metaspace, "fallback": fallback, "word_piece": word_piece}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Trained on a few lines."""
    return MAKERS[request.param]()


def printed(tokenizer: Any, prompt: list[int], new: list[int]) -> tuple[list[str], str]:
    """The pieces, and what was left at the end."""
    stream = TextStream(tokenizer, prompt)
    return [stream.add(token) for token in new], stream.rest()


@pytest.mark.parametrize("text", TEXTS)
def test_text_cut_anywhere(tokenizer: Tokenizer, text: str) -> None:
    """Prompt, pieces and rest are the whole."""
    tokens = tokenizer.encode(text).ids
    for cut in range(len(tokens) + 1):
        pieces, rest = printed(tokenizer, tokens[:cut], tokens[cut:])
        before, whole = tokenizer.decode(tokens[:cut]), tokenizer.decode(tokens)
        if whole.startswith(before) and not before.endswith(HALF):
            assert before + "".join(pieces) + rest == whole
        assert not any(piece.endswith(HALF) for piece in pieces)


def test_the_space_of_a_mark_is_kept() -> None:
    """The text whose space was lost: "g café" after the prompt "g"."""
    tokenizer = metaspace()
    tokens = tokenizer.encode("g café").ids
    cut = len(tokenizer.encode("g").ids)
    pieces, rest = printed(tokenizer, tokens[:cut], tokens[cut:])
    assert "".join(pieces) + rest == " café"


def test_random_tokens(tokenizer: Tokenizer) -> None:
    """Special tokens, halves of characters and bytes that are none, from an empty prompt and after a letter."""
    generator, begin = random.Random(0), tokenizer.encode("g").ids
    for _ in range(300):
        tokens = [generator.randrange(tokenizer.get_vocab_size()) for _ in range(generator.randrange(1, 12))]
        for prompt in ([], begin):
            before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + tokens)
            pieces, rest = printed(tokenizer, prompt, tokens)
            if whole.startswith(before):  # a decoder may take away a space that it had put there
                assert before + "".join(pieces) + rest == whole, (tokens, pieces, rest)


def test_half_a_character_waits() -> None:
    """An emoji in several tokens comes whole; cut short it comes at the end, as the whole text has it."""
    tokenizer = byte_level()
    face = tokenizer.encode("🙈").ids
    many = len(face)
    assert many >= 3 and printed(tokenizer, [], face) == ([""] * (many - 1) + ["🙈"], "")
    pieces, rest = printed(tokenizer, [], face[:-1])
    assert pieces == [""] * (many - 1) and set(rest) == {HALF} and rest == tokenizer.decode(face[:-1])
    assert printed(tokenizer, face[:1], face[1:])[0] == [""] * (many - 2) + ["🙈"]
    written = tokenizer.encode("a" + HALF).ids  # a prompt may hold that character itself
    assert printed(tokenizer, written, tokenizer.encode("b").ids) == (["b"], "")
    assert printed(tokenizer, written, []) == ([], "")


def test_a_token_that_changes_what_was_printed() -> None:
    """A decoder that takes a printed space away: printing goes on behind it and no piece is lost or an error."""

    class Tokens:
        """Decodes `a`, then `a b`, then `ab`."""

        def decode(self, tokens: list[int]) -> str:
            return ["", "a", "a ", "ab!", "ab!c"][len(tokens)]

    class Stream:
        """Refuses the third token, as the library does."""

        def step(self, tokenizer: Any, token: int) -> str | None:
            if token == 2:
                raise Exception("Invalid prefix encountered while decoding stream")
            return {0: "a", 1: " ", 3: "c"}[token]

    stream = TextStream(Tokens(), [])
    stream.stream = Stream()  # type: ignore[assignment]
    assert [stream.add(token) for token in (0, 1, 2)] == ["a", " ", "!"]
    assert stream.text == "a !"
