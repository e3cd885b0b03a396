"""Proves that text comes out whole and soon, whatever bytes a model writes."""

import random

import pytest

from longspan.models.detokenizer import Detokenizer
from longspan.models.loader import load_tokenizer
from longspan.models.recall_tokenizer import BOS_ID, VOCAB_SIZE


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("recall")  # a token is a byte


def pieces(seed: int) -> bytes:
    """Characters of 1 to 4 bytes, and bytes that are no text, in long and short runs."""
    rng = random.Random(seed)
    parts = ["a", "é", "€", "🙂", "\ufffd"]
    text = b""
    while len(text) < 200:
        if rng.random() < 0.5:
            text += "".join(rng.choice(parts) for _ in range(rng.randint(1, 4))).encode()
        else:
            text += bytes(rng.choice([0x80, 0xBF, 0xC3, 0xE2, 0xF0, 0xFF]) for _ in range(rng.choice([1, 2, 5, 30])))
    return text


@pytest.mark.parametrize("seed", range(60))
def test_streamed_text_is_the_decoded_text_and_never_far_behind(tokenizer, seed):
    data = pieces(seed)
    detokenizer = Detokenizer(tokenizer, [65, 66])
    text = ""
    for i, byte in enumerate(data):
        text += detokenizer.add(byte)
        decoded = data[: i + 1].decode(errors="replace")
        assert decoded.startswith(text)
        assert len(decoded) - len(text) <= 9, "text is held back"
    text += detokenizer.finish()
    assert text == tokenizer.decode(list(data), skip_special_tokens=True)


@pytest.mark.parametrize("token_id", [BOS_ID, VOCAB_SIZE, 100_000])
def test_special_tokens_and_ids_outside_the_vocabulary_have_no_text(tokenizer, token_id):
    detokenizer = Detokenizer(tokenizer, [65])
    assert [detokenizer.add(one) for one in (66, token_id, 67)] == ["B", "", "C"]
    assert detokenizer.finish() == ""


def test_a_prompt_that_ends_within_a_character_is_not_repeated(tokenizer):
    detokenizer = Detokenizer(tokenizer, [65, *"€".encode()[:2]])
    assert [detokenizer.add(byte) for byte in ("€".encode()[2], *b"abc")] == ["", "a", "b", "c"]
