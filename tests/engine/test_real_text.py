"""Real texts of 100 to 8,000 tokens through the real model: tokens, perplexity, and what a server does with text."""

import functools
import json
import math
from pydoc_data.topics import topics

import pytest
import torch
from serving import serving, texts
from tiny_models import TinyModel, tiny_engine
from transformers import AutoModelForCausalLM

from longspan.models.loader import load_tokenizer
from longspan.types import SamplingParams

pytestmark = pytest.mark.cover

TEXT = "\n\n".join(topics[name] for name in ("string-methods", "objects", "comparisons"))
SHORT, LONG = [100, 600], [2000, 4001, 8000]
CASES = [*SHORT, *[pytest.param(length, marks=pytest.mark.slow) for length in LONG]]
NUM_TOKENS = 24


@functools.cache
def model_of(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()


@functools.cache
def prompt_ids(path, length):
    """The last `length` tokens of the text: a prompt ends in the middle of a sentence."""
    return tuple(load_tokenizer(path)(TEXT)["input_ids"][:9000][-length:])


@functools.cache
def continued(path, length):
    """Tokens of Transformers' own `generate`."""
    ids = torch.tensor([prompt_ids(path, length)])
    num_tokens = min(NUM_TOKENS, 8192 - length)
    with torch.inference_mode():
        output = model_of(path).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )
    return output[0, length:].tolist()


@functools.cache
def reference_logprobs(path, length):
    """Log-probability of every prompt token but the first, in Transformers."""
    ids = torch.tensor([prompt_ids(path, length)])
    with torch.inference_mode():
        hidden = model_of(path).model(ids).last_hidden_state[0]
        found = []
        for first in range(0, length - 1, 512):  # whole logits would take gigabytes
            last = min(first + 512, length - 1)
            rows = torch.log_softmax(model_of(path).lm_head(hidden[first:last]).double(), dim=-1)
            found += rows.gather(1, ids[0, first + 1 : last + 1, None])[:, 0].tolist()
    return found


def run(path, ids, params, ranks):
    options = {"placement": "striped", "page_size": 16, "stripe_size": 64} if ranks > 1 else {}
    model = TinyModel("smollm2", path, [])
    with tiny_engine(model, context_parallel_size=ranks, kv_cache_memory=2**29, **options) as engine:
        request = engine.add_request(list(ids), params)
        while engine.has_requests:
            engine.step()
    return request


@pytest.mark.parametrize("ranks", [2, 1, 3])
@pytest.mark.parametrize("length", CASES)
def test_greedy_tokens_of_a_real_text_are_those_of_transformers(smollm2, length, ranks):
    path = str(smollm2)
    expected = continued(path, length)
    request = run(path, prompt_ids(path, length), SamplingParams(max_tokens=len(expected)), ranks)
    assert request.output_token_ids == expected


@pytest.mark.cover(cases=1)
@pytest.mark.parametrize("ranks", [2, 1])
@pytest.mark.parametrize("length", [600, pytest.param(8000, marks=pytest.mark.slow)])
def test_perplexity_is_that_of_transformers(smollm2, length, ranks):
    path = str(smollm2)
    request = run(path, prompt_ids(path, length), SamplingParams(max_tokens=1, prompt_logprobs=0), ranks)
    ours = [entry.logprob for entry in request.prompt_logprobs]
    theirs = reference_logprobs(path, length)
    assert len(ours) == len(theirs) == length - 1
    perplexity, expected = (math.exp(-sum(found) / len(found)) for found in (ours, theirs))
    assert perplexity == pytest.approx(expected, rel=1e-4)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-3
    assert 2 < expected < 60  # it is a text, and the model has read such ones


@pytest.fixture(scope="module")
def server(smollm2):
    model = TinyModel("smollm2", str(smollm2), [])
    with serving(model, context_parallel_size=2, placement="striped", stripe_size=16, kv_cache_memory=2**28) as one:
        yield one


@pytest.mark.parametrize(
    "prompt", ["😀😃😄😀😃😄😀😃😄😀", "Я люблю тебя. Я люблю тебя. Я люблю", "天地玄黄天地玄黄天地玄黄天"]
)
def test_characters_of_several_tokens_are_streamed_whole(server, prompt):
    body = {"prompt": prompt, "max_tokens": 24, "temperature": 0}
    whole = server.ok("/v1/completions", **body)["choices"][0]["text"]
    chunks = server.stream("/v1/completions", **body)
    (streamed,) = texts(chunks)
    assert streamed == whole
    assert any(ord(char) > 0x7F for char in whole), "nothing of several bytes came"
    pieces = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    assert not any("\ufffd" in piece for piece in pieces[:-1])  # the last may end inside a character


def test_an_answer_follows_a_schema(server):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 30}, "inhabitants": {"type": "integer", "minimum": 0}},
        "required": ["city", "inhabitants"],
        "additionalProperties": False,
    }
    body = server.ok(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "Describe Paris in JSON, with its city and its inhabitants."}],
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
        temperature=0,
        max_tokens=80,
    )
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "stop"
    found = json.loads(choice["message"]["content"])
    assert list(found) == ["city", "inhabitants"]
    assert isinstance(found["inhabitants"], int)


def test_a_stop_text_inside_of_tokens_ends_an_answer(server):
    body = {"prompt": "The days of the week are Monday, Tuesday,", "max_tokens": 30, "temperature": 0}
    text = server.ok("/v1/completions", **body)["choices"][0]["text"]
    stop = text[9:13]  # wherever tokens begin
    cut = server.ok("/v1/completions", **body, stop=[stop])["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (text[: text.index(stop)], "stop")
    assert texts(server.stream("/v1/completions", **body, stop=[stop])) == [cut["text"]]


def test_log_probabilities_are_those_of_transformers(server, smollm2):
    path, prompt = str(smollm2), "The capital of France is"
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 3, "return_token_ids": True}
    (choice,) = server.ok("/v1/completions", **body)["choices"]
    prompt_ids, token_ids = load_tokenizer(path)(prompt)["input_ids"], choice["token_ids"]
    with torch.inference_mode():
        logits = model_of(path)(torch.tensor([[*prompt_ids, *token_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, token_id, logprob, top in zip(
        expected, token_ids, choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True
    ):
        assert logprob == pytest.approx(row[token_id].item(), abs=1e-3)
        assert sorted(top.values(), reverse=True) == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
