"""Whatever is wrong, the client is told what, in one shape; nothing is accepted and ignored; nobody is left waiting."""

import asyncio
import json
import socket
import threading
import time

import httpx
import pytest
from serving import error_of, gather, served_model, serving
from test_server import CHAT, COMPLETIONS, MESSAGES, slow_down

from longspan.errors import ConfigError, WorkerError
from longspan.server.config import ServerConfig
from longspan.server.protocol import ChatRequest, CompletionRequest


@pytest.fixture(scope="module")
def server(cache_home):
    with serving() as served:
        yield served


# -- fields ------------------------------------------------------------------------------------------------------------

REFUSED = {
    COMPLETIONS: {
        "suffix": "x",
        "best_of": 2,
        "use_beam_search": True,
        "tools": [],
        "max_completion_tokens": 5,
        "length_penalty": 1.5,
        "guided_decoding_backend": "outlines",
        "bad_words": ["a"],
        "logprob": 1,
    },
    CHAT: {
        "functions": [{"name": "f"}],
        "function_call": {"name": "f"},
        "modalities": ["text", "audio"],
        "audio": {"voice": "alloy", "format": "wav"},
        "prediction": {"type": "content", "content": "x"},
        "reasoning_effort": "high",
        "verbosity": "low",
        "web_search_options": {},
        "service_tier": "flex",
        "echo": True,
        "best_of": 2,
        "chat_template": "x",
        "documents": [{}],
    },
}
BODIES = {COMPLETIONS: {"prompt": "a"}, CHAT: {"messages": MESSAGES}}


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, fields in REFUSED.items() for name in fields])
def test_rejects_what_is_not_honoured_by_name(server, path, name):
    error = server.refused(path, **BODIES[path], **{name: REFUSED[path][name]})
    assert error["param"] == name
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(f"{name}: ")


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_a_refused_field_may_say_that_it_asks_for_nothing(server, kind):
    path = COMPLETIONS if kind is CompletionRequest else CHAT
    nothing = dict.fromkeys(kind.REFUSED) | {
        name: values[0] for name, values in kind.REFUSED.items() if values and name != "echo"
    }
    account = {
        "user": "eve",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
    }
    fields = BODIES[path] | {"temperature": 0, "max_tokens": 3}
    plain = server.ok(path, **fields)["choices"]
    assert server.ok(path, **fields, **nothing, **account)["choices"] == plain
    optional = {name: None for name, field in kind.model_fields.items() if not field.is_required()}
    assert server.ok(path, **(optional | fields))["choices"] == plain


TOOL = {"type": "function", "function": {"name": "f"}}
WRONG = [
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": [""]}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", [1]]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
    (COMPLETIONS, {"prompt": [1.5]}, "prompt"),
    (COMPLETIONS, {"prompt": [True]}, "prompt"),
    (COMPLETIONS, {"prompt": [260]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": 7}, "prompt"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 2049}, "prompt"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 2.5}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": True}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "top_p": 0}, "top_p"),
    (COMPLETIONS, {"prompt": "a", "top_k": -1}, "top_k"),
    (COMPLETIONS, {"prompt": "a", "min_p": 2}, "min_p"),
    (COMPLETIONS, {"prompt": "a", "seed": -1}, "seed"),
    (COMPLETIONS, {"prompt": "a", "seed": 2**70}, "seed"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, "n"),
    (COMPLETIONS, {"prompt": "a", "n": 129}, "n"),
    (COMPLETIONS, {"prompt": "a", "stop": ""}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": [1]}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 17}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": "a" * 1001}, "stop"),
    (COMPLETIONS, {"prompt": ["a"] * 17, "n": 128}, "n"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [5000]}, None),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 16, "min_tokens": 17}, "min_tokens"),
    (COMPLETIONS, {"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
    (COMPLETIONS, {"prompt": "a", "frequency_penalty": -3}, "frequency_penalty"),
    (COMPLETIONS, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"9999": 1}}, None),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 1, "05": 2}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(1000)}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logprobs": -1}, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "logprobs": "1"}, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    (COMPLETIONS, {"prompt": "a", "prompt_logprobs": -1}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt": "a", "priority": 2**40}, "priority"),
    (COMPLETIONS, {"prompt": "a", "request_id": "a b"}, "request_id"),
    (COMPLETIONS, {"prompt": "a", "skip_special_tokens": "yes"}, "skip_special_tokens"),
    (COMPLETIONS, {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
    (COMPLETIONS, {"prompt": "a", "include_stop_str_in_output": 1}, "include_stop_str_in_output"),
    (COMPLETIONS, {"prompt": "a", "return_token_ids": 1}, "return_token_ids"),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    (COMPLETIONS, {"prompt": "a", "guided_choice": []}, "guided_choice"),
    (COMPLETIONS, {"prompt": "a", "guided_regex": "("}, "guided_regex"),
    (COMPLETIONS, {"prompt": "a", "guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    (COMPLETIONS, {"prompt": "a", "echo": "yes"}, "echo"),
    (COMPLETIONS, {"prompt": "a", "stream": "yes"}, "stream"),
    (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETIONS, {"prompt": "a", "return_progress": True}, "return_progress"),
    (COMPLETIONS, {"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    (COMPLETIONS, {"prompt": "a", "response_format": {"type": "xml"}}, "response_format.type"),
    (COMPLETIONS, {"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format"),
    (COMPLETIONS, {"prompt": "a", "response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}]},
        "messages.0.tool_calls",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "a", "tool_call_id": "1"}]}, "messages.0.tool_call_id"),
    (
        CHAT,
        {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools.0.function.name",
    ),
    (CHAT, {"messages": MESSAGES, "tools": [{"type": "web_search"}]}, "tools.0.type"),
    (CHAT, {"messages": MESSAGES, "tools": [TOOL, TOOL]}, "tools"),
    (CHAT, {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
    (
        CHAT,
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
    ),
    (
        CHAT,
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
        "tool_choice",
    ),
    (CHAT, {"messages": MESSAGES, "reasoning_effort": "huge"}, "reasoning_effort"),
    (CHAT, {"messages": MESSAGES, "reasoning_effort": "high"}, "reasoning_effort"),
    (CHAT, {"messages": MESSAGES, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    (CHAT, {"messages": MESSAGES, "continue_final_message": True}, "continue_final_message"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    (CHAT, {"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 2, "max_completion_tokens": 3}, None),
    (CHAT, {"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
    ("/tokenize", {}, None),
    ("/tokenize", {"prompt": "a", "messages": MESSAGES}, None),
    ("/tokenize", {"prompt": ""}, "prompt"),
    ("/tokenize", {"messages": []}, "messages"),
    ("/detokenize", {"tokens": [300]}, "tokens"),
    ("/detokenize", {"tokens": "abc"}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG, ids=[f"{path} {body}"[:70] for path, body, _ in WRONG])
def test_rejects_illegal_values_with_the_name_of_the_field(server, path, body, param):
    error = server.refused(path, **body)
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert param is None or error["message"].startswith(param)
    assert server.is_free()


BROKEN = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"7",
    b'{"prompt": NaN}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "n": 1e999}',
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "prompt": "b"} x',
]


@pytest.mark.parametrize("body", BROKEN, ids=[repr(body[:30]) for body in BROKEN])
def test_rejects_what_is_no_json_object(server, body):
    headers = {"Content-Type": "application/json"}
    error_of(server.http.post(COMPLETIONS, content=body, headers=headers), 400)


def test_rejects_json_that_is_not_called_json(server):
    for content_type in ("text/plain", "application/x-www-form-urlencoded"):
        headers = {"Content-Type": content_type}
        error = error_of(server.http.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers), 400)
        assert "Content-Type: application/json" in error["message"]


def test_rejects_addresses_and_methods_that_do_not_exist(server):
    assert "/nothing" in error_of(server.http.get("/nothing"), 404)["message"]
    assert "/v1/completions/" in error_of(server.http.post("/v1/completions/", json={}), 404)["message"]
    error_of(server.http.get(COMPLETIONS), 405)
    error_of(server.http.delete("/v1/models"), 405)
    assert error_of(server.http.get("/v1/models/other"), 404)["code"] == "model_not_found"
    assert "\ufffd" not in error_of(server.http.get("/v1/models/%ff"), 404)["type"]


# -- too long ----------------------------------------------------------------------------------------------------------


def test_a_request_that_is_too_long_is_told_what_would_fit_it(cache_home):
    tokens = 64
    memory = tokens * 3 * 2 * 2 * 16 * 4  # layers, K and V, KV heads, head size, bytes
    with serving(page_size=4, stripe_size=4, kv_cache_memory=memory) as served:
        error = served.refused(COMPLETIONS, prompt="x" * 59, max_tokens=6)
        assert error["code"] == "context_length_exceeded"
        assert "got 60 + 6 = 66 tokens, legal is at most 65" in error["message"]
        assert "kv_cache_memory of at least" in error["message"]
        served.ok(COMPLETIONS, prompt="x" * 59, max_tokens=5)
        assert served.state.lengths.longest_request == 65
        error = served.refused(CHAT, messages=[{"role": "user", "content": "x" * 90}])
        assert error["code"] == "context_length_exceeded"


def test_a_request_is_no_longer_than_the_model_or_the_option_admit(server):
    error = server.refused(COMPLETIONS, prompt="x", max_tokens=2047)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "2 + 2047 = 2049 tokens, legal is at most 2048 (max_position_embeddings" in error["message"]
    with serving(config=ServerConfig(max_model_len=20)) as served:
        error = served.refused(COMPLETIONS, prompt="x" * 30)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert "31 + 1 = 32 tokens, legal is at most 20" in error["message"]
        assert "--max-model-len" in error["message"]
        served.ok(COMPLETIONS, prompt="xxx", max_tokens=16)
        assert served.state.lengths.longest_request == 20


# -- long bodies -------------------------------------------------------------------------------------------------------

LONG = {
    "token ids": (COMPLETIONS, b'{"prompt": [5' + b",5" * 6_000_000 + b"]}", "context_length_exceeded"),
    "lists": (COMPLETIONS, b'{"prompt": [[5]' + b",[5]" * 5_000_000 + b"]}", None),
    "texts": (COMPLETIONS, b'{"prompt": ["x"' + b',"x"' * 5_000_000 + b"]}", None),
    "no prompt": (COMPLETIONS, b'{"prompt": {"a": [5' + b",[]" * 6_000_000 + b"]}}", None),
    "stop": (COMPLETIONS, b'{"prompt": "a", "stop": ["x"' + b',"x"' * 5_000_000 + b"]}", None),
    "biases": (COMPLETIONS, b'{"prompt": "a", "logit_bias": {"1":1' + b',"1":1' * 600_000 + b"}}", None),
    "fields": (COMPLETIONS, b'{"prompt": "a"' + b',"x":1' * 3_000_000 + b"}", None),
    "messages": (CHAT, b'{"messages": [{"role":"user","content":"a"}' + b",{}" * 5_000_000 + b"]}", None),
    "parts": (CHAT, b'{"messages": [{"role":"user","content":[{}' + b",{}" * 5_000_000 + b"]}]}", None),
    "tokens": ("/detokenize", b'{"tokens": [70' + b",70" * 6_000_000 + b"]}", "context_length_exceeded"),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_body_is_refused_while_others_are_answered(server, name):
    path, body, code = LONG[name]
    answers = []

    def ask():
        headers = {"Content-Type": "application/json"}
        answers.append(httpx.post(server.url + path, content=body, headers=headers, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    worst_s = 0.0
    while thread.is_alive():
        started_s = time.perf_counter()
        assert server.http.get("/health").status_code == 200
        worst_s = max(worst_s, time.perf_counter() - started_s)
    error = error_of(answers[0], 400)
    assert error["code"] == code
    assert error["message"].startswith(("prompt", "stop", "logit_bias", "x", "messages", "content", "tokens"))
    assert worst_s < 0.7  # 0.1 on an idle machine; at once it took 2 to 10 s


def test_a_long_body_means_what_a_short_one_means(server):
    space = " " * 70_000
    for path, body in (
        (COMPLETIONS, {"prompt": [5, 6, 7]}),
        (COMPLETIONS, {"prompt": [[5, 6], [7]]}),
        (COMPLETIONS, {"prompt": ["a", 'é\n","'], "logit_bias": {"65": 5}, "stop": ["q"], "suffix": ""}),
        (COMPLETIONS, {"prompt": "a", "response_format": {"type": "json_object"}}),
        (CHAT, {"messages": MESSAGES, "tools": None}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "seed": 1}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [70, 71]}),
    ):
        limits = {"temperature": 0, "max_tokens": 3} if path in BODIES else {}
        short = server.ok(path, **body, **limits)
        text = json.dumps({**body, **limits})
        for long in (space + text, text.replace("[", "[" + space), text.replace("]", space + "]")):
            answer = server.http.post(path, content=long.encode(), headers={"Content-Type": "application/json"})
            assert answer.status_code == 200, answer.text
            for name in ("choices", "count", "prompt"):
                assert answer.json().get(name) == short.get(name)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [5] * 500 + [1.5]}, "prompt"),
        ({"prompt": [5] * 500 + ["5"]}, "prompt"),
        ({"prompt": [5] * 500 + [True]}, "prompt"),
        ({"prompt": [5] * 500 + [[5]]}, "prompt"),
        ({"prompt": [[5] * 500, 5]}, "prompt"),
        ({"prompt": "a", "user": "x" * 300_000}, "user"),
        ({"prompt": "a", "sch\u00e4": 1}, "sch\u00e4"),
        ({"prompt": "a", "n": 0}, "n"),
        ({}, "prompt"),
    ],
)
def test_a_long_body_is_checked_as_a_short_one_is(server, body, param):
    text = json.dumps(body).replace("[", "[" + " " * 70_000)
    answer = server.http.post(COMPLETIONS, content=" " * 70_000 + text, headers={"Content-Type": "application/json"})
    assert error_of(answer, 400)["param"] == param


# -- who may ask, and how much -----------------------------------------------------------------------------------------


def test_without_the_key_there_is_nothing_but_health(cache_home):
    with serving(config=ServerConfig(api_key="s3cret")) as served:
        assert served.http.get("/health").status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer s3cret2"},
            {"Authorization": "Bearer"},
            {"Authorization": "s3cret"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": b"Bearer \xff\xfe"},
        ):
            for method, path in (
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("GET", "/openapi.json"),
                ("GET", "/nothing"),
                ("GET", "/health/"),
                ("POST", COMPLETIONS),
                ("POST", "/tokenize"),
            ):
                answer = served.http.request(method, path, headers=headers)
                assert error_of(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        for headers in ({"Authorization": "Bearer s3cret"}, {"authorization": "bearer s3cret"}):
            assert served.http.get("/v1/models", headers=headers).status_code == 200
            assert served.http.post(COMPLETIONS, json={"prompt": "a"}, headers=headers).status_code == 200


def test_a_body_that_is_too_long_is_refused_before_it_is_read(cache_home):
    with serving(config=ServerConfig(max_body_bytes=1000)) as served:
        served.ok(COMPLETIONS, prompt="x" * 500)
        error = served.refused(COMPLETIONS, 413, prompt="x" * 1000)
        assert error["code"] == "body_too_long"
        assert "1000 bytes" in error["message"]
        pieces = (b'{"prompt": "' + b"x" * 300 for _ in range(10))  # no Content-Length
        headers = {"Content-Type": "application/json"}
        error_of(served.http.post(COMPLETIONS, content=pieces, headers=headers), 413)
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999999999\r\n\r\n")
            assert b" 413 " in client.recv(1000)


def test_a_full_queue_is_said_with_429(cache_home):
    with serving(config=ServerConfig(max_queued_requests=2), max_num_seqs=1) as served:
        slow_down(served, 0.05)
        answers = []

        def ask():
            with httpx.Client(base_url=served.url, timeout=60) as client:
                answers.append(client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 8, "ignore_eos": True}))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 429}
        assert codes.count(200) >= 3
        refused = next(answer for answer in answers if answer.status_code == 429)
        error = error_of(refused, 429)
        assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
        assert "legal is at most 2" in error["message"]
        assert int(refused.headers["retry-after"]) >= 1
        error = served.refused(COMPLETIONS, prompt=["a", "b"], n=2)  # no use in trying this again
        assert error["param"] == "n"
        assert "2 prompts x 2 answers = 4" in error["message"]
        served.wait_until_free()


@pytest.mark.cover
def test_nobody_is_refused_while_there_is_a_place(cache_home):
    with serving(config=ServerConfig(max_queued_requests=1), max_num_seqs=16) as served:
        slow_down(served, 0.02)
        body = {"max_tokens": 4, "ignore_eos": True}
        for _ in range(3):
            found = asyncio.run(gather(served.url, [{"prompt": f"hello {i}", **body} for i in range(16)]))
            assert len(found) == 16
            served.wait_until_free()
        assert len(served.ok(COMPLETIONS, prompt="x", n=17, **body)["choices"]) == 17
        assert served.refused(COMPLETIONS, prompt="x", n=18)["param"] == "n"


@pytest.mark.cover
def test_who_waits_for_memory_fills_the_queue(cache_home):
    memory = 256 * 3 * 2 * 2 * 16 * 4  # tokens, layers, K and V, KV heads, head size, bytes
    with serving(config=ServerConfig(max_queued_requests=1), kv_cache_memory=memory) as served:
        slow_down(served, 0.05)
        body = {"max_tokens": 60, "ignore_eos": True}
        prompts = ("a" * 150, "b" * 150)  # different, or they would share pages
        others = [
            threading.Thread(target=served.ok, args=(COMPLETIONS,), kwargs={**body, "prompt": p}) for p in prompts
        ]
        for thread in others:
            thread.start()
            time.sleep(0.5)
        assert served.refused(COMPLETIONS, 429, prompt="y" * 150)["code"] == "queue_full"
        for thread in others:
            thread.join()
        served.wait_until_free()


def test_a_refused_choice_takes_the_others_with_it(cache_home):
    with serving(config=ServerConfig(max_queued_requests=4), max_num_seqs=1) as served:
        slow_down(served, 0.05)
        with served.http.stream(
            "POST", COMPLETIONS, json={"prompt": "a", "max_tokens": 200, "n": 4, "stream": True, "ignore_eos": True}
        ) as first:
            lines = first.iter_lines()  # kept: a generator that nobody holds closes the connection
            next(lines)
            other = httpx.post(served.url + COMPLETIONS, json={"prompt": "b", "n": 3}, timeout=60)
            error_of(other, 429)
            deadline = time.monotonic() + 10  # the engine's thread takes back what was let in before the refusal
            while served.state.engine.stats().num_waiting > 3:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        served.wait_until_free()


# -- slow clients ------------------------------------------------------------------------------------------------------


def connect(served):
    host, port = served.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(30)
    client.connect((host, int(port)))
    return client


def send(client, body, length=None):
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)


@pytest.mark.cover
def test_a_body_that_does_not_come_is_not_waited_for(cache_home, monkeypatch):
    monkeypatch.setattr("longspan.server.limits.BODY_S", 1.0)
    with serving() as served, connect(served) as client:
        send(client, b"{", length=100)
        time.sleep(0.3)
        assert served.state.num_open == 0  # a server that drains does not wait for it
        answer = b"".join(iter(lambda: client.recv(10_000), b""))  # until it is closed
        assert b" 408 " in answer
        assert b"body_too_slow" in answer


@pytest.mark.cover
def test_a_client_that_does_not_read_is_dropped(cache_home, monkeypatch):
    monkeypatch.setattr("longspan.server.sse.SEND_S", 0.5)
    with serving(page_size=16) as served, connect(served) as client:
        body = {"prompt": "x", "max_tokens": 1500, "n": 8, "stream": True, "logprobs": 20, "ignore_eos": True}
        send(client, json.dumps(body).encode())
        deadline = time.monotonic() + 30
        while not served.state.num_open:
            assert time.monotonic() < deadline
        while served.state.num_open:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        served.wait_until_free()
        assert b'finished_reason="abort",model_name="' in served.state.metrics.text()
        assert served.state.engine.stats().num_running == 0


@pytest.mark.cover
def test_what_waits_for_a_slow_client_is_bounded(cache_home, monkeypatch):
    monkeypatch.setattr("longspan.server.generation.MAX_BEHIND", 5)
    with serving() as served, connect(served) as client:
        body = {"prompt": "x", "max_tokens": 1900, "stream": True, "logprobs": 50, "ignore_eos": True}
        send(client, json.dumps(body).encode())
        time.sleep(0.5)
        served.wait_until_free(30)
        text = b""
        while not text.endswith(b"0\r\n\r\n"):
            text += client.recv(2**20)
        assert b"the client reads too slowly" in text


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.cover
def test_while_it_drains_a_server_takes_nothing_new(cache_home):
    with serving() as served:
        slow_down(served, 0.05)
        body = {"prompt": "a", "max_tokens": 20, "stream": True, "ignore_eos": True}
        with served.http.stream("POST", COMPLETIONS, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.state.is_draining = True
            with httpx.Client(base_url=served.url) as other:
                assert error_of(other.post(COMPLETIONS, json={"prompt": "a"}), 503)["code"] == "shutting_down"
                error_of(other.get("/health"), 503)
                assert other.get("/metrics").status_code == 200
            assert [line for line in lines if line][-1] == "data: [DONE]"
        served.state.is_draining = False


@pytest.mark.parametrize("stream", [False, True])
def test_when_a_rank_fails_everybody_is_told(cache_home, stream):
    with serving(context_parallel_size=2) as served:
        for runner in served.engine.executor.runners:
            runner.run = _broken
        answers = []

        def ask():
            with httpx.Client(base_url=served.url, timeout=60) as client:
                answers.append(client.post(COMPLETIONS, json={"prompt": "a", "stream": stream}))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert len(answers) == 3
        for answer in answers:
            if answer.status_code == 200:
                assert stream
                assert "the tokens are gone" in answer.text.splitlines()[0]
                assert '"type":"server_error"' in answer.text
                assert "[DONE]" not in answer.text
            else:
                error = error_of(answer, answer.status_code)
                assert answer.status_code in (500, 503)
                assert "the tokens are gone" in error["message"]
        error_of(served.http.get("/health"), 503)
        error_of(served.post(COMPLETIONS, prompt="a"), 503)
        assert served.http.get("/metrics").status_code == 200
        for request in list(served.engine.scheduler.running):
            request.note_planned(request.num_computed)
            served.engine.scheduler.cancel(request)


def _broken(plan):
    raise WorkerError("the tokens are gone")


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host", ""),
        ("port", -1),
        ("port", 65536),
        ("api_key", ""),
        ("api_key", " \n"),
        ("api_key", "schlüssel"),
        ("max_queued_requests", 0),
        ("max_model_len", 0),
        ("served_model_name", " "),
        ("max_body_bytes", 0),
        ("keep_alive_s", 0),
        ("keep_alive_s", float("nan")),
        ("idle_timeout_s", 0),
        ("root_path", "llm"),
        ("root_path", "/llm/"),
        ("uds", ""),
        ("uds", "x" * 200),
        ("ssl_certfile", "./no-such-file"),
        ("ssl_keyfile", "./no-such-file"),
        ("allowed_origins", ("a.example",)),
        ("allowed_origins", ("https://a.example/path",)),
        ("unknown_fields", "ignore"),
        ("log_format", "xml"),
        ("otlp_endpoint", "localhost:4318"),
        ("otlp_endpoint", "http://"),
        ("otlp_endpoint", "http://host:4318/v1?key=1"),
        ("tool_call_parser", "x"),
        ("reasoning_parser", "x"),
    ],
)
def test_rejects_illegal_options_of_the_server(field, value):
    with pytest.raises(ConfigError, match=f"{field}: got .*, legal is "):
        ServerConfig(**{field: value})


def test_a_key_from_a_file_may_end_with_a_line_break():
    assert ServerConfig(api_key=" s3cret\n").api_key == "s3cret"


def test_every_option_of_the_command_arrives(longspan, monkeypatch):
    seen = {}

    def run(engine_config, config, launcher):
        seen.update(engine=engine_config, server=config, launcher=launcher)
        return 0

    monkeypatch.setattr("longspan.server.run.serve", run)
    monkeypatch.setattr("longspan.cli.serve.listen", lambda config: [])
    monkeypatch.setattr("longspan.cli.serve.check_early", lambda model, overrides: None)
    options = (
        "--host=0.0.0.0 --port=99 --api-key=k --served-model-name=m --max-model-len=50 --max-queued-requests=7 "
        "--max-num-seqs=5 --max-step-ms=40 --no-enable-prefix-caching --max-body-size=1Ki --keep-alive-s=2 "
        "--context-parallel-size=3 --kv-cache-memory=2MiB --placement=packed --executor=threads --access-log "
        "--allowed-origins=https://a.example --allowed-origins=* --idle-timeout-s=9 --root-path=/llm --log-format=json "
        "--unknown-fields=warn --clamp-max-tokens --tool-call-parser=hermes --reasoning-parser=none --chat-template=x "
        "--otlp-endpoint=http://localhost:4318"
    )
    assert longspan("serve", "some/model", *options.split()).code == 0
    assert seen["launcher"] is None  # threads: there is nothing to start early
    assert seen["server"] == ServerConfig(
        host="0.0.0.0",
        port=99,
        api_key="k",
        served_model_name="m",
        max_model_len=50,
        max_queued_requests=7,
        max_body_bytes=1024,
        keep_alive_s=2.0,
        access_log=True,
        allowed_origins=("https://a.example", "*"),
        idle_timeout_s=9.0,
        root_path="/llm",
        log_format="json",
        unknown_fields="warn",
        clamp_max_tokens=True,
        tool_call_parser="hermes",
        reasoning_parser="none",
        chat_template="x",
        otlp_endpoint="http://localhost:4318/v1/traces",
    )
    engine = seen["engine"]
    assert (engine.model, engine.max_num_seqs, engine.max_step_ms) == ("some/model", 5, 40)
    assert (engine.enable_prefix_caching, engine.context_parallel_size) == (False, 3)
    assert (engine.kv_cache_memory, engine.placement, engine.executor) == (2**21, "packed", "threads")
    monkeypatch.setenv("LONGSPAN_API_KEY", "from the environment")
    assert longspan("serve", "recall").code == 0
    assert seen["server"] == ServerConfig(api_key="from the environment")


def test_a_port_in_use_is_said_before_anything_is_loaded(longspan):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        outcome = longspan("serve", "./no-such-model", "--port", str(port))
    assert outcome.code == 2
    assert outcome.err.startswith(f"longspan: --port: got {port} on 127.0.0.1, legal is one that is free there")


def test_rejects_a_host_that_is_not_here(longspan):
    for host in ("no.such.host.invalid", "192.0.2.1", "a" * 70 + ".b"):
        outcome = longspan("serve", "recall", "--port", "0", "--host", host)
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        assert "legal is" in outcome.err


def test_rejects_a_longer_limit_than_the_model_has(longspan):
    arguments = ("--port", "0", "--executor", "threads", "--max-model-len", "4000")
    outcome = longspan("serve", served_model().path, *arguments)
    assert outcome.code == 2
    assert "--max-model-len: got 4000, legal is at most 2048" in outcome.err
