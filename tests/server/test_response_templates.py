"""A tokenizer's own response template says what its model's outputs hold, whole and in a stream."""

from pathlib import Path

import pytest
from serving import served_model, serving
from test_dialogues import TOOLS, check_call, spelled
from test_parsing import ARGUMENTS, CALL, SCHEMAS, read
from test_server import CHAT, MESSAGES
from tiny_models import TinyModel

from longspan.errors import ConfigError
from longspan.models.loader import load_tokenizer
from longspan.server.config import ServerConfig
from longspan.server.parsing.select import choose_parsers

THOUGHTS = {"open": "<think>", "close": "</think>"}
FUNCTION = {"name": "{name}", "arguments": "{content}"}
JSON_CALLS = {
    "open_pattern": r"\s*<tool_call>",
    "close": "</tool_call>",
    "repeats": True,
    "content": "json",
    "transform": {"type": "function", "function": "{content}"},
}
NAMED_CALLS = {
    "open_pattern": r"<call:(?P<name>\w+)>",
    "close": "</call>",
    "repeats": True,
    "content": "json",
    "content_args": {"unquoted_keys": True},
    "transform": {"type": "function", "function": FUNCTION},
}
XML_CALLS = {
    "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
    "close_pattern": r"</function>\s*</tool_call>",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
    "transform": {"function": FUNCTION},
}
CONTENT = {"content": {"close": "<end>"}}


def spec(calls, **fields):
    found = {"reasoning_content": THOUGHTS, "tool_calls": calls, **CONTENT, **fields}
    return {"defaults": {"role": "assistant"}, "start_anchor": "[assistant]", "fields": found}


HERMES_LIKE, OWN = spec(JSON_CALLS), spec(NAMED_CALLS)
CALL_TEXT = f'<tool_call>\n{{"name": "find", "arguments": {ARGUMENTS}}}\n</tool_call>'
FIELDS = '{text: "a \\"b\\" {c}", count: "3"}'


@pytest.mark.parametrize(
    ("template", "prompt", "text", "expected"),
    [
        (HERMES_LIKE, "", "Just text.", ("Just text.", "", [])),
        (HERMES_LIKE, "", "Just text.<end>", ("Just text.", "", [])),
        (HERMES_LIKE, "", f"<think>\nI see.\n</think>\n\nWait.\n{CALL_TEXT}\n", ("Wait.", "I see.", [CALL])),
        (HERMES_LIKE, "[user]<think>[assistant]<think>\n", f"I see.</think>{CALL_TEXT}", ("", "I see.", [CALL])),
        (HERMES_LIKE, "", f"{CALL_TEXT}\n{CALL_TEXT}", ("", "", [CALL, CALL])),
        (HERMES_LIKE, "", "<tool_call>no call</tool_call>", ("<tool_call>no call</tool_call>", "", [])),
        (HERMES_LIKE, "", '<tool_call>{"a": 1}</tool_call> So.', ('<tool_call>{"a": 1}</tool_call>So.', "", [])),
        (HERMES_LIKE, "", '<tool_call>{"name', ('<tool_call>{"name', "", [])),
        (OWN, "", f"Now.<call:find>{FIELDS}</call>", ("Now.", "", [CALL])),  # the schema makes "3" a number
        (
            spec(XML_CALLS),
            "",
            'Now.\n<tool_call>\n<function=find>\n<parameter=text>\na "b" {c}\n</parameter>\n<parameter=count>\n3\n'
            "</parameter>\n</function>\n</tool_call>",
            ("Now.", "", [CALL]),
        ),
        (spec(JSON_CALLS, content={"content_args": {"strip": False}}), "", "\na\n", ("\na\n", "", [])),
    ],
)
def test_outputs_are_read_however_the_text_is_cut(template, prompt, text, expected):
    parsers = choose_parsers("auto", "auto", "", response_template=template)
    for seed in (None, *range(8)):
        assert read(parsers.make(SCHEMAS, prompt), text, seed) == expected, seed


def test_what_was_not_asked_for_stays_text():
    parsers = choose_parsers("auto", "none", "", response_template=HERMES_LIKE)
    text = f"<think>Hm.</think>{CALL_TEXT}"
    assert read(parsers.make(None, ""), text, 1) == (text, "", [])
    assert read(parsers.make(SCHEMAS, ""), text, 1) == ("<think>Hm.</think>", "", [CALL])


def test_options_come_before_the_template():
    for calls, reasoning in (("hermes", "auto"), ("auto", "think")):
        assert choose_parsers(calls, reasoning, "", response_template=OWN).template is None
    found = choose_parsers("auto", "auto", "", response_template=OWN)
    assert (found.reasoning, found.thought_marks) == ("template", ("<think>", "</think>"))
    assert found.begins_inside("Hi <think>\n")
    said = "parsers: the tokenizer's response template"
    assert found.describe() == f"{said}, forced tool calls hermes, reasoning template"
    assert choose_parsers("auto", "none", "", response_template=HERMES_LIKE).describe() == f"{said}, reasoning none"


def test_calls_that_are_forced_are_read_in_the_format_that_forces_them():
    for template in (HERMES_LIKE, OWN):
        parser = choose_parsers("auto", "auto", "", response_template=template).make(SCHEMAS, "", is_forced=True)
        assert read(parser, CALL_TEXT, 3) == ("", "", [CALL])
    assert choose_parsers("auto", "auto", "", response_template=HERMES_LIKE).reads_forced
    assert choose_parsers("auto", "auto", "<function=", response_template=spec(XML_CALLS)).reads_forced


@pytest.mark.parametrize("broken", [5, {"fields": {}}, {"fields": {"content": {"open_pattern": "("}}}, {}])
def test_rejects_broken_response_templates(broken):
    with pytest.raises(ConfigError, match=r"tool_call_parser: got 'auto', legal is a name .*template is broken: "):
        choose_parsers("auto", "auto", "", response_template=broken)


@pytest.mark.parametrize("template", [HERMES_LIKE, OWN], ids=["hermes", "own"])
def test_a_server_reads_by_the_tokenizers_template(cache_home, tmp_path, template):
    path = tmp_path / "model"
    path.mkdir()
    for file in Path(served_model().path).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tokenizer = load_tokenizer(str(path))
    tokenizer.response_template = template
    tokenizer.save_pretrained(path)
    text = "<call:stop>{}</call>" if template is OWN else '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
    with serving(TinyModel("templated", str(path), []), config=ServerConfig()) as served:
        fields = {"messages": MESSAGES, "tools": TOOLS, **spelled(f"<think>I see.</think>\nYes.{text}")}
        message = served.ok(CHAT, **fields)["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == ("Yes.", "I see.")
        assert [call["function"] for call in message["tool_calls"]] == [{"name": "stop", "arguments": "{}"}]
        chunks = served.stream(CHAT, **fields)
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == "Yes."
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "I see."
        forced = {"tool_choice": "required", "temperature": 1.5, "seed": 2, "max_tokens": 600}
        for call in served.ok(CHAT, messages=MESSAGES, tools=TOOLS, **forced)["choices"][0]["message"]["tool_calls"]:
            check_call(**call["function"])
        strict = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}]
        if template is OWN:
            assert "strict" in served.refused(CHAT, messages=MESSAGES, tools=strict)["message"]
        else:
            served.ok(CHAT, messages=MESSAGES, tools=strict, max_tokens=2)
