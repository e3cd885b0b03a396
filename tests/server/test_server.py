"""The server's answers: every field is honoured as `LLM` honours it, in one piece and in a stream."""

import asyncio
import json
import re
import time

import httpx
import pytest
from serving import gather, reasons, served_model, serving, texts

from longspan.llm import LLM
from longspan.models.grammar import Grammars
from longspan.models.loader import load_tokenizer
from longspan.server.config import ServerConfig
from longspan.server.logprobs import prompt_offsets
from longspan.server.protocol import nth_choice
from longspan.server.sse import event
from longspan.server.token_texts import TokenTexts
from longspan.types import SamplingParams

PROMPT = "The quick brown fox jumps over the lazy dög."
PROMPT_LEN = 1 + len(PROMPT.encode())
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
RENDERED = "[system]Be brief.\n[user]Hi!\n[assistant]"
TWO_RANKS = {"context_parallel_size": 2, "page_size": 4, "stripe_size": 8}


@pytest.fixture(scope="module")
def server(cache_home):
    with serving(**TWO_RANKS) as served:
        yield served


@pytest.fixture(scope="module")
def llm(cache_home):
    with LLM(served_model().path, executor="threads", threads_per_rank=1, kv_cache_memory=2**25) as one:
        yield one


def alone(llm, prompt=PROMPT, **params):
    """What `LLM` generates: the prompt's output, and the prompt's log-probabilities."""
    (output,) = llm.generate(prompt, SamplingParams(**params))
    return output


# -- completions -------------------------------------------------------------------------------------------------------

HONOURED = [
    {"temperature": 0},
    {"temperature": 0, "max_tokens": 5},
    {"temperature": 0, "max_tokens": 40, "ignore_eos": True},
    {"seed": 7, "temperature": 2.5},
    {"seed": 7, "temperature": 1.5, "top_p": 0.5},
    {"seed": 7, "temperature": 1.5, "top_k": 3},
    {"seed": 7, "temperature": 1.5, "min_p": 0.3},
    {"temperature": 0, "presence_penalty": 2},
    {"temperature": 0, "frequency_penalty": 1.5, "max_tokens": 40},
    {"temperature": 0, "repetition_penalty": 1.8},
    {"temperature": 0, "logit_bias": {"65": 100, "66": 99}, "presence_penalty": 2},
    {"temperature": 0, "stop_token_ids": list(range(128)), "max_tokens": 60},
    {"temperature": 0, "stop_token_ids": list(range(128)), "max_tokens": 60, "min_tokens": 9},
    {"temperature": 0, "stop": ["e", "a", "o", "\ufffd"], "max_tokens": 60},
    {"temperature": 0, "stop": "e", "max_tokens": 60, "min_tokens": 20},
    {"temperature": 0, "logit_bias": {"257": 100}},
    {"temperature": 0, "logit_bias": {"257": 100}, "min_tokens": 3},
]


def _name(fields):
    return json.dumps(fields)[:60]


def as_params(fields):
    fields = dict(fields)
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token_id): bias for token_id, bias in fields["logit_bias"].items()}
    return fields


@pytest.mark.parametrize("fields", HONOURED, ids=_name)
def test_a_field_does_what_it_does_in_python(server, llm, fields):
    expected = alone(llm, **as_params(fields)).outputs[0]
    answer = server.ok(COMPLETIONS, prompt=PROMPT, **fields)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
    assert answer["usage"]["prompt_tokens"] == PROMPT_LEN
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)
    assert answer["usage"]["total_tokens"] == PROMPT_LEN + len(expected.token_ids)
    chunks = server.stream(COMPLETIONS, prompt=PROMPT, **fields)
    assert texts(chunks) == [expected.text]
    assert reasons(chunks) == [expected.finish_reason]


def test_the_fields_above_change_something(llm):
    outputs = [alone(llm, **as_params(fields)).outputs[0] for fields in HONOURED]
    assert len({(output.text, output.finish_reason, len(output.token_ids)) for output in outputs}) >= len(HONOURED) - 1


def test_defaults_are_those_of_openai(server, llm):
    expected = alone(llm, temperature=1.0, seed=3, max_tokens=16).outputs[0]
    answer = server.ok(COMPLETIONS, prompt=PROMPT, seed=3)
    assert answer["choices"][0]["text"] == expected.text
    assert answer["model"] == server.state.model_name


def test_a_models_own_defaults_hold_where_a_request_says_nothing(llm):
    own = {"temperature": 0.3, "top_k": 5, "repetition_penalty": 1.3, "max_tokens": 9}
    with serving(defaults=own) as server:
        expected = alone(llm, **{**own, "seed": 3, "max_tokens": 16}).outputs[0]
        assert server.ok(COMPLETIONS, prompt=PROMPT, seed=3)["choices"][0]["text"] == expected.text
        expected = alone(llm, temperature=0, max_tokens=16, repetition_penalty=1.3, top_k=5).outputs[0]
        assert server.ok(COMPLETIONS, prompt=PROMPT, temperature=0)["choices"][0]["text"] == expected.text
        chats = [
            server.ok(CHAT, messages=MESSAGES, logit_bias={"257": -100}, **fields)["usage"]["completion_tokens"]
            for fields in ({}, {"max_tokens": 20}, {"min_tokens": 12}, {"temperature": None})
        ]
        assert chats == [9, 20, 12, 9]


def test_an_answer_has_the_documented_shape(server):
    answers = [server.ok(COMPLETIONS, prompt=PROMPT, temperature=0) for _ in range(2)]
    assert len({answer["id"] for answer in answers}) == 2
    for answer in answers:
        assert list(answer) == ["id", "object", "created", "model", "choices", "usage"]
        assert re.fullmatch(r"cmpl-[0-9a-f]{32}", answer["id"])
        assert answer["object"] == "text_completion"
        assert abs(answer["created"] - time.time()) < 60
        assert list(answer["choices"][0]) == ["index", "text", "logprobs", "finish_reason"]
    assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == PROMPT_LEN // 4 * 4


def test_prompts_come_as_text_or_token_ids_one_or_many(server, llm):
    ids = load_tokenizer(server.engine.config.model)(PROMPT)["input_ids"]
    expected = alone(llm, temperature=0).outputs[0].text
    other = alone(llm, "Other", temperature=0).outputs[0].text
    assert texts([server.ok(COMPLETIONS, prompt=ids, temperature=0)]) == [expected]
    many = server.ok(COMPLETIONS, prompt=[PROMPT, "Other"], temperature=0)
    assert texts([many], 2) == [expected, other]
    assert many["usage"]["prompt_tokens"] == PROMPT_LEN + 6
    assert texts([server.ok(COMPLETIONS, prompt=[[256, *b"Other"], ids], temperature=0)], 2) == [other, expected]


def test_choices_are_drawn_from_seeds_derived_from_one(server, llm):
    fields = {"prompt": [PROMPT, "Other"], "temperature": 2.0, "seed": 5, "n": 3}
    answer = server.ok(COMPLETIONS, **fields)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    found = texts([answer], 6)
    assert len(set(found)) == 6
    seeds = [nth_choice(SamplingParams(seed=5), i).seed for i in range(3)]
    assert seeds[0] == 5
    assert found == [
        alone(llm, prompt, temperature=2.0, seed=seed).outputs[0].text for prompt in (PROMPT, "Other") for seed in seeds
    ]
    chunks = server.stream(COMPLETIONS, **fields)
    assert texts(chunks, 6) == found
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert answer["usage"]["prompt_tokens"] == PROMPT_LEN + 6  # once per prompt, however many answers
    assert answer["usage"]["completion_tokens"] == 6 * 16


def test_without_a_seed_choices_differ(server):
    found = texts([server.ok(COMPLETIONS, prompt=PROMPT, temperature=3.0, n=4)], 4)
    assert len(set(found)) == 4


def test_echo_repeats_the_prompt(server, llm):
    text = alone(llm, temperature=0).outputs[0].text
    assert texts([server.ok(COMPLETIONS, prompt=PROMPT, temperature=0, echo=True)]) == [PROMPT + text]
    assert texts([server.ok(COMPLETIONS, prompt=[*b"abc"], temperature=0, echo=True)])[0].startswith("abc")
    chunks = server.stream(COMPLETIONS, prompt=PROMPT, temperature=0, echo=True, n=2)
    assert texts(chunks, 2) == [PROMPT + text] * 2


@pytest.mark.parametrize("max_tokens", [0, 6])
def test_echo_with_logprobs_tells_those_of_the_prompt(server, llm, max_tokens):
    expected = alone(llm, temperature=0, max_tokens=max(1, max_tokens), logprobs=2, prompt_logprobs=2)
    answer = server.ok(COMPLETIONS, prompt=PROMPT, temperature=0, echo=True, logprobs=2, max_tokens=max_tokens)
    found = answer["choices"][0]["logprobs"]
    of_tokens = [*expected.prompt_logprobs[1:], *expected.outputs[0].logprobs[:max_tokens]]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["tokens"][0] == "<|bos|>"
    assert found["token_logprobs"][1:] == pytest.approx([one.logprob for one in of_tokens], abs=1e-4)
    assert answer["usage"]["completion_tokens"] == max_tokens
    text = answer["choices"][0]["text"]
    assert text == PROMPT + (expected.outputs[0].text if max_tokens else "")
    assert found["text_offset"][:5] == [0, 0, 1, 2, 3]
    assert max(found["text_offset"][:PROMPT_LEN]) == len(PROMPT) - 1
    for token, offset in zip(found["tokens"][1:], found["text_offset"][1:], strict=True):
        if token.isascii() and not token.startswith("bytes:") and offset < len(PROMPT):
            assert text[offset] == token
    chunks = server.stream(COMPLETIONS, prompt=PROMPT, temperature=0, echo=True, logprobs=2, max_tokens=max_tokens)
    assert texts(chunks) == [text]
    parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
    assert [token for part in parts for token in part["tokens"]] == found["tokens"]
    assert [offset for part in parts for offset in part["text_offset"]] == found["text_offset"]


@pytest.mark.parametrize("num_top", [0, 1, 3])
def test_logprobs_are_those_of_the_model(server, llm, num_top):
    expected = alone(llm, temperature=0, max_tokens=30, logprobs=num_top).outputs[0].logprobs
    found = server.ok(COMPLETIONS, prompt=PROMPT, temperature=0, max_tokens=30, logprobs=num_top)
    found = found["choices"][0]["logprobs"]
    assert found["token_logprobs"] == pytest.approx([one.logprob for one in expected], abs=1e-4)
    names = TokenTexts(server.state.tokenizers.tokenizer)
    assert found["tokens"] == [names.name_of(one.token_id) for one in expected]
    for top, one in zip(found["top_logprobs"], expected, strict=True):
        assert len(top) == max(1, num_top)
        assert top[names.name_of(one.token_id)] == pytest.approx(one.logprob, abs=1e-4)
    assert any(token.startswith("bytes:\\x") for token in found["tokens"])  # the model writes bytes that are no text
    chunks = server.stream(COMPLETIONS, prompt=PROMPT, temperature=0, max_tokens=30, logprobs=num_top)
    parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
    for name in ("tokens", "text_offset"):
        assert [value for part in parts for value in part[name]] == found[name]
    streamed = [value for part in parts for value in part["token_logprobs"]]
    assert streamed == pytest.approx(found["token_logprobs"], abs=1e-4)


# -- chat --------------------------------------------------------------------------------------------------------------


def test_chat_goes_through_the_template(server, llm):
    ids = [*RENDERED.encode()]
    expected = alone(llm, ids, temperature=0, max_tokens=20).outputs[0]
    answer = server.ok(CHAT, messages=MESSAGES, temperature=0, max_tokens=20)
    assert list(answer) == ["id", "object", "created", "model", "choices", "usage"]
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", answer["id"])
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": expected.text, "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert answer["usage"]["prompt_tokens"] == len(ids)
    chunks = server.stream(CHAT, messages=MESSAGES, temperature=0, max_tokens=20, n=2)
    assert texts(chunks, 2) == [expected.text] * 2
    assert reasons(chunks, 2) == ["length"] * 2
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for i in range(2):
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == i]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert deltas[-1] == {}
    newer = server.ok(CHAT, messages=MESSAGES, temperature=0, max_completion_tokens=20)
    assert newer["choices"] == answer["choices"]


def test_messages_may_come_in_parts_and_developers_are_the_system(server):
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts, "name": "Eve"}]
    found = server.ok("/tokenize", messages=messages)
    assert bytes(found["tokens"]) == b"[system]Be brief.\n[user]Hi\nthere\n[assistant]"


@pytest.mark.parametrize("fields", [fields for fields in HONOURED if "max_tokens" in fields], ids=_name)
def test_chat_honours_the_same_fields(server, llm, fields):
    expected = alone(llm, [*RENDERED.encode()], **as_params(fields)).outputs[0]
    (choice,) = server.ok(CHAT, messages=MESSAGES, **fields)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected.text, expected.finish_reason)


def test_chat_logprobs_tell_bytes(server, llm):
    expected = alone(llm, [*RENDERED.encode()], temperature=0, max_tokens=30, logprobs=2).outputs[0].logprobs
    fields = {"messages": MESSAGES, "temperature": 0, "max_tokens": 30, "logprobs": True}
    found = server.ok(CHAT, **fields, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    texts_of = TokenTexts(server.state.tokenizers.tokenizer)
    for entry, one in zip(found, expected, strict=True):
        assert list(entry) == ["token", "logprob", "bytes", "top_logprobs"]
        assert bytes(entry["bytes"]) == texts_of.bytes_of(one.token_id)
        assert entry["token"] == bytes(entry["bytes"]).decode(errors="replace")
        assert entry["logprob"] == pytest.approx(one.logprob, abs=1e-4)
        assert [bytes(top["bytes"]) for top in entry["top_logprobs"]] == [texts_of.bytes_of(i) for i, _ in one.top]
    assert any("\ufffd" in entry["token"] for entry in found)
    chunks = server.stream(CHAT, **fields, top_logprobs=2)
    parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert [entry["bytes"] for part in parts for entry in part["content"]] == [entry["bytes"] for entry in found]
    plain = server.ok(CHAT, **fields)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in plain] == [[]] * 30


@pytest.mark.cover
def test_an_answer_may_take_all_that_fits(cache_home):
    ids = len(RENDERED)
    with serving(config=ServerConfig(max_model_len=ids + 30)) as served:
        answer = served.ok(CHAT, messages=MESSAGES, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 30
    with serving(page_size=4, stripe_size=4, kv_cache_memory=40 * 4 * 3 * 2 * 2 * 16 * 4) as served:
        assert served.state.lengths.longest_request == 161
        answer = served.ok(CHAT, messages=MESSAGES, ignore_eos=True)
        assert answer["usage"]["total_tokens"] == 161


def test_a_model_without_a_template_refuses_to_chat(cache_home):
    with serving(served_model(has_template=False)) as served:
        error = served.refused(CHAT, messages=MESSAGES)
        assert error["code"] == "no_chat_template"
        assert "no chat template" in error["message"]
        assert served.refused("/tokenize", messages=MESSAGES)["code"] == "no_chat_template"
        served.ok(COMPLETIONS, prompt="a")


def test_what_a_template_refuses_is_the_clients_mistake(server):
    error = server.refused(CHAT, messages=[*MESSAGES, {"role": "system", "content": "late"}])
    assert error["param"] == "messages"
    assert "system first" in error["message"]


# -- structured output -------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", [1, 2])
def test_an_answer_follows_its_schema(server, seed):
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    fields = {"seed": seed, "temperature": 1.5, "max_tokens": 200, "response_format": wanted}
    answer = server.ok(CHAT, messages=MESSAGES, **fields)
    person = json.loads(answer["choices"][0]["message"]["content"])
    assert person["name"] in ("Ann", "Bob")
    assert 0 <= person["age"] <= 99
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert json.loads(texts(server.stream(CHAT, messages=MESSAGES, **fields))[0]) == person
    (choice,) = server.ok(COMPLETIONS, prompt=PROMPT, **fields)["choices"]
    assert json.loads(choice["text"])["name"] in ("Ann", "Bob")


def test_a_schema_is_compiled_once_per_request(server, monkeypatch):
    compiled = []
    real = Grammars.compile
    monkeypatch.setattr(Grammars, "compile", lambda self, schema: compiled.append(schema) or real(self, schema))
    body = {"prompt": "x", "response_format": {"type": "json_object"}, "seed": 3, "temperature": 2, "max_tokens": 25}
    many = [choice["text"] for choice in server.ok(COMPLETIONS, **body, n=6)["choices"]]
    assert len(compiled) == 1
    assert len(set(many)) > 1  # each choice goes its own way
    assert all(text.lstrip().startswith("{") for text in many)
    assert server.ok(COMPLETIONS, **body)["choices"][0]["text"] == many[0]


def test_json_object_is_any_object(server):
    fields = {"seed": 4, "temperature": 0.5, "max_tokens": 400, "response_format": {"type": "json_object"}}
    answer = server.ok(CHAT, messages=MESSAGES, **fields)
    (choice,) = answer["choices"]
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    assert choice["message"]["content"].lstrip().startswith("{")
    plain = {"temperature": 0, "max_tokens": 9, "messages": MESSAGES}
    assert server.ok(CHAT, **plain, response_format={"type": "text"})["choices"] == server.ok(CHAT, **plain)["choices"]


@pytest.mark.parametrize(
    "schema", [{"type": "nothing"}, {"not": {"type": "object"}}, {"type": "object", "x-guidance": {}}]
)
def test_rejects_schemas_that_cannot_be_followed(server, schema):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error = server.refused(CHAT, messages=MESSAGES, response_format=wanted)
    assert error["param"] == "response_format"


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stop_string_never_shows_in_a_stream(server, llm):
    whole = alone(llm, temperature=0, max_tokens=60).outputs[0].text
    at = next(i for i in range(8, 40) if "\ufffd" not in whole[i : i + 4] and whole.find(whole[i : i + 4]) == i)
    stop = whole[at : at + 4]
    chunks = server.stream(COMPLETIONS, prompt=PROMPT, temperature=0, max_tokens=60, stop=[stop, "~~~"])
    assert texts(chunks) == [whole[:at]]
    assert reasons(chunks) == ["stop"]
    server.wait_until_free()
    assert (
        server.ok(COMPLETIONS, prompt=PROMPT, temperature=0, max_tokens=60, stop=stop)["choices"][0]["text"]
        == whole[:at]
    )


def test_usage_comes_last_if_asked_for(server):
    fields = {"prompt": PROMPT, "temperature": 0, "max_tokens": 4}
    server.ok(COMPLETIONS, **fields)  # now the prompt is cached, whoever ran before
    whole = server.ok(COMPLETIONS, **fields)["usage"]
    *rest, last = server.stream(COMPLETIONS, **fields, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"] == whole
    assert all(chunk["usage"] is None for chunk in rest)
    assert all("usage" not in chunk for chunk in server.stream(COMPLETIONS, **fields, stream_options={}))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_progress_is_told_while_the_prompt_is_computed(cache_home, path):
    long = "".join(chr(97 + i * i % 26) for i in range(900))
    body = {"prompt": long} if path == COMPLETIONS else {"messages": [{"role": "user", "content": long}]}
    with serving(**TWO_RANKS, max_num_batched_tokens=64) as served:
        chunks = served.stream(path, **body, max_tokens=3, temperature=0, return_progress=True)
        progress = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
        assert all(chunk["choices"] == [] for chunk in chunks if "prompt_progress" in chunk)
        total = progress[-1]["total"]
        assert list(progress[0]) == ["index", "total", "cache", "processed", "time_ms", "time_left_ms"]
        assert len(progress) >= 7
        processed = [one["processed"] for one in progress]
        assert processed == sorted(set(processed))
        assert processed[-1] == total
        assert progress[-1]["time_left_ms"] == 0
        assert all(one["time_left_ms"] > 0 for one in progress[:-1])
        assert [one["time_ms"] for one in progress] == sorted(one["time_ms"] for one in progress)
        assert {one["cache"] for one in progress} == {0}
        assert not any("prompt_progress" in chunk for chunk in served.stream(path, **body, max_tokens=3, temperature=0))
        again = served.stream(path, **body, max_tokens=3, temperature=0, return_progress=True)
        cached = next(chunk["prompt_progress"]["cache"] for chunk in again if "prompt_progress" in chunk)
        assert cached >= total - 4


def slow_down(served, seconds):
    """Every plan takes so much longer."""
    for runner in served.engine.executor.runners:
        run = runner.run

        def slow(plan, run=run):
            time.sleep(seconds)
            return run(plan)

        runner.run = slow


def test_a_silent_stream_shows_that_it_lives(cache_home):
    with serving(config=ServerConfig(keep_alive_s=0.05)) as served:
        slow_down(served, 0.3)
        with served.http.stream("POST", COMPLETIONS, json={"prompt": "a", "max_tokens": 2, "stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert lines.index(": keep-alive") < lines.index(next(line for line in lines if line.startswith("data: {")))
        assert lines.count(": keep-alive") >= 4
        assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_pages(cache_home, stream):
    with serving(**TWO_RANKS, max_num_batched_tokens=32) as served:
        slow_down(served, 0.05)
        body = {"prompt": "x" * 1500, "max_tokens": 400, "stream": stream, "n": 2}
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.Client(base_url=served.url, timeout=0.5) as client,
            client.stream("POST", COMPLETIONS, json=body) as answer,
        ):
            answer.read()
        served.wait_until_free(2.0)
        metrics = served.http.get("/metrics").text
        assert 'vllm:request_success_total{finished_reason="abort"' in metrics
        assert re.search(r'finished_reason="abort",model_name="[^"]*"} 2.0', metrics)


@pytest.mark.cover
def test_streams_side_by_side_equal_each_alone(cache_home, llm):
    cases = []
    for i in range(64):
        prompt = "".join(chr(97 + (i * 31 + j * j) % 26) for j in range(1 + (i * 53) % 190))
        params = {"temperature": 0} if i % 2 else {"temperature": 1.3, "seed": i}
        cases.append({"prompt": prompt, "max_tokens": 4 + i % 23, **params, "ignore_eos": True})
    with serving(**TWO_RANKS, max_num_seqs=24, max_num_batched_tokens=128) as served:
        streams = asyncio.run(gather(served.url, cases))
    for chunks, case in zip(streams, cases, strict=True):
        prompt = case.pop("prompt")
        expected = alone(llm, prompt, **case).outputs[0].text
        assert texts(chunks) == [expected], case


def test_an_event_is_one_line_for_every_client():
    text = "a\u2028b\u2029c\x85d\re\x0bf\x1eg\\u2028é"
    (line, *rest) = event({"text": text}).decode().splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": text}
    assert rest == [""]


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_text_to_tokens_and_back(server):
    found = server.ok("/tokenize", prompt=PROMPT)
    assert found == {"count": PROMPT_LEN, "max_model_len": 2048, "tokens": [256, *PROMPT.encode()]}
    assert server.ok("/tokenize", prompt=PROMPT, add_special_tokens=False)["tokens"] == [*PROMPT.encode()]
    assert server.ok("/tokenize", prompt="a b", return_token_strs=True)["token_strs"] == ["<|bos|>", "a", "Ġ", "b"]
    assert bytes(server.ok("/tokenize", messages=MESSAGES)["tokens"]) == RENDERED.encode()
    shorter = server.ok("/tokenize", messages=MESSAGES, add_generation_prompt=False)
    assert bytes(shorter["tokens"]) == RENDERED.removesuffix("[assistant]").encode()
    assert server.ok("/detokenize", tokens=found["tokens"]) == {"prompt": PROMPT}
    assert server.ok("/detokenize", tokens=[]) == {"prompt": ""}


@pytest.mark.processes
def test_a_megabyte_of_text_does_not_keep_others_waiting(server):
    megabyte = "lorem ipsum " * 90_000

    async def ask():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            long = [
                asyncio.create_task(client.post("/tokenize", json={"prompt": megabyte})),
                asyncio.create_task(client.post(COMPLETIONS, json={"prompt": megabyte})),
            ]
            slowest, num_asked = 0.0, 0
            while not all(task.done() for task in long):
                started = time.perf_counter()
                assert (await client.get("/health")).status_code == 200
                slowest, num_asked = max(slowest, time.perf_counter() - started), num_asked + 1
                await asyncio.sleep(0.005)
            return [(await task) for task in long], slowest, num_asked

    started = time.perf_counter()
    (tokenized, refused), slowest, num_asked = asyncio.run(ask())
    took = time.perf_counter() - started
    assert len(tokenized.json()["tokens"]) == len(megabyte) + 1
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert num_asked >= 5
    assert slowest < max(0.2, took / 3), (slowest, took)


def test_token_texts_keep_bytes_and_spaces_apart():
    texts_of = TokenTexts(load_tokenizer("recall"))
    assert [texts_of.bytes_of(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert texts_of.name_of(257) == "<|eos|>"
    assert (texts_of.name_of(0xE2), texts_of.text_of(0xE2)) == ("bytes:\\xe2", "\ufffd")
    assert texts_of.bytes_of(100_000) == b""
    assert prompt_offsets(load_tokenizer("recall"), [256, *"aöb".encode()]) == [0, 0, 1, 1, 2]


# -- about the server --------------------------------------------------------------------------------------------------


def test_models_and_health(server):
    name = server.state.model_name
    (model,) = server.http.get("/v1/models").json()["data"]
    assert model["id"] == name
    assert model["max_model_len"] == 2048
    assert server.http.get(f"/v1/models/{name}").json() == model
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/openapi.json").json()["info"]["title"] == "longspan"


def test_a_model_is_called_what_the_server_calls_it(cache_home):
    with serving(config=ServerConfig(served_model_name="org/tiny")) as served:
        assert served.ok(COMPLETIONS, prompt="a", model="org/tiny")["model"] == "org/tiny"
        assert served.http.get("/v1/models/org/tiny").status_code == 200
        for path, body in (
            (COMPLETIONS, {"prompt": "a"}),
            (CHAT, {"messages": MESSAGES}),
            ("/tokenize", {"prompt": "a"}),
        ):
            error = served.refused(path, 404, model="gpt", **body)
            assert (error["code"], error["param"]) == ("model_not_found", "model")
            assert "'org/tiny'" in error["message"]


def test_metrics_count_what_happened(cache_home):
    with serving(**TWO_RANKS) as served:
        served.ok(COMPLETIONS, prompt=PROMPT, temperature=0, max_tokens=5, ignore_eos=True)
        served.stream(COMPLETIONS, prompt=PROMPT, temperature=0, max_tokens=6, ignore_eos=True)
        served.ok(COMPLETIONS, prompt=PROMPT, logit_bias={"257": 100}, temperature=0)
        answer = served.http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        values = {}
        for line in answer.text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                values[re.sub(r'model_name="[^"]*",?', "", name).replace(",}", "}").replace("{}", "")] = float(value)
    assert values["vllm:prompt_tokens_total"] == 3 * PROMPT_LEN
    assert values["vllm:generation_tokens_total"] == 12
    assert values['vllm:request_success_total{finished_reason="length"}'] == 2
    assert values['vllm:request_success_total{finished_reason="stop"}'] == 1
    assert values['vllm:request_success_total{finished_reason="abort"}'] == 0
    assert values["vllm:time_to_first_token_seconds_count"] == 3
    assert values["vllm:inter_token_latency_seconds_count"] == 4 + 5
    assert values["vllm:e2e_request_latency_seconds_count"] == 3
    assert values["vllm:num_requests_running"] == values["vllm:num_requests_waiting"] == 0
    assert values["vllm:kv_cache_usage_perc"] == values["vllm:num_preemptions_total"] == 0
    assert values["vllm:prefix_cache_queries_total"] > values["vllm:prefix_cache_hits_total"] > 0
    for rank in "01":
        assert values[f'longspan:kv_pages_total{{rank="{rank}"}}'] > values[f'longspan:kv_pages_used{{rank="{rank}"}}']
    assert sum(value for name, value in values.items() if name.startswith("longspan:busy_seconds_total")) > 0
    assert sum(value for name, value in values.items() if name.startswith("longspan:tokens_computed_total")) > 50
    assert sum(value for name, value in values.items() if name.startswith("longspan:steps_total")) >= 12
