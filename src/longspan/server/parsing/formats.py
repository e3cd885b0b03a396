"""Formats in which models write calls of tools: one row each.

Holds the rows: how a format is recognised in a chat template, parsed, and forced by a grammar. Must not know requests.
Read next: `longspan.server.parsing.calls`, the parser of most of them; `longspan.server.parsing.grammar`, which forces
calls.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from longspan.server.parsing.base import Parser
from longspan.server.parsing.calls import CallSyntax, JsonCalls
from longspan.server.parsing.harmony import Harmony
from longspan.server.parsing.qwen_xml import QwenXmlCalls

Schemas = Mapping[str, Mapping[str, Any]]
"""JSON schema of the arguments of every function, by its name."""


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One format of calls."""

    signs: tuple[str, ...]
    """Texts of which a chat template of this format has one."""
    make: Callable[[Schemas], Parser]
    """Makes the parser of one output."""
    call: tuple[str, str, str]
    """Texts before a call's name, between name and arguments, and behind these, by which a grammar forces it."""
    opens: str
    """Text in front of a call's name by which it is certain that one begins."""
    between: str = ""
    """Text between two calls."""
    around: tuple[str, str] = ("", "")
    """Texts before the first call and behind the last one."""
    needs_special: bool = False
    """Whether marks are special tokens, which text must then keep."""
    short_ids: bool = False
    """Whether ids of calls must have nine letters and digits."""


_NAME = r'"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'

_HERMES = CallSyntax(
    begins=("<tool_call>",),
    header=r"<tool_call>\s*\{\s*" + _NAME,
    trailer=r"\s*\}\s*</tool_call>",
    whole_end="</tool_call>",
)
_LLAMA3 = CallSyntax(
    begins=("<|python_tag|>", "{", ";"),
    header=r'(?:<\|python_tag\|>|;)?\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?' + _NAME,
    trailer=r"\s*\}",
    only_at_start=("{", ";"),
)
_MISTRAL = CallSyntax(
    begins=("[TOOL_CALLS]", ","),
    header=r"(?:\[TOOL_CALLS\]\s*\[?|,)\s*(?:\{\s*"
    + _NAME
    + r"|(?P<name>[A-Za-z0-9_.:-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{))",
    trailer="",
    only_at_start=(",",),
    closer=r'\s*(?:(?:,\s*"id"\s*:\s*"[^"]*"\s*)?\}|\])',
)
_DEEPSEEK = CallSyntax(
    begins=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    header=(
        r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>"
        r"(?:function<｜tool▁sep｜>(?P<name>[^\n<]+)\n```json\n|(?P<name>[^<]+)<｜tool▁sep｜>)\s*(?=\{)"
    ),
    trailer=r"\s*(?:```)?\s*<｜tool▁call▁end｜>",
    closer=r"\s*<｜tool▁calls▁end｜>",
)

CALL_FORMATS: Mapping[str, CallFormat] = {
    "harmony": CallFormat(
        signs=("<|channel|>",),
        make=lambda _schemas: Harmony(),
        opens="to=functions.",
        call=("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "<|call|>"),
        between="<|start|>assistant",
        needs_special=True,
    ),
    "qwen_xml": CallFormat(
        signs=("<function=",),
        make=QwenXmlCalls,
        opens="<tool_call>",
        call=("<tool_call>\n<function=", ">\n", "</function>\n</tool_call>"),
        between="\n",
    ),
    "deepseek": CallFormat(
        signs=("<｜tool▁calls▁begin｜>",),
        make=lambda _schemas: JsonCalls(_DEEPSEEK),
        opens="<｜tool▁call▁begin｜>",
        call=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        needs_special=True,
    ),
    "mistral": CallFormat(
        signs=("[TOOL_CALLS]",),
        make=lambda _schemas: JsonCalls(_MISTRAL),
        opens="[TOOL_CALLS]",
        call=('{"name": "', '", "arguments": ', "}"),
        between=", ",
        around=("[TOOL_CALLS][", "]"),
        needs_special=True,
        short_ids=True,
    ),
    "llama3_json": CallFormat(
        signs=("<|python_tag|>", '"parameters": dictionary'),
        make=lambda _schemas: JsonCalls(_LLAMA3),
        opens='{"name": "',
        call=('{"name": "', '", "parameters": ', "}"),
        between="; ",
        needs_special=True,
    ),
    "hermes": CallFormat(
        signs=("<tool_call>",),
        make=lambda _schemas: JsonCalls(_HERMES),
        opens="<tool_call>",
        call=('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
        between="\n",
    ),
}
"""Formats by name; the first whose sign a chat template has is its own."""
