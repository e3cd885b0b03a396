"""Grammars that force calls: the model must call one of some functions, with arguments that follow its schema.

Holds the text of such grammars, in llguidance's dialect of Lark. Must not know requests.
Read next: `longspan.server.parsing.formats`; `longspan.models.grammar`, which compiles them.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from longspan.server.parsing.formats import CALL_FORMATS, Schemas

MAX_CALLS = 16
"""Most calls of one answer: without a bound a small model may call for ever."""

_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space of arguments: as templates write them, and nothing more."""


def calls_grammar(name: str, schemas: Schemas, marks: Mapping[str, int], *, parallel: bool) -> str:
    """Return the grammar of one call or several, and nothing else.

    Args:
        name: name of the format.
        schemas: schema of every function that may be called.
        marks: tokens of the vocabulary that are no text, with their ids; what they stand for is written with them.
        parallel: whether several calls are legal.
    """
    syntax = CALL_FORMATS[name]
    before, middle, behind = syntax.call
    rules: list[str] = []
    for i, (function, schema) in enumerate(schemas.items()):
        arguments = _xml(i, schema, rules) if name == "qwen_xml" else _json(i, schema, rules)
        parts = [*_literal(f"{before}{function}{middle}", marks), arguments, *_literal(behind, marks)]
        rules.append(f"call{i}: {' '.join(parts)}")
    more = ""
    if parallel:
        more = " ".join(["(", *_literal(syntax.between, marks), f"call ){{0,{MAX_CALLS - 1}}}"])
    first, last = _literal(syntax.around[0], marks), _literal(syntax.around[1], marks)
    start = " ".join([*first, "call", *([more] if more else []), *last])
    call = " | ".join(f"call{i}" for i in range(len(schemas)))
    return "\n".join([f"start: {start}", f"call: {call}", *rules])


def strict_calls(name: str, schemas: Schemas, marks: Mapping[str, int]) -> tuple[str, str]:
    """Return the text with which a call begins, and the grammar of what follows it.

    Args:
        name: name of the format.
        schemas: schema of every function that may be called.
        marks: as for `calls_grammar`.
    """
    syntax = CALL_FORMATS[name]
    _, middle, behind = syntax.call
    first = syntax.around[0] + syntax.call[0] if syntax.between == ", " else syntax.call[0]  # a list is one whole
    begin = first[: first.index(syntax.opens) + len(syntax.opens)]
    if syntax.opens in marks:
        opened = syntax.opens
    else:  # a token may hold the end of the text together with what follows
        opened = re.sub(r"[^A-Za-z0-9]+\Z", "", syntax.opens)
        begin = begin[: begin.index(opened) + len(opened)]
    rules: list[str] = []
    for i, (function, schema) in enumerate(schemas.items()):
        arguments = _xml(i, schema, rules) if name == "qwen_xml" else _json(i, schema, rules)
        parts = [*_literal(f"{function}{middle}", marks), arguments, *_literal(behind, marks)]
        rules.append(f"call{i}: {' '.join(parts)}")
    start = [*_literal(first[len(begin) :], marks), "call"]
    if syntax.between == ", ":
        more = " ".join([*_literal(syntax.between + syntax.call[0], marks), "call"])
        start += [f"( {more} ){{0,{MAX_CALLS - 1}}}", *_literal(syntax.around[1], marks)]
    call = " | ".join(f"call{i}" for i in range(len(schemas)))
    return opened, "\n".join([f"start: {' '.join(start)}", f"call: {call}", *rules])


def _json(i: int, schema: Mapping[str, Any], rules: list[str]) -> str:
    """Add the rule of arguments as JSON; return its name."""
    rules.append(f"arguments{i}: %json {json.dumps({'type': 'object', **schema, 'x-guidance': _COMPACT})}")
    return f"arguments{i}"


def _xml(i: int, schema: Mapping[str, Any], rules: list[str]) -> str:
    """Add the rules of parameters as XML-like text; return what stands for all of them."""
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    parts: list[str] = []
    for k, (name, inner) in enumerate(properties.items()):
        rule = f"value{i}_{k}"
        if isinstance(inner, dict) and inner.get("type") == "string" and "enum" not in inner and "const" not in inner:
            rules.append(f"{rule}: /[^<]{{0,10000}}/")
        elif isinstance(inner, dict) and inner.get("type") == "string" and isinstance(inner.get("enum"), list):
            rules.append(f"{rule}: {' | '.join(json.dumps(str(one)) for one in inner['enum'])}")
        else:
            given = inner if isinstance(inner, dict) else {}
            shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
            rules.append(f"{rule}: %json {json.dumps({**shared, **given, 'x-guidance': _COMPACT})}")
        text = f"{json.dumps(f'<parameter={name}>' + chr(10))} {rule} {json.dumps(chr(10) + '</parameter>' + chr(10))}"
        parts.append(f"({text})" if name in required else f"({text})?")
    return " ".join(parts) or '""'


def _literal(text: str, marks: Mapping[str, int]) -> list[str]:
    """Return a text as symbols of the grammar: marks by their token ids, the rest in quotes."""
    found: list[str] = []
    names = sorted((name for name in marks if name in text), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    for part in parts:
        if part:
            found.append(f"<[{marks[part]}]>" if part in marks else json.dumps(part, ensure_ascii=False))
    return found
