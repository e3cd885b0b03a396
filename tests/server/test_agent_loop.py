"""Agents on a small real model: five turns of calls and results, through the clients of both companies, streamed."""

import json

import pytest
from serving import serving
from tiny_models import TinyModel

pytestmark = pytest.mark.slow

STOCK = {"apples": 3, "pears": 5}
SCHEMAS = {
    "look_up": {
        "type": "object",
        "properties": {"fruit": {"enum": ["apples", "pears"]}},
        "required": ["fruit"],
        "additionalProperties": False,
    },
    "order": {
        "type": "object",
        "properties": {
            "fruit": {"enum": ["apples", "pears"]},
            "count": {"type": "integer", "minimum": 1, "maximum": 20},
        },
        "required": ["fruit", "count"],
        "additionalProperties": False,
    },
}
TASK = "Look up how many apples and pears there are, and order apples so that there are as many as pears."
NUM_TURNS = 5


@pytest.fixture(scope="module")
def server(smollm2):
    with serving(TinyModel("smollm2", str(smollm2), []), kv_cache_memory=2**28) as served:
        yield served


def run_tool(name, arguments):
    """What a tool answers; fails if a call does not follow its schema."""
    fruit = arguments["fruit"]
    if name == "order":
        assert 1 <= arguments["count"] <= 20
        return f"{arguments['count']} {fruit} are ordered."
    assert name == "look_up"
    return f"There are {STOCK[fruit]} {fruit}."


def test_openais_client_runs_an_agent(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
    messages = [{"role": "user", "content": TASK}]
    for _ in range(NUM_TURNS):
        calls = {}
        with client.chat.completions.stream(
            model=server.state.model_name,
            messages=messages,
            tools=tools,
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=0,
            max_tokens=200,
        ) as stream:
            for event in stream:
                if event.type == "tool_calls.function.arguments.done":
                    calls[event.index] = (event.name, json.loads(event.arguments))
            message = stream.get_final_completion().choices[0].message
        assert len(calls) == len(message.tool_calls) == 1
        messages.append(message.model_dump(exclude_none=True))
        for index, call in enumerate(message.tool_calls):
            messages.append({"role": "tool", "tool_call_id": call.id, "content": run_tool(*calls[index])})
    final = client.chat.completions.create(
        model=server.state.model_name, messages=messages, tools=tools, temperature=0, max_tokens=20
    )
    assert final.choices[0].message.content or final.choices[0].message.tool_calls
    assert final.usage.prompt_tokens_details.cached_tokens > 0  # each turn goes on from the one before


def test_anthropics_client_runs_an_agent(server):
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=server.url, api_key="none")
    tools = [{"name": name, "input_schema": schema} for name, schema in SCHEMAS.items()]
    messages = [{"role": "user", "content": TASK}]
    for _ in range(NUM_TURNS):
        with client.messages.stream(
            model=server.state.model_name,
            messages=messages,
            tools=tools,
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            extra_body={"temperature": 0},
            max_tokens=200,
        ) as stream:
            message = stream.get_final_message()
        assert message.stop_reason == "tool_use"
        (call,) = message.content
        result = {"type": "tool_result", "tool_use_id": call.id, "content": run_tool(call.name, call.input)}
        messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    final = client.messages.create(model=server.state.model_name, messages=messages, tools=tools, max_tokens=20)
    assert final.usage.output_tokens > 0


def test_a_real_vocabulary_follows_a_form(server):
    """SmolLM2 has no tokens for some bytes; they are not generated, and all else is."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS["order"]}}
    said = [{"role": "user", "content": "Order seven pears. Answer in JSON."}]
    answer = server.ok("/v1/chat/completions", messages=said, response_format=form, temperature=0, max_tokens=60)
    run_tool("order", json.loads(answer["choices"][0]["message"]["content"]))


def test_a_real_special_token_stops(server):
    body = {"prompt": "Hello", "max_tokens": 5, "temperature": 0, "logit_bias": {"0": 100}, "ignore_eos": True}
    answer = server.ok("/v1/completions", **body, stop=["<|endoftext|>"])
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", 1)
