"""Proves that text comes out whole and soon, whatever bytes a model writes."""

import random

import pytest

from longspan.models.detokenizer import TextStream
from longspan.models.loader import load_tokenizer
from longspan.types import SamplingParams


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
    stream = TextStream(tokenizer, [65, 66], SamplingParams(max_tokens=len(data)))
    text = ""
    for i, byte in enumerate(data):
        text += stream.add(byte)
        assert text == stream.text
        decoded = data[: i + 1].decode(errors="replace")
        assert len(decoded) - len(text) <= 9, "text is held back"
    text += stream.finish()
    assert text == tokenizer.decode(list(data), skip_special_tokens=True)


def test_a_stop_string_is_found_behind_bytes_that_are_no_text(tokenizer):
    stream = TextStream(tokenizer, [65], SamplingParams(max_tokens=100, stop=("END",)))
    for byte in [0x80] * 40 + list(b"xENDy"):
        if not stream.stopped:
            stream.add(byte)
    assert stream.stopped
    assert stream.text == "\ufffd" * 40 + "x"
