"""What models write becomes thoughts, text and calls, the same however the text is cut into pieces."""

import json
import random
from pathlib import Path

import pytest

from longspan.errors import ConfigError
from longspan.server.parsing.base import CallArguments, CallStart, Text, Thought
from longspan.server.parsing.formats import CALL_FORMATS
from longspan.server.parsing.select import REASONING_MARKS, choose_parsers

SCHEMAS = {
    "find": {"type": "object", "properties": {"text": {"type": "string"}, "count": {"type": "integer"}}},
    "stop": {"type": "object", "properties": {}},
}
CALL = ("find", {"text": 'a "b" {c}', "count": 3})
ARGUMENTS = json.dumps(CALL[1])

OUTPUTS = {
    "hermes": [
        ("Just text.", "Just text.", []),
        (f'<tool_call>\n{{"name": "find", "arguments": {ARGUMENTS}}}\n</tool_call>', "", [CALL]),
        (
            f'Wait. <tool_call>{{"name":"find","arguments":{ARGUMENTS}}}</tool_call>\n'
            '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>\n',
            "Wait. ",
            [CALL, ("stop", {})],
        ),
        (f'<tool_call>\n{{"arguments": {ARGUMENTS}, "name": "find"}}\n</tool_call>', "", [CALL]),
        ("<tool_call>no call</tool_call>", "<tool_call>no call</tool_call>", []),
        ("a < b, <tool", "a < b, <tool", []),
        ("<tool_call>\n{", "<tool_call>\n{", []),
    ],
    "qwen_xml": [
        (
            'Now.\n<tool_call>\n<function=find>\n<parameter=text>\na "b" {c}\n</parameter>\n<parameter=count>\n3\n'
            "</parameter>\n</function>\n</tool_call>",
            "Now.\n",
            [CALL],
        ),
        ("<tool_call>\n<function=stop>\n</function>\n</tool_call>\n", "", [("stop", {})]),
        ("<tool_call>\nnothing", "<tool_call>\nnothing", []),
    ],
    "llama3_json": [
        (f'{{"name": "find", "parameters": {ARGUMENTS}}}', "", [CALL]),
        (f'<|python_tag|>{{"type": "function", "name": "find", "parameters": {ARGUMENTS}}}', "", [CALL]),
        (
            f'{{"name": "find", "parameters": {ARGUMENTS}}}; {{"name": "stop", "parameters": {{}}}}',
            "",
            [CALL, ("stop", {})],
        ),
        ('{"a": 1} is an object; so is {"b": 2}', '{"a": 1} is an object; so is {"b": 2}', []),
    ],
    "mistral": [
        (
            f'[TOOL_CALLS][{{"name": "find", "arguments": {ARGUMENTS}}}, {{"name": "stop", "arguments": {{}}}}]',
            "",
            [CALL, ("stop", {})],
        ),
        (f'[TOOL_CALLS][{{"name": "find", "arguments": {ARGUMENTS}, "id": "abcdefghi"}}]', "", [CALL]),
        (f"Well, [TOOL_CALLS]find[ARGS]{ARGUMENTS}[TOOL_CALLS]stop[ARGS]{{}}", "Well, ", [CALL, ("stop", {})]),
        (f"[TOOL_CALLS]find{ARGUMENTS}", "", [CALL]),
        ("a, b, c", "a, b, c", []),
    ],
    "deepseek": [
        (
            f"So.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>find<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
            "<｜tool▁call▁begin｜>stop<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "So.",
            [CALL, ("stop", {})],
        ),
        (
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n```json\n{ARGUMENTS}\n```"
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "",
            [CALL],
        ),
    ],
    "harmony": [
        (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.find "
            f"<|constrain|>json<|message|>{ARGUMENTS}<|call|>",
            "I look.",
            [CALL],
        ),
        ("<|channel|>final<|message|>Hello.", "Hello.", []),
        (f"<|start|>assistant to=functions.find<|channel|>commentary json<|message|>{ARGUMENTS}", "", [CALL]),
    ],
}
CASES = [(name, *case) for name, cases in OUTPUTS.items() for case in cases]


def read(parser, text, seed):
    """Text, thoughts and calls of an output that comes in pieces."""
    generator, place, pieces = random.Random(seed), 0, []
    while place < len(text):
        length = len(text) if seed is None else 1 if seed == 0 else generator.randint(1, 9)
        pieces += parser.feed(text[place : place + length])
        place += length
    pieces += parser.finish()
    told = "".join(piece.text for piece in pieces if isinstance(piece, Text))
    thoughts = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
    calls = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            calls.append([piece.name, ""])
        elif isinstance(piece, CallArguments):
            calls[-1][1] += piece.text
    return told, thoughts, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize(
    ("name", "text", "told", "calls"), CASES, ids=[f"{case[0]} {case[1][:30]!r}" for case in CASES]
)
def test_calls_are_found_however_the_text_is_cut(name, text, told, calls):
    for seed in (None, *range(8)):
        found = read(choose_parsers(name, "none", "").make(SCHEMAS, ""), text, seed)
        assert found == (told, "", calls), seed


def test_every_format_has_cases():
    assert set(OUTPUTS) == set(CALL_FORMATS)


def test_harmony_reads_what_its_own_package_reads():
    recorded = json.loads(Path(__file__).with_name("harmony_outputs.json").read_text(encoding="utf-8"))
    for case in recorded["cases"]:
        expected = case["text"], case["thoughts"], [(name, arguments) for name, arguments in case["calls"]]
        for seed in (None, *range(6)):
            assert read(choose_parsers("harmony", "harmony", "").make(SCHEMAS, ""), case["output"], seed) == expected


THOUGHTS = [
    ("<think>\nI see.\n</think>\n\nYes.", "", "I see.", "Yes."),
    ("I see.</think>Yes.", "Q<think>\n", "I see.", "Yes."),
    ("Yes, <think> is a mark.", "", "", "Yes, <think> is a mark."),
    ("\n<think>\n\n</think>\nYes.", "", "", "Yes."),
    ("<think>never ends </th", "", "never ends </th", ""),
    ("<thin", "", "", "<thin"),
    ("Yes. </think> No.", "<think>\n\n</think>\n\n", "", "Yes. </think> No."),
]


@pytest.mark.parametrize(("text", "prompt", "thoughts", "told"), THOUGHTS)
def test_thoughts_stand_apart(text, prompt, thoughts, told):
    for seed in (None, *range(6)):
        assert read(choose_parsers("auto", "think", "").make(None, prompt), text, seed) == (told, thoughts, [])


def test_calls_come_behind_thoughts():
    text = f'<think>A tool?</think>\n<tool_call>\n{{"name": "find", "arguments": {ARGUMENTS}}}\n</tool_call>'
    for seed in range(6):
        assert read(choose_parsers("hermes", "think", "").make(SCHEMAS, ""), text, seed) == ("", "A tool?", [CALL])
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|return|>"
    for seed in range(6):
        assert read(choose_parsers("auto", "harmony", "").make(None, ""), text, seed) == ("Hello.", "Hm.", [])


@pytest.mark.parametrize(
    ("template", "calls", "reasoning"),
    [
        ("", "hermes", None),
        ("{{ '<tool_call>' }}<think>", "hermes", "think"),
        ("<tool_call>\n<function=example>", "qwen_xml", None),
        ("[TOOL_CALLS] [THINK]", "mistral", "mistral"),
        ("<|channel|>analysis", "harmony", "harmony"),
        ("<｜tool▁calls▁begin｜> <think>", "deepseek", "think"),
        ("<|python_tag|>", "llama3_json", None),
    ],
)
def test_parsers_follow_from_the_template(template, calls, reasoning):
    found = choose_parsers("auto", "auto", template)
    assert (found.calls, found.reasoning) == (calls, reasoning)
    assert choose_parsers("hermes", "none", template).calls == "hermes"


def test_special_tokens_are_kept_where_marks_are_some():
    plain, kept = (choose_parsers("hermes", "think", "", special) for special in ((), ("<think>", "<tool_call>")))
    assert (plain.are_calls_special, plain.are_thoughts_special) == (False, False)
    assert (kept.are_calls_special, kept.are_thoughts_special) == (True, True)
    assert choose_parsers("deepseek", "none", "").are_calls_special


def test_rejects_unknown_parsers():
    with pytest.raises(ConfigError, match="tool_call_parser: got 'x', legal is one of auto, harmony, qwen_xml"):
        choose_parsers("x", "auto", "")
    with pytest.raises(ConfigError, match="reasoning_parser: got 'x', legal is one of auto, none, think"):
        choose_parsers("auto", "x", "")
    assert set(REASONING_MARKS) < {"think", "mistral", "harmony"}
