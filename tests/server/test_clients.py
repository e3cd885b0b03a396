"""What real clients, proxies and load scripts send is served, or refused with its whole name."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
import time

import httpx
import pytest
from serving import error_of, reasons, served_model, serving, texts
from test_server import CHAT, COMPLETIONS, MESSAGES, PROMPT, RENDERED, alone

from longspan.errors import ConfigError
from longspan.llm import LLM
from longspan.models.detokenizer import with_special_stops
from longspan.models.loader import load_tokenizer
from longspan.server.config import ServerConfig
from longspan.server.listener import close, listen, url_of
from longspan.server.tokenizers import TokenizerPool
from longspan.types import SamplingParams


@pytest.fixture(scope="module")
def server(cache_home):
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def llm(cache_home):
    with LLM(served_model().path, executor="threads", threads_per_rank=1, kv_cache_memory="32Mi") as one:
        yield one


def tokens_of(server, **body):
    return bytes(token for token in server.ok("/tokenize", **body)["tokens"] if token < 256)


# -- what SDKs feed back -----------------------------------------------------------------------------------------------


def test_nulls_and_marks_that_sdks_send_back_are_taken(server):
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    history = [
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": [], "audio": None},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "2"}]},
        {"role": "assistant", "reasoning_content": None, "function_call": None},
        {"role": "assistant", "content": "Two.", "reasoning_content": "I add.", "tool_calls": None},
    ]
    rendered = tokens_of(server, messages=history).decode()
    assert rendered == (
        '[user]Hi\n[assistant]<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        "[user]<tool_response>\n2\n</tool_response>\n[assistant]\n[assistant]Two.\n[assistant]"
    )
    server.ok(CHAT, messages=history, max_tokens=2)


def test_fields_of_load_scripts_are_taken_where_they_ask_for_nothing(server):
    fields = {"temperature": 0, "max_tokens": 4}
    more = {
        "best_of": 1,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "priority": 0,
        "length_penalty": 1.0,
        "use_beam_search": False,
        "structured_outputs": None,
        "guided_json": None,
        "truncate_prompt_tokens": None,
    }
    plain = server.ok(COMPLETIONS, prompt=PROMPT, **fields)["choices"]
    assert server.ok(COMPLETIONS, prompt=PROMPT, add_special_tokens=True, **fields, **more)["choices"] == plain
    plain = server.ok(CHAT, messages=MESSAGES, **fields)["choices"]
    of_chat = {"add_generation_prompt": True, "continue_final_message": False, "reasoning_effort": "none"}
    assert server.ok(CHAT, messages=MESSAGES, **fields, **more, **of_chat)["choices"] == plain


def test_bodies_may_begin_with_a_mark_of_their_byte_order(server):
    content = b"\xef\xbb\xbf" + json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    for body in (content, content + b" " * 70_000):
        answer = server.http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("padding", [0, 70_000])
def test_all_unknown_fields_are_named(server, padding):
    body = {"prompt": "a", "foo": 1, "bar": {"a": [1]}, "max_tokens": 2}
    content = json.dumps(body) + " " * padding
    answer = server.http.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    error = error_of(answer, 400)
    assert "foo" in error["message"]
    assert "bar" in error["message"]
    message = {"role": "user", "content": [{"type": "text", "text": "a", "x": 1}], "y": 2}
    assert server.refused(CHAT, messages=[message])["message"].startswith("messages.0.content.0.x, messages.0.y: ")
    many = {f"field{i}": 1 for i in range(30)}
    assert "and 10 more" in server.refused(COMPLETIONS, prompt="a", **many)["message"]


def test_unknown_fields_may_be_dropped_and_are_told_once(cache_home, capfd):
    with serving(config=ServerConfig(unknown_fields="warn")) as server:
        plain = server.ok(COMPLETIONS, prompt=PROMPT, temperature=0)["choices"]
        for _ in range(2):
            assert server.ok(COMPLETIONS, prompt=PROMPT, temperature=0, foo=1, bar=2)["choices"] == plain
        content = json.dumps({"prompt": PROMPT, "temperature": 0, "baz": 1}) + " " * 70_000
        answer = server.http.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
        assert answer.json()["choices"] == plain
        message = {"role": "user", "content": [{"type": "text", "text": "a", "x": 1}], "y": 2}
        server.ok(CHAT, messages=[message], max_tokens=1)
        assert server.refused(COMPLETIONS, prompt="a", suffix="x", foo=1)["param"] == "suffix"
    told = capfd.readouterr().err
    for name in ("foo", "bar", "baz", "messages.0.content.0.x", "messages.0.y"):
        assert told.count(f"the unknown field '{name}' of a request was dropped") == 1


# -- fields ------------------------------------------------------------------------------------------------------------


def test_a_stop_string_that_is_a_special_token_ends_there(server, llm):
    fields = {"temperature": 0, "logit_bias": {"258": 100}, "max_tokens": 5}  # the padding token
    name = load_tokenizer(served_model().path).convert_ids_to_tokens(258)
    answer = server.ok(COMPLETIONS, prompt="a", stop=[name, "never"], **fields)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 1
    answer = server.ok(COMPLETIONS, prompt="a", stop=name, skip_special_tokens=False, **fields)
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("", 1)
    output = alone(llm, "a", stop=name, logit_bias={258: 100}, max_tokens=5).outputs[0]
    assert (output.finish_reason, len(output.token_ids)) == ("stop", 1)
    params = SamplingParams(stop="plain")
    assert with_special_stops(llm.tokenizer, params) is params


def test_special_tokens_are_told_if_asked_for(server):
    fields = {"temperature": 0, "logit_bias": {"258": 100}, "max_tokens": 3}
    name = load_tokenizer(served_model().path).convert_ids_to_tokens(258)
    assert texts([server.ok(COMPLETIONS, prompt="a", **fields)]) == [""]
    assert texts([server.ok(COMPLETIONS, prompt="a", skip_special_tokens=False, **fields)]) == [name * 3]
    ends = {"temperature": 0, "logit_bias": {"257": 100}, "max_tokens": 3, "skip_special_tokens": False}
    assert texts([server.ok(COMPLETIONS, prompt="a", **ends)]) == [""]  # the end token is no text in any case


def test_the_stop_string_may_stay_in_the_text(server, llm):
    whole = alone(llm, max_tokens=60).outputs[0].text
    at = next(i for i in range(8, 40) if "\ufffd" not in whole[i : i + 4] and whole.find(whole[i : i + 4]) == i)
    fields = {"prompt": PROMPT, "temperature": 0, "max_tokens": 60, "stop": whole[at : at + 4]}
    answer = server.ok(COMPLETIONS, include_stop_str_in_output=True, **fields)
    assert texts([answer]) == [whole[: at + 4]]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert texts(server.stream(COMPLETIONS, include_stop_str_in_output=True, **fields)) == [whole[: at + 4]]
    byte = {"temperature": 0, "max_tokens": 4, "logit_bias": {"65": 100}, "stop_token_ids": [65]}
    assert texts([server.ok(COMPLETIONS, prompt="a", include_stop_str_in_output=True, **byte)]) == ["A"]


def test_prompts_are_cut_at_their_front(server, llm):
    expected = alone(llm, [*PROMPT.encode()[-7:]], max_tokens=6).outputs[0].text
    fields = {"temperature": 0, "max_tokens": 6, "truncate_prompt_tokens": 7}
    answer = server.ok(COMPLETIONS, prompt=PROMPT, **fields)
    assert (texts([answer]), answer["usage"]["prompt_tokens"]) == ([expected], 7)
    assert texts([server.ok(COMPLETIONS, prompt=[*PROMPT.encode()], **fields)]) == [expected]
    assert texts([server.ok(COMPLETIONS, prompt=PROMPT, echo=True, **fields)]) == [
        PROMPT.encode()[-7:].decode() + expected
    ]
    assert server.ok(CHAT, messages=MESSAGES, **fields)["usage"]["prompt_tokens"] == 7


def test_special_tokens_are_added_where_asked_for(server):
    def count(path, **body):
        return server.ok(path, max_tokens=1, **body)["usage"]["prompt_tokens"]

    assert count(COMPLETIONS, prompt="abc", add_special_tokens=False) == count(COMPLETIONS, prompt="abc") - 1 == 3
    assert count(CHAT, messages=MESSAGES, add_special_tokens=True) == count(CHAT, messages=MESSAGES) + 1


def test_true_asks_completions_for_one_logprob(server):
    fields = {"prompt": PROMPT, "temperature": 0, "max_tokens": 3}
    as_true, as_one = (server.ok(COMPLETIONS, logprobs=asked, **fields)["choices"][0] for asked in (True, 1))
    found, expected = as_true["logprobs"], as_one["logprobs"]
    assert (as_true["text"], found["tokens"]) == (as_one["text"], expected["tokens"])
    assert [*map(len, found["top_logprobs"])] == [1, 1, 1]
    # The second request finds the first one's prompt: its steps have other shapes, and round otherwise.
    assert found["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-5)
    assert server.ok(COMPLETIONS, logprobs=False, **fields)["choices"][0]["logprobs"] is None


def test_prompt_logprobs_have_vllms_shape(server, llm):
    expected = alone(llm, max_tokens=2, prompt_logprobs=2).prompt_logprobs[1:]
    fields = {"temperature": 0, "max_tokens": 2, "prompt_logprobs": 2}
    (choice,) = server.ok(COMPLETIONS, prompt=PROMPT, **fields)["choices"]
    assert choice["prompt_logprobs"][0] is None
    for found, one in zip(choice["prompt_logprobs"][1:], expected, strict=True):
        assert found[str(one.token_id)]["logprob"] == pytest.approx(one.logprob, abs=1e-4)
        assert found[str(one.token_id)]["rank"] == one.rank
        assert {str(token_id) for token_id, _ in one.top} <= set(found)
    chat = server.ok(CHAT, messages=MESSAGES, **fields)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    chunks = server.stream(COMPLETIONS, prompt=PROMPT, **fields)
    assert chunks[0]["choices"][0]["prompt_logprobs"] == choice["prompt_logprobs"]


def test_token_ids_are_told_if_asked_for(server, llm):
    expected = alone(llm, max_tokens=9).outputs[0].token_ids
    fields = {"prompt": PROMPT, "temperature": 0, "max_tokens": 9, "return_token_ids": True}
    (choice,) = server.ok(COMPLETIONS, **fields)["choices"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == (expected, [256, *PROMPT.encode()])
    streamed = [one for chunk in server.stream(COMPLETIONS, **fields) for one in chunk["choices"]]
    assert [token_id for one in streamed for token_id in one["token_ids"]] == expected
    chat = {"messages": MESSAGES, "temperature": 0, "max_tokens": 9, "return_token_ids": True}
    whole = server.ok(CHAT, **chat)
    assert bytes(whole["prompt_token_ids"]).decode() == RENDERED
    streamed = [one for chunk in server.stream(CHAT, **chat) for one in chunk["choices"]]
    assert [token_id for one in streamed for token_id in one.get("token_ids", [])] == whole["choices"][0]["token_ids"]
    assert streamed[0]["prompt_token_ids"] == whole["prompt_token_ids"]


def test_usage_may_come_with_every_chunk(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = server.stream(COMPLETIONS, prompt=PROMPT, temperature=0, max_tokens=5, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[-1], chunks[-1]["choices"]) == (5, [])


def test_a_message_may_be_continued(server, llm):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, I"}]
    expected = alone(llm, [*b"[user]Hi\n[assistant]Well, I"], max_tokens=6).outputs[0].text
    more = {"continue_final_message": True, "add_generation_prompt": False}
    answer = server.ok(CHAT, messages=messages, temperature=0, max_tokens=6, **more)
    assert answer["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize(
    ("fields", "legal"),
    [
        ({"structured_outputs": {"choice": ["red", 'a "b"']}}, ["red", 'a "b"']),
        ({"guided_choice": ["green"]}, ["green"]),
        ({"guided_regex": "a/b|cd"}, ["a/b", "cd"]),
        ({"structured_outputs": {"grammar": 'start: "x" "y"'}}, ["xy"]),
        ({"guided_json": {"enum": [17]}}, ["17"]),
        ({"structured_outputs": {"json": '{"enum": [18]}'}}, ["18"]),
    ],
)
def test_vllms_words_for_structured_output_are_honoured(server, fields, legal):
    (choice,) = server.ok(COMPLETIONS, prompt=PROMPT, temperature=2.0, seed=1, max_tokens=40, **fields)["choices"]
    assert (choice["text"].strip() in legal, choice["finish_reason"]) == (True, "stop")


def test_the_default_length_is_what_fits(cache_home, server):
    assert server.ok(COMPLETIONS, prompt="x" * 2040, ignore_eos=True)["usage"]["total_tokens"] == 2048
    server.refused(COMPLETIONS, prompt="x" * 2040, max_tokens=16)
    with serving(config=ServerConfig(clamp_max_tokens=True, max_model_len=50)) as clamping:
        usage = clamping.ok(COMPLETIONS, prompt="x" * 39, max_tokens=32_000, ignore_eos=True)["usage"]
        assert usage["total_tokens"] == 50
        usage = clamping.ok(CHAT, messages=MESSAGES, max_tokens=32_000, ignore_eos=True)["usage"]
        assert usage["total_tokens"] == 50
        clamping.refused(COMPLETIONS, prompt="x" * 60, max_tokens=5)


def test_python_clamps_its_defaults(llm):
    assert len(llm.generate("x" * 2040)[0].outputs[0].token_ids) <= 7
    with pytest.raises(ConfigError, match="legal is at most 2048"):
        llm.generate("x" * 2040, SamplingParams(max_tokens=16))
    clamped = llm.generate("x" * 2040, SamplingParams(max_tokens=16, ignore_eos=True), clamps_max_tokens=True)
    assert len(clamped[0].outputs[0].token_ids) == 7


def test_a_priority_arrives(server, monkeypatch):
    seen = []
    add = server.engine.scheduler.add_request
    monkeypatch.setattr(
        server.engine.scheduler, "add_request", lambda *a, **k: seen.append(a[1].priority) or add(*a, **k)
    )
    server.ok(COMPLETIONS, prompt="a", max_tokens=1, priority=-3)
    assert seen == [-3]


# -- where servers live ------------------------------------------------------------------------------------------------


def test_browsers_may_ask_from_allowed_origins_only(cache_home):
    config = ServerConfig(api_key="k", allowed_origins=("https://a.example",))
    with serving(config=config) as served:
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = served.http.options("/v1/models", headers={"Origin": "https://a.example", **ask})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        other = served.http.options("/v1/models", headers={"Origin": "https://b.example", **ask})
        assert "access-control-allow-origin" not in other.headers
        refused = served.http.get("/v1/models", headers={"Origin": "https://a.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")


def test_health_may_be_asked_without_a_body(server):
    answer = server.http.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_proxy_may_serve_under_a_path(cache_home):
    with serving(config=ServerConfig(root_path="/llm", api_key="k")) as served:
        assert served.http.get("/llm/health").status_code == 200
        assert served.http.get("/health").status_code == 200
        assert served.http.get("/llm/v1/models").status_code == 401
        assert served.http.get("/llm/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200
        assert served.http.get("/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200


def test_every_request_leaves_a_line_if_asked_for(cache_home, capfd):
    with serving(config=ServerConfig(access_log=True, log_format="json")) as served:
        served.http.post(
            COMPLETIONS, json={"prompt": "abc", "max_tokens": 3, "ignore_eos": True}, headers={"X-Request-Id": "mine-1"}
        )
        served.stream(CHAT, messages=MESSAGES, max_tokens=2, ignore_eos=True)
        assert served.refused(COMPLETIONS, prompt="a", n=0)["param"] == "n"
        answer = served.http.get("/nothing%0Ax", headers={"X-Request-Id": "bad id"})
        assert len(answer.headers["x-request-id"]) == 32
    found = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert len(found) == 4
    first, third, second, fourth = sorted(found, key=lambda line: (line["path"] != COMPLETIONS, line["status"]))
    assert (first["id"], first["method"], first["path"], first["status"]) == ("mine-1", "POST", COMPLETIONS, 200)
    assert (first["prompt_tokens"], first["generated_tokens"], first["reason"]) == (4, 3, "length")
    assert 0 < first["first_token_ms"] <= first["ms"]
    assert (second["generated_tokens"], second["cached_tokens"]) == (2, 0)
    assert (third["status"], third["prompt_tokens"]) == (400, None)
    assert (fourth["status"], fourth["path"]) == (404, "/nothing\nx")
    with serving(config=ServerConfig(access_log=True)) as served:
        answer = served.http.post(COMPLETIONS, json={"prompt": "abc", "max_tokens": 3})
        assert answer.headers["x-request-id"]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("longspan: time=")]
    assert len(lines) == 1
    assert f"id={answer.headers['x-request-id']}" in lines[0]
    assert "prompt_tokens=4" in lines[0]


def test_requests_have_ids_without_a_log(server):
    answer = server.http.get("/health", headers={"X-Request-Id": "a1"})
    assert answer.headers["x-request-id"] == "a1"
    assert server.ok(COMPLETIONS, prompt="a", max_tokens=1, request_id="mine")["id"] == "cmpl-mine"


def test_a_host_name_is_served_on_all_its_addresses():
    listeners = listen(ServerConfig(host="localhost", port=0))
    try:
        ports = {listener.getsockname()[1] for listener in listeners}
        assert len(ports) == 1
        with socket.create_connection(("127.0.0.1", *ports)):
            assert url_of(listeners[0], "http").endswith(str(*ports))
    finally:
        close(listeners, None)


def test_a_unix_socket_is_opened_and_a_left_one_replaced(tmp_path):
    path = tmp_path / "s"
    config = ServerConfig(uds=str(path))
    (first,) = listen(config)
    with pytest.raises(ConfigError, match=r"uds: got .*, legal is a path where a socket can be made: Address already"):
        listen(config)
    first.close()  # as a server that was killed
    (second,) = listen(config)
    assert url_of(second, "http") == f"unix:{path}"
    close([second], config.uds)
    assert not path.exists()
    path.write_text("a file")
    with pytest.raises(ConfigError, match="uds: got"):
        listen(config)
    assert path.read_text() == "a file"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    path = tmp_path_factory.mktemp("tls")
    names = [str(path / name) for name in ("cert.pem", "key.pem")]
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    try:
        subprocess.run([*command.split(), "-out", names[0], "-keyout", names[1]], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl to make a certificate with")
    return names


def test_certificates_are_checked_before_anything_is_loaded(certificate, tmp_path):
    cert, key = certificate
    assert ServerConfig(ssl_certfile=cert, ssl_keyfile=key).ssl_certfile == cert
    with pytest.raises(ConfigError, match="ssl_keyfile: got none"):
        ServerConfig(ssl_certfile=cert)
    broken = tmp_path / "broken.pem"
    broken.write_text("nothing")
    with pytest.raises(ConfigError, match=r"ssl_certfile: got .*, legal is a PEM certificate and its key"):
        ServerConfig(ssl_certfile=str(broken), ssl_keyfile=key)


def test_https_is_served(cache_home, certificate):
    cert, key = certificate
    with serving(config=ServerConfig(ssl_certfile=cert, ssl_keyfile=key)) as served:
        assert served.url.startswith("https://")
        assert texts(served.stream(COMPLETIONS, prompt="a", max_tokens=3, temperature=0))


def test_idle_connections_outlive_those_of_proxies(cache_home):
    assert ServerConfig().idle_timeout_s == 75
    with serving(config=ServerConfig(idle_timeout_s=0.4)) as served:
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            for _ in range(2):
                client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b""
                while b"ok" not in answer:
                    answer += client.recv(10_000)
                assert b" 200 " in answer
                time.sleep(0.15)
            assert client.recv(100) == b""  # the server closes it, when it has been idle for so long


def test_a_model_that_is_not_there_is_refused_before_large_imports(longspan, monkeypatch, tmp_path):
    def fail(config):
        raise AssertionError("too late")

    monkeypatch.setattr("longspan.engine.processes.early_ranks", fail)
    monkeypatch.setattr("longspan.llm.early_ranks", fail)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    for command in (("serve", "--port", "0"), ("generate", "--prompt", "a")):
        outcome = longspan(*command, "./no-such-model")
        assert (outcome.code, "model: got './no-such-model', legal is" in outcome.err) == (2, True)
        outcome = longspan(*command, str(tmp_path))
        assert outcome.code == 2
        assert "model_type: got 'mamba', proven is" in outcome.err


def test_a_text_waits_for_none_that_is_much_longer(server):
    """Three threads stand still with very long texts; a long one and a short one are done meanwhile."""
    pool, go = TokenizerPool(load_tokenizer(served_model().path)), threading.Event()

    async def ask():
        blocked = [asyncio.ensure_future(pool.run(lambda _: go.wait(20), 1_000_000)) for _ in range(3)]
        found = [await asyncio.wait_for(pool.run(lambda _, n=n: n, n), 10) for n in (60_000, 100)]
        go.set()
        return found, await asyncio.gather(*blocked)

    try:
        assert asyncio.run(ask()) == ([60_000, 100], [True] * 3)
    finally:
        pool.close()


def test_a_server_starts_and_ends_on_a_unix_socket(longspan, monkeypatch, tmp_path):
    said, path = [], tmp_path / "s"

    def say(text):
        said.append(text)
        if text.startswith("ready at"):
            transport = httpx.HTTPTransport(uds=str(path))

            def ask():
                with httpx.Client(transport=transport, base_url="http://x", timeout=30) as client:
                    said.append(client.get("/v1/models").status_code)
                os.kill(os.getpid(), signal.SIGTERM)

            threading.Thread(target=ask).start()

    monkeypatch.setattr("longspan.server.run._say", say)
    options = ("--executor", "threads", "--kv-cache-memory", "32Mi", "--uds", str(path), "--access-log")
    outcome = longspan("serve", served_model().path, *options)
    assert outcome.code == 0, outcome.err
    assert said[-3:-1] == ["parsers: tool calls hermes, reasoning none", f"ready at unix:{path}"]
    assert said[-1] == 200
    assert "method=GET path=/v1/models status=200" in outcome.err
    assert not path.exists()


def test_stream_reasons_stay(server):
    assert reasons(server.stream(COMPLETIONS, prompt="a", max_tokens=2, ignore_eos=True)) == ["length"]
