"""Tools, thoughts, the Responses API and Anthropic's: one generation, three shapes, in one piece and in a stream."""

import asyncio
import json
import random
from types import SimpleNamespace

import httpx
import pytest
from serving import error_of, served_model, serving
from test_server import CHAT, COMPLETIONS, MESSAGES, RENDERED, alone

from longspan.errors import ConfigError
from longspan.llm import LLM
from longspan.models.grammar import make_grammars
from longspan.models.loader import load_tokenizer
from longspan.models.recall_tokenizer import EOS_ID, VOCAB_SIZE
from longspan.server.config import ServerConfig
from longspan.server.grammars import AfterThoughts, InCalls
from longspan.server.messages import Message
from longspan.server.parsing.base import CallArguments, CallStart, Text, Thought
from longspan.server.parsing.formats import CALL_FORMATS
from longspan.server.parsing.grammar import calls_grammar, strict_calls
from longspan.server.parsing.select import choose_parsers
from longspan.server.response_store import ResponseStore
from longspan.server.templates import use_template_

RESPONSES, ANTHROPIC = "/v1/responses", "/v1/messages"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "stop"}},
]
DRAW = {"temperature": 1.5, "seed": 2, "max_tokens": 600}


@pytest.fixture(scope="module")
def server(cache_home):
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def llm(cache_home):
    with LLM(served_model().path, executor="threads", threads_per_rank=1, kv_cache_memory=2**25) as one:
        yield one


def check_call(name, arguments):
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert name in ("weather", "stop")
    if name == "weather":
        assert arguments["city"] in ("Oslo", "Rome")
        assert 1 <= arguments["days"] <= 9
    else:
        assert arguments == {}


# -- tools in the chat API ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_follow_their_schemas(server, parallel):
    fields = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": parallel, **DRAW}
    (choice,) = server.ok(CHAT, **fields)["choices"]
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == (None, "tool_calls")
    calls = message["tool_calls"]
    assert len(calls) == 1 or parallel
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        assert call["type"] == "function"
        check_call(**call["function"])
    chunks = server.stream(CHAT, **fields)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    streamed = {}
    for delta in deltas:
        for part in delta.get("tool_calls", ()):
            one = streamed.setdefault(part["index"], {"name": "", "arguments": ""})
            one["name"] += part["function"].get("name", "")
            one["arguments"] += part["function"]["arguments"]
    assert list(streamed.values()) == [call["function"] for call in calls]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert len(deltas) > 2 + 2 * len(calls)  # arguments come in pieces


def test_a_named_call_is_made(server):
    named = {"type": "function", "function": {"name": "stop"}}
    (choice,) = server.ok(CHAT, messages=MESSAGES, tools=TOOLS, tool_choice=named, **DRAW)["choices"]
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [{"name": "stop", "arguments": "{}"}]


def test_offered_tools_are_in_the_prompt_and_may_stay_unused(server):
    fields = {"messages": MESSAGES, "temperature": 0, "max_tokens": 5}
    plain = server.ok(CHAT, **fields)
    none = server.ok(CHAT, tools=TOOLS, tool_choice="none", **fields)
    assert none["choices"] == plain["choices"]
    auto = server.ok(CHAT, tools=TOOLS, **fields)
    assert auto["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 300
    assert auto["choices"][0]["finish_reason"] == "length"
    rendered = bytes(server.ok("/tokenize", messages=MESSAGES, tools=TOOLS)["tokens"]).decode()
    assert rendered.startswith("[system]Be brief.\n\n# Tools")
    assert '"name": "weather"' in rendered


def test_rejects_tools_whose_schema_cannot_be_followed(server):
    for schema in ({"type": "nothing"}, {"not": {}}, {"x-guidance": {}}):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        error = server.refused(CHAT, messages=MESSAGES, tools=[tool], tool_choice="required")
        assert error["param"] == "tools"


@pytest.mark.parametrize("name", CALL_FORMATS)
def test_a_forced_call_is_one_in_every_format(name):
    """What a grammar allows, its parser reads: drawn evenly from the allowed tokens, by a vocabulary of bytes."""
    tokenizer = load_tokenizer("recall")
    grammars = make_grammars(tokenizer, VOCAB_SIZE, [EOS_ID])
    schemas = {"weather": PARAMETERS, "stop": {"type": "object", "properties": {}, "additionalProperties": False}}
    text = calls_grammar(name, schemas, {}, parallel=True)
    for seed in range(5):
        constraint, generator, output = grammars.compile_grammar(text), random.Random(seed), bytearray()
        while True:
            mask = constraint.allowed()
            allowed = [i for i in range(VOCAB_SIZE) if mask[i // 8] >> i % 8 & 1]
            token_id = generator.choice(allowed) if len(output) < 400 or EOS_ID not in allowed else EOS_ID
            if token_id == EOS_ID:
                break
            output.append(token_id)
            constraint.accept(token_id)
        parser = choose_parsers(name, "none", "").make(schemas, "")
        pieces = [*parser.feed(output.decode()), *parser.finish()]
        calls = []
        for piece in pieces:
            if hasattr(piece, "name"):
                calls.append([piece.name, ""])
            else:
                calls[-1][1] += piece.text
        assert calls
        for call in calls:
            check_call(*call)


def test_marks_that_are_tokens_are_forced_as_tokens():
    found = calls_grammar("hermes", {"f": {}}, {"<tool_call>": 7, "</tool_call>": 8}, parallel=False)
    assert found.splitlines()[0] == "start: call"
    assert 'call0: <[7]> "\\n{\\"name\\": \\"f\\", \\"arguments\\": " arguments0 "}\\n" <[8]>' in found


# -- thoughts ----------------------------------------------------------------------------------------------------------


def spelled(text, max_tokens=None):
    """A `logit_bias`-free way to make a model write a text: a grammar with nothing else in it."""
    return {"structured_outputs": {"grammar": f"start: {json.dumps(text)}"}, "max_tokens": max_tokens or 200}


@pytest.fixture(scope="module")
def thinking(cache_home):
    with serving(config=ServerConfig(reasoning_parser="think")) as served:
        yield served


def test_thoughts_have_a_field_of_their_own(thinking):
    fields = {"messages": MESSAGES, **spelled("<think>\nI see.\n</think>\n\nYes.")}
    answer = thinking.ok(CHAT, **fields)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == ("I see.", "I see.", "Yes.")
    num_thought = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert len("<think>\nI see.") <= num_thought < answer["usage"]["completion_tokens"] - len("Yes")
    deltas = [one["delta"] for chunk in thinking.stream(CHAT, **fields) for one in chunk["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "I see."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Yes."
    hidden = thinking.ok(CHAT, **fields, include_reasoning=False)["choices"][0]["message"]
    assert hidden == {"role": "assistant", "content": "Yes.", "refusal": None}
    raw = thinking.ok(COMPLETIONS, prompt="a", **spelled("<think>a</think>b"))
    assert raw["choices"][0]["text"] == "<think>a</think>b"


def test_a_form_counts_behind_the_thoughts():
    class Inner:
        accepted = ()

        def allowed(self):
            return bytes([0b10, 0])

        def accept(self, token_id):
            self.accepted = (*self.accepted, token_id)

    inner = Inner()
    one = AfterThoughts(inner, 9, 3, is_inside=False)
    assert one.allowed() == bytes([0b10, 0b10])  # thoughts may begin, or the answer
    one.accept(9)
    assert one.allowed() is None
    one.accept(5)
    one.accept(3)
    assert (one.allowed(), inner.accepted) == (bytes([0b10, 0]), ())
    one.accept(1)
    assert inner.accepted == (1,)
    one = AfterThoughts(Inner(), 9, 3, is_inside=True)
    assert one.allowed() is None
    one = AfterThoughts(inner, 9, 3, is_inside=False)
    one.accept(1)
    assert one.allowed() == bytes([0b10, 0])


# -- the Responses API -------------------------------------------------------------------------------------------------


def events_of(server, path, **body):
    with server.http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line for line in answer.iter_lines() if line and not line.startswith(":")]
    names, datas = lines[::2], lines[1::2]
    found = [json.loads(line.removeprefix("data: ")) for line in datas]
    assert names == [f"event: {one['type']}" for one in found]
    return found


def test_responses_answer_text_and_items(server, llm):
    expected = alone(llm, [*RENDERED.encode()], max_tokens=9).outputs[0].text
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hi!"}]}]
    body = {"instructions": "Be brief.", "temperature": 0, "max_output_tokens": 9}
    for given in ("Hi!", items):
        found = server.ok(RESPONSES, input=given, **body)
        assert (found["object"], found["status"]) == ("response", "incomplete")
        assert found["incomplete_details"] == {"reason": "max_output_tokens"}
        (item,) = found["output"]
        assert item["content"] == [{"type": "output_text", "text": expected, "annotations": [], "logprobs": []}]
        assert found["usage"]["input_tokens"] == len(RENDERED)
        assert found["usage"]["output_tokens"] == 9
    events = events_of(server, RESPONSES, input="Hi!", **body)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert "".join(event["delta"] for event in events if event["type"].endswith("text.delta")) == expected
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == expected


def test_responses_go_on_from_a_stored_one(server, llm):
    first = server.ok(RESPONSES, input="Hi!", temperature=0, max_output_tokens=5)
    said = first["output"][0]["content"][0]["text"]
    prompt = f"[user]Hi!\n[assistant]{said}\n[user]And?\n[assistant]"
    second = server.ok(RESPONSES, input="And?", previous_response_id=first["id"], max_output_tokens=1, store=False)
    assert second["usage"]["input_tokens"] == len(prompt.encode())
    error = server.refused(RESPONSES, input="x", previous_response_id=second["id"])
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")


@pytest.mark.parametrize("stream", [False, True])
def test_stored_responses_are_found_until_they_are_deleted(server, stream):
    body = {"input": "Hi!", "temperature": 0, "max_output_tokens": 5, "metadata": {"a": "b"}}
    whole = events_of(server, RESPONSES, **body)[-1]["response"] if stream else server.ok(RESPONSES, **body)
    address = f"{RESPONSES}/{whole['id']}"
    for query in ("", "?stream=false&include[]=reasoning.encrypted_content"):
        answer = server.http.get(address + query)
        assert (answer.status_code, answer.json()) == (200, whole)
    error = error_of(server.http.get(address, params={"stream": "true"}), 400)
    assert (error["param"], error["message"]) == ("stream", "stream: got 'true', legal is 'false'")
    assert server.http.delete(address).json() == {"id": whole["id"], "object": "response", "deleted": True}
    for method in ("GET", "DELETE"):
        assert "response_id" in error_of(server.http.request(method, address), 404)["message"]
    assert server.refused(RESPONSES, input="x", previous_response_id=whole["id"])["param"] == "previous_response_id"


def test_responses_that_are_not_stored_are_not_found(server):
    whole = server.ok(RESPONSES, input="Hi!", max_output_tokens=1, store=False)
    error = error_of(server.http.get(f"{RESPONSES}/{whole['id']}"), 404)
    assert error["type"] == "invalid_request_error"
    error_of(server.http.delete("/v1/responses/resp_none"), 404)


def test_responses_call_functions(server):
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    body = {"input": "Hi!", "tools": tools, "tool_choice": "required", "temperature": 1.5, "max_output_tokens": 700}
    found = server.ok(RESPONSES, **body, parallel_tool_calls=False)
    (call,) = found["output"]
    assert call["type"] == "function_call"
    check_call(call["name"], call["arguments"])
    history = [
        {"role": "user", "content": "Hi!"},
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "fine"},
    ]
    server.ok(RESPONSES, input=history, tools=tools, max_output_tokens=2)
    events = events_of(server, RESPONSES, **body)
    pieces = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert "".join(pieces) == "".join(event["arguments"] for event in done)
    assert [item["name"] for item in events[-1]["response"]["output"]] == [event["name"] for event in done]


def test_responses_follow_a_form(server):
    form = {"type": "json_schema", "name": "x", "schema": {"enum": ["a", "b"]}}
    found = server.ok(RESPONSES, input="Hi!", text={"format": form}, temperature=1.5, max_output_tokens=50)
    assert json.loads(found["output"][0]["content"][0]["text"]) in ("a", "b")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "image"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "truncation": "auto"}, "truncation"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": "a", "tool_choice": "required"}, "tool_choice"),
        ({"input": "a", "max_output_tokens": 0}, "max_tokens"),
        ({"input": "a", "unknown": 1}, "unknown"),
    ],
)
def test_rejects_what_responses_cannot_be(server, body, param):
    assert server.refused(RESPONSES, **body)["param"] == param


def test_stored_conversations_take_bounded_memory():
    store = ResponseStore(max_chars=1000)
    message = Message(role="user", content="x" * 100)
    for i in range(5):
        store.put(str(i), [message])
    assert [store.messages(str(i)) is not None for i in range(5)] == [False, False, True, True, True]
    store.messages("2")
    store.put("5", [message])
    assert [store.messages(str(i)) is not None for i in range(6)] == [False, False, True, False, True, True]
    store.put("long", [Message(role="user", content="x" * 1000)])
    assert store.messages("long") is None
    assert store.messages("5") is not None
    assert (store.delete("5"), store.delete("5"), store.messages("5")) == (True, False, None)
    store.put("6", [message], b"x" * 300)  # an answer counts too, and what was deleted does not
    assert [store.messages(name) is not None for name in ("2", "4", "6")] == [False, True, True]
    assert store.answer("6") == b"x" * 300


# -- Anthropic's API ---------------------------------------------------------------------------------------------------


def test_messages_answer_in_blocks(server, llm):
    expected = alone(llm, [*RENDERED.encode()], max_tokens=9).outputs[0].text
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    body = {"system": system, "messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 9, "temperature": 0}
    found = server.ok(ANTHROPIC, **body)
    assert found["content"] == [{"type": "text", "text": expected}]
    assert (found["type"], found["role"], found["stop_reason"]) == ("message", "assistant", "max_tokens")
    usage = found["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(RENDERED)
    assert usage["output_tokens"] == 9
    events = events_of(server, ANTHROPIC, **body)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta") == expected
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    counted = server.ok(f"{ANTHROPIC}/count_tokens", **{name: body[name] for name in ("system", "messages")})
    assert counted == {"input_tokens": len(RENDERED)}


def test_messages_name_the_stop_sequence(server, llm):
    whole = alone(llm, [*RENDERED.encode()], max_tokens=60).outputs[0].text
    at = next(i for i in range(8, 40) if "\ufffd" not in whole[i : i + 4] and whole.find(whole[i : i + 4]) == i)
    stop = whole[at : at + 4]
    found = server.ok(
        ANTHROPIC,
        system="Be brief.",
        messages=[{"role": "user", "content": "Hi!"}],
        max_tokens=60,
        temperature=0,
        stop_sequences=["never", stop],
    )
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", stop)


def test_messages_call_tools_and_take_results(server):
    tools = [{"name": "weather", "input_schema": PARAMETERS}]
    body = {
        "messages": [{"role": "user", "content": "Hi!"}],
        "tools": tools,
        "max_tokens": 700,
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }
    found = server.ok(ANTHROPIC, **body)
    (block,) = found["content"]
    assert (block["type"], found["stop_reason"]) == ("tool_use", "tool_use")
    check_call(block["name"], block["input"])
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "wet"}]}
    history = [
        *body["messages"],
        {"role": "assistant", "content": [block]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    server.ok(ANTHROPIC, messages=history, tools=tools, max_tokens=2)
    events = events_of(server, ANTHROPIC, **body)
    arguments = "".join(event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta")
    start = next(event["content_block"] for event in events if event["type"] == "content_block_start")
    assert (start["type"], start["input"]) == ("tool_use", {})
    check_call(start["name"], arguments)


class Scripted:
    """A parser that finds the same in every output: thoughts, text and a call."""

    def __init__(self):
        self.left = [Thought("I "), Thought("see."), Text("Yes."), CallStart("stop"), CallArguments("{}")]

    def feed(self, _text):
        return [self.left.pop(0)] if self.left else []

    def finish(self):
        return self.left


def test_thoughts_text_and_calls_are_blocks_and_items(cache_home):
    with serving() as served:
        served.state.parsers = SimpleNamespace(
            calls="hermes",
            reasoning="think",
            call_format=CALL_FORMATS["hermes"],
            are_calls_special=False,
            are_thoughts_special=False,
            reads_forced=True,
            thought_marks=("<think>", "</think>"),
            make=lambda _schemas, _prompt, **_: Scripted(),
            begins_inside=lambda _prompt: False,
        )
        body = {"messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 9, "temperature": 0}
        *front, call = served.ok(ANTHROPIC, **body)["content"]
        assert front == [
            {"type": "thinking", "thinking": "I see.", "signature": ""},
            {"type": "text", "text": "Yes."},
        ]
        assert (call["type"], call["name"], call["input"]) == ("tool_use", "stop", {})
        events = events_of(served, ANTHROPIC, **body)
        kinds = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
        assert kinds == ["thinking_delta", "thinking_delta", "signature_delta", "text_delta", "input_json_delta"]
        starts = [event["index"] for event in events if event["type"] == "content_block_start"]
        assert starts == [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1, 2]
        items = served.ok(RESPONSES, input="Hi!", max_output_tokens=9)
        assert [item["type"] for item in items["output"]] == ["reasoning", "message", "function_call"]
        assert items["output"][0]["content"] == [{"type": "reasoning_text", "text": "I see."}]
        assert items["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
        events = events_of(served, RESPONSES, input="Hi!", max_output_tokens=9)
        done = [event["item"]["type"] for event in events if event["type"] == "response.output_item.done"]
        assert done == ["reasoning", "message", "function_call"]
        deltas = [event["delta"] for event in events if event["type"] == "response.reasoning_text.delta"]
        assert deltas == ["I ", "see."]
        second = served.ok(RESPONSES, input="So?", previous_response_id=items["id"], max_output_tokens=1)
        assert second["usage"]["input_tokens"] > items["usage"]["input_tokens"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": MESSAGES[1:]}, "max_tokens"),
        ({"messages": MESSAGES[1:], "max_tokens": 0}, "max_tokens"),
        ({"messages": MESSAGES, "max_tokens": 5}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 5}, "messages.0.content.0"),
        (
            {
                "messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}],
                "max_tokens": 5,
            },
            "messages.0.content",
        ),
        ({"messages": MESSAGES[1:], "max_tokens": 5, "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": MESSAGES[1:], "max_tokens": 5, "thinking": {"type": "enabled"}}, "reasoning_effort"),
        ({"messages": MESSAGES[1:], "max_tokens": 5, "unknown": 1}, "unknown"),
        ({"messages": MESSAGES[1:], "max_tokens": 5, "temperature": 1.5}, "temperature"),
    ],
)
def test_rejects_messages_in_anthropics_shape(server, body, said):
    answer = server.post(ANTHROPIC, **body)
    assert answer.status_code == 400, answer.text
    found = answer.json()
    assert (found["type"], found["error"]["type"]) == ("error", "invalid_request_error")
    assert found["error"]["message"].startswith(said)


def test_anthropics_key_and_errors(cache_home):
    with serving(config=ServerConfig(api_key="k")) as served:
        body = {"messages": MESSAGES[1:], "max_tokens": 2}
        answer = served.http.post(ANTHROPIC, json=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
        assert served.http.post(ANTHROPIC, json=body, headers={"x-api-key": "k"}).status_code == 200
        answer = served.http.post(ANTHROPIC, json={**body, "model": "gpt"}, headers={"x-api-key": "k"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
        error_of(served.http.post(CHAT, json={"messages": MESSAGES}, headers={"x-api-key": "wrong"}), 401)


def test_a_long_conversation_is_read_in_pieces(server):
    blocks = [{"type": "text", "text": "x" * 70_000}]
    answer = server.post(ANTHROPIC, system=blocks, messages=[{"role": "user", "content": blocks}], max_tokens=2)
    assert "legal is at most 2048" in answer.json()["error"]["message"]
    assert (
        "legal is at most 2048"
        in server.refused(RESPONSES, input=[{"role": "user", "content": "x" * 70_000}])["message"]
    )
    assert (
        server.refused(CHAT, messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 70_000}]}])["code"]
        == "context_length_exceeded"
    )


# -- templates ---------------------------------------------------------------------------------------------------------


def test_a_template_may_be_given(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages[0].content }}!")
    for given in (str(file), "{{ messages[0].content }}!"):
        tokenizer = load_tokenizer(served_model().path)
        use_template_(tokenizer, given)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"
    several = SimpleNamespace(
        chat_template={"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}, apply_chat_template=lambda *_, **__: ""
    )
    use_template_(several, "tool_use")
    assert several.chat_template == "{{ 2 }}"


@pytest.mark.parametrize("given", ["./no-such-file", "{% for %}", "{{ a | nofilter }}"])
def test_rejects_broken_templates_at_the_start(given):
    with pytest.raises(ConfigError, match=r"chat_template: got .*, legal is a"):
        use_template_(load_tokenizer(served_model().path), given)


def test_a_template_that_refuses_a_trial_is_no_broken_one():
    use_template_(load_tokenizer(served_model().path), "{{ raise_exception('system first') }}")


def test_a_second_bos_is_avoided(cache_home):
    with serving(config=ServerConfig(chat_template="{{ bos_token }}{{ messages[0].content }}")) as served:
        use_template_(served.state.tokenizers.tokenizer, None)
        tokenizer = load_tokenizer(served_model().path)
        use_template_(tokenizer, "{{ bos_token }}{{ messages[0].content }}")
        text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        assert text == f"{tokenizer.bos_token}a"


# -- the clients themselves --------------------------------------------------------------------------------------------


@pytest.mark.cover
def test_openais_client_runs_tools_and_responses(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    model = server.state.model_name
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, **DRAW
    )
    (call,) = answer.choices[0].message.tool_calls
    check_call(call.function.name, call.function.arguments)
    history = [*MESSAGES, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "wet"}]
    client.chat.completions.create(model=model, messages=history, tools=TOOLS, max_tokens=2)
    tools = [{"type": "function", **TOOLS[0]["function"]}]
    first = client.responses.create(
        model=model, input="Hi!", tools=tools, tool_choice="required", max_output_tokens=700
    )
    item = first.output[0]
    check_call(item.name, item.arguments)
    output = {"type": "function_call_output", "call_id": item.call_id, "output": "wet"}
    second = client.responses.create(model=model, previous_response_id=first.id, input=[output], max_output_tokens=3)
    assert 1 <= second.usage.output_tokens <= 3
    assert client.responses.retrieve(first.id).output == first.output
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="response_id"):
        client.responses.retrieve(first.id)
    form = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["a", "b"]}}}
    with client.responses.stream(model=model, input="Hi!", text=form, max_output_tokens=50) as stream:
        kinds = [event.type for event in stream]
        assert json.loads(stream.get_final_response().output_text) in ("a", "b")
    assert kinds[0] == "response.created"


@pytest.mark.cover
def test_anthropics_client_runs(server):
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=server.url, api_key="none")
    model, said = server.state.model_name, [{"role": "user", "content": "Hi!"}]
    tools = [{"name": "weather", "input_schema": PARAMETERS}]
    with client.messages.stream(
        model=model, messages=said, tools=tools, tool_choice={"type": "any"}, max_tokens=700
    ) as stream:
        message = stream.get_final_message()
    for block in message.content:
        check_call(block.name, block.input)
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": "wet"} for block in message.content]
    history = [*said, {"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    second = client.messages.create(model=model, messages=history, tools=tools, max_tokens=3)
    assert second.usage.output_tokens <= 3
    assert client.messages.count_tokens(model=model, messages=said).input_tokens > 3
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(model=model, messages=said, max_tokens=3, extra_body={"temperature": 5})


def test_many_dialogues_side_by_side(server):
    async def ask():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            body = {
                "messages": MESSAGES,
                "tools": TOOLS,
                "tool_choice": "required",
                "temperature": 1.5,
                "max_tokens": 600,
            }
            answers = await asyncio.gather(*(client.post(CHAT, json={**body, "seed": i}) for i in range(4)))
        return [answer.json()["choices"][0]["message"]["tool_calls"] for answer in answers]

    for calls in asyncio.run(ask()):
        for call in calls:
            check_call(**call["function"])


@pytest.mark.parametrize("name", CALL_FORMATS)
def test_a_call_that_a_model_begins_is_constrained_to_its_end(name):
    """Free text, the begin of a call, from there on what the grammar allows; behind the call the text is free again."""
    tokenizer = load_tokenizer("recall")
    grammars = make_grammars(tokenizer, VOCAB_SIZE, [EOS_ID])
    begin, grammar = strict_calls(name, {"weather": PARAMETERS}, {})
    first = grammars.compile_grammar(grammar)
    for seed in range(3):
        constraint, generator = InCalls(first, begin.encode(), grammars.bytes_of), random.Random(seed)
        syntax = CALL_FORMATS[name]
        before = syntax.around[0] + syntax.call[0]
        output = bytearray(b"Let me see. " if name != "llama3_json" else b"")
        output += before[: before.index(begin) + len(begin)].encode()
        for token_id in output:
            assert constraint.allowed() is None
            constraint.accept(token_id)
        while (mask := constraint.allowed()) is not None:
            allowed = [i for i in range(VOCAB_SIZE) if mask[i // 8] >> i % 8 & 1]
            preferred = [i for i in allowed if chr(i) in '"}]']
            token_id = generator.choice(preferred or allowed)
            output.append(token_id)
            constraint.accept(token_id)
        parser = choose_parsers(name, "none", "").make({"weather": PARAMETERS}, "")
        pieces = [*parser.feed(output.decode()), *parser.finish()]
        arguments = "".join(piece.text for piece in pieces if isinstance(piece, CallArguments))
        check_call("weather", arguments)


def test_strict_tools_are_taken_where_the_model_may_choose(server):
    tool = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": True}}
    fields = {"messages": MESSAGES, "temperature": 0, "max_tokens": 5}
    loose = server.ok(CHAT, tools=[{**tool, "function": {**tool["function"], "strict": False}}], **fields)
    assert server.ok(CHAT, tools=[tool], **fields)["choices"] == loose["choices"]
    broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}, "strict": True}}
    assert server.refused(CHAT, messages=MESSAGES, tools=[broken])["param"] == "tools"
