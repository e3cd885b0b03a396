"""One request's output as its reader tells it: text, stop strings, ends, progress."""

import pytest

from longspan.engine.output_reader import OutputReader, held_back
from longspan.engine.update import Update
from longspan.models.loader import load_tokenizer
from longspan.types import FinishReason, SamplingParams, TokenLogprobs


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("recall")  # a token is a byte


def update(text=b"", *, prefilled=3, cached=0, seconds=1.0, reason=None, **fields):
    logprobs = [TokenLogprobs(byte, -1.0, 1, ()) for byte in text]
    return Update(
        list(text), logprobs, prefilled, cached, seconds, reason, fields.pop("prompt_logprobs", None), **fields
    )


def reader_of(tokenizer, **params):
    return OutputReader(tokenizer, list(b"abc"), SamplingParams(max_tokens=100, **params))


# -- text and its end --------------------------------------------------------------------------------------------------


def test_a_stop_string_is_found_behind_bytes_that_are_no_text(tokenizer):
    reader = reader_of(tokenizer, stop=("END",))
    for byte in [0x80] * 40 + list(b"xENDy"):
        if reader.finish_reason is None:
            reader.read(update(bytes([byte])))
    assert reader.finish_reason is FinishReason.STOP
    assert reader.text == "\ufffd" * 40 + "x"


@pytest.mark.parametrize("reason", [None, FinishReason.LENGTH])
def test_tokens_that_came_together_do_not_count_behind_a_stop_string(tokenizer, reason):
    reader = reader_of(tokenizer, stop=("c",))
    first = reader.read(update(b"ab"))
    last = reader.read(update(b"cde", reason=reason))
    assert (first.text, first.offsets, first.finish_reason) == ("ab", [0, 1], None)
    assert (last.text, last.offsets, last.finish_reason) == ("", [2], FinishReason.STOP)
    assert [one.token_id for one in last.logprobs] == [ord("c")]
    assert (reader.text, reader.num_generated) == ("ab", 3)


def test_text_that_may_become_a_stop_string_is_told_when_it_cannot_any_more(tokenizer):
    reader = reader_of(tokenizer, stop=("stop", "ox"))
    deltas = [reader.read(update(bytes([byte]))) for byte in b"a sto"]
    assert "".join(delta.text for delta in deltas) == "a "
    assert reader.read(update(b"b")).text == "stob"
    assert reader.read(update(b"s")).text == ""
    last = reader.read(update(b"o", reason=FinishReason.LENGTH))
    assert (last.text, last.finish_reason, reader.text) == ("so", FinishReason.LENGTH, "a stobso")


def test_neither_stop_strings_nor_stop_token_ids_count_before_min_tokens(tokenizer):
    reader = reader_of(tokenizer, stop=("b",), stop_token_ids=(ord("c"),), min_tokens=3)
    for byte in b"abc":
        assert reader.read(update(bytes([byte]))).finish_reason is None
    assert reader.text == "abc"
    last = reader.read(update(b"c", reason=FinishReason.STOP))  # the engine ends a request at a token id
    assert (last.text, last.finish_reason, reader.text) == ("", FinishReason.STOP, "abc")
    other = reader_of(tokenizer, stop=("b",), min_tokens=3)
    other.read(update(b"abcab"))
    assert (other.text, other.finish_reason) == ("abca", FinishReason.STOP)


def test_an_unfinished_character_is_told_at_the_end_and_may_complete_a_stop_string(tokenizer):
    data = "x€".encode()[:3]
    reader = reader_of(tokenizer)
    assert reader.read(update(data)).text == "x"
    last = reader.read(update(reason=FinishReason.LENGTH))
    assert (last.text, last.finish_reason, reader.text) == ("\ufffd", FinishReason.LENGTH, "x\ufffd")
    stopping = reader_of(tokenizer, stop=("\ufffd",))
    last = stopping.read(update(data, reason=FinishReason.LENGTH))
    assert (last.text, last.finish_reason) == ("x", FinishReason.STOP)


def test_what_may_become_a_stop_string_is_held_back():
    assert held_back("abc", ["cde"]) == 1
    assert held_back("abcd", ["cde", "bcdx"]) == 3
    assert held_back("abc", ["x", "bd"]) == 0
    assert held_back("", ["ab"]) == 0
    assert held_back("aaa", ["aaaa"]) == 3


# -- facts -------------------------------------------------------------------------------------------------------------


def test_progress_is_told_when_the_prompt_gets_further_or_starts_again(tokenizer):
    reader = OutputReader(tokenizer, [65] * 100, SamplingParams())
    assert reader.read(update(prefilled=20, cached=10, seconds=1.0)).has_prefilled
    assert not reader.read(update(prefilled=20, cached=10, seconds=2.0)).has_prefilled
    progress = reader.prefill_progress()
    assert (progress.total, progress.cached, progress.processed, progress.elapsed_s) == (100, 10, 20, 1.0)
    assert progress.left_s == pytest.approx(8.0)
    assert reader.read(update(prefilled=0, cached=10, seconds=3.0, is_recovering=True)).has_prefilled
    progress = reader.prefill_progress()
    assert (progress.processed, progress.left_s, progress.is_recovering) == (0, None, True)
    assert reader.read(update(prefilled=55, seconds=9.0)).has_prefilled
    assert reader.prefill_progress().left_s == pytest.approx(9.0 * 45 / 55), "what was lost does not count"
    assert reader.read(update(prefilled=40, seconds=10.0)).has_prefilled, "it gave up its pages"
    assert reader.prefill_progress().left_s == pytest.approx(15.0)


def test_facts_of_the_prompt_are_kept(tokenizer):
    reader = reader_of(tokenizer, prompt_logprobs=0)
    found = [TokenLogprobs(98, -1.0, 1, ()), TokenLogprobs(99, -2.0, 1, ())]
    assert reader.read(update(b"x", cached=2, prompt_logprobs=found)).is_output
    assert not reader.read(update(cached=2)).is_output
    assert (reader.num_cached, reader.prompt_logprobs) == (2, found)
