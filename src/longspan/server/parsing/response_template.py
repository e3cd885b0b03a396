"""Parser by the response template that a tokenizer brings: Transformers' description of what its model writes.

Holds the use of Transformers' parser. Must not know requests, nor which model has which template.
Read next: `longspan.server.parsing.base`; `longspan.server.parsing.select`, which prefers such a template.
Source: `transformers.utils.chat_parsing`, which took the place of the older `response_schema`.

Note [What can be streamed]
    Transformers' parser finds the regions of an output as it comes: text and thoughts are told as they grow. A call is
    told when its region closes, all its arguments at once: only then can its content be parsed (`content: json` and
    the like). Here this happens apart from finding the regions, since Transformers' parser raises for a call that is
    none, and drops its text. What raises is told as text, marks included.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import regex

from longspan.errors import ConfigError
from longspan.server.parsing.base import CallArguments, CallStart, Parser, Piece, Text, Thought

_CALLS = "tool_calls"
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_BEFORE = 100_000
"""Characters at a prompt's end in which the answer's beginning is looked for."""

_OPEN, _CLOSE = "longspan_open", "longspan_close"
"""Groups that hold the marks around a call."""

_BROKEN = (ValueError, TypeError, LookupError, AttributeError, RecursionError, regex.error)
"""Errors that Transformers raises for templates, and for outputs, that it does not understand."""


def _parser(template: Mapping[str, Any], prompt: str) -> Any:
    """Return Transformers' parser of one output; older versions, whose tokenizers have no such template, lack it."""
    from transformers.utils.chat_parsing import ResponseParser

    return ResponseParser(dict(template), prefix=prompt)


class ResponseTemplate:
    """One tokenizer's response template."""

    def __init__(self, given: Any) -> None:
        """Check the template.

        Args:
            given: the tokenizer's `response_template`.

        Raises:
            ConfigError: it is broken.
        """
        try:
            _parser(given, "")
            self._given: Mapping[str, Any] = given
            self._fields: Mapping[str, dict[str, Any]] = given["fields"]
            self._call = None if _CALLS not in self._fields else _CallRegion(self._fields[_CALLS])
            self.make({}, "", with_thoughts=True)
        except _BROKEN as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(
                "tool_call_parser: got 'auto', legal is a name with this tokenizer, whose response template is broken: "
                f"{reason}"
            ) from None

    @property
    def has_thoughts(self) -> bool:
        """Whether it knows thoughts."""
        return any(name in self._fields for name in _THOUGHTS)

    @property
    def thought_marks(self) -> tuple[str, str] | None:
        """Marks around thoughts, if they are fixed texts."""
        name = next((name for name in _THOUGHTS if name in self._fields), None)
        if name is None:
            return None
        start, end = self._fields[name].get("open"), self._fields[name].get("close")
        return (start.strip(), end.strip()) if isinstance(start, str) and isinstance(end, str) else None

    def make(self, schemas: Mapping[str, Mapping[str, Any]] | None, prompt: str, *, with_thoughts: bool) -> Parser:
        """Make the parser of one output.

        Args:
            schemas: schema of every function that may be called; None if none may.
            prompt: text of the prompt, whose end may be the answer's beginning.
            with_thoughts: whether thoughts are told apart from text.
        """
        left_out = {*(() if with_thoughts else _THOUGHTS), *((_CALLS,) if schemas is None else ())}
        kept = {name: field for name, field in self._fields.items() if name not in left_out}
        fields = {
            name: self._call.field if name == _CALLS and self._call is not None else _text_field(field)
            for name, field in kept.items()
        }
        keeps_space = {name for name in kept if (kept[name].get("content_args") or {}).get("strip") is False}
        tools = [{"name": name, "parameters": dict(schema)} for name, schema in (schemas or {}).items()]
        parser = _parser({**self._given, "fields": fields}, prompt[-_BEFORE:])
        return _ByTemplate(parser, self._call, tools, keeps_space)

    def reads(self, text: str, function: str, argument: str, value: int) -> bool:
        """Whether it finds a call with one argument in a text, and nothing else."""
        parser = self.make({function: {"properties": {argument: {"type": "integer"}}}}, "", with_thoughts=True)
        found = [*parser.feed(text), *parser.finish()]
        return found == [CallStart(function), CallArguments(json.dumps({argument: value}))]


def _text_field(field: Mapping[str, Any]) -> dict[str, Any]:
    """Return a field whose region is told as text as it is."""
    kept = {name: field[name] for name in ("open", "open_pattern", "close", "close_pattern") if name in field}
    return {**kept, "repeats": True, "content_args": {"strip": False}, "transform": {"text": "{content}"}}


class _CallRegion:
    """Region of calls: found with its marks, and parsed when it is whole."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self._open, self._close = (_pattern(given, name) for name in ("open", "close"))
        self.field: dict[str, Any] = {"repeats": True, "content_args": {"strip": False}}
        """The field as Transformers finds it, with the text of its marks and its content as the value."""
        if self._open is None:
            raise ValueError(f"Field '{_CALLS}' has no mark in front")
        # The empty group stands for the mark behind a call that is cut off.
        self.field["open_pattern"] = f"(?P<{_OPEN}>{self._open.pattern})(?P<{_CLOSE}>)"
        if self._close is not None:
            self.field["close_pattern"] = f"(?P<{_CLOSE}>{self._close.pattern})"
        self.field["transform"] = {"text": "{content}", _OPEN: f"{{{_OPEN}}}", _CLOSE: f"{{{_CLOSE}}}"}

    def calls(self, opened: str, text: str, closed: str, tools: Sequence[Mapping[str, Any]]) -> list[Piece]:
        """Return the calls in a region; what is no call is text.

        Args:
            opened: mark in front of it.
            text: its content.
            closed: mark behind it.
            tools: functions that may be called, whose schemas say which type an argument has.
        """
        try:
            return self._read(opened, text, closed, tools)
        except _BROKEN:
            return [Text(opened + text + closed)]

    def _read(self, opened: str, text: str, closed: str, tools: Sequence[Mapping[str, Any]]) -> list[Piece]:
        from transformers.utils.chat_parsing import parse_response

        groups: dict[str, str] = {}
        for mark, pattern in ((opened, self._open), (closed, self._close)):
            if pattern is not None and (match := pattern.fullmatch(mark)) is not None:
                groups |= {name: value for name, value in match.groupdict().items() if value is not None}
        kept = {name: self._given[name] for name in _CONTENT if name in self._given}
        start = "\x02" + "".join(f"(?P<{name}>[^\x03]*)\x03" for name in groups)
        template = {"start_anchor": "\x01", "fields": {_CALLS: {**kept, "open_pattern": start}}}
        whole = "\x02" + "".join(f"{value}\x03" for value in groups.values()) + text
        value = parse_response(whole, template, prefix="", tools=[dict(tool) for tool in tools])[_CALLS]
        found: list[Piece] = []
        for one in value if isinstance(value, list) else [value]:
            function = one.get("function", one)
            arguments = function.get("arguments", function.get("parameters", {}))
            if not isinstance(function["name"], str) or not function["name"]:
                raise ValueError("a name of another type")
            written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            found += [CallStart(function["name"]), CallArguments(written)]
        return found


_CONTENT = ("content", "content_args", "transform", "transform_each")
"""What a field says of its content."""


def _pattern(field: Mapping[str, Any], name: str) -> Any:
    """Return a field's mark as a compiled pattern, or None if it has none."""
    given = field.get(name)
    if given is not None:
        texts = [given] if isinstance(given, str) else sorted(given, key=len, reverse=True)
        return regex.compile("|".join(map(regex.escape, texts)), regex.DOTALL)
    pattern = field.get(f"{name}_pattern")
    return None if pattern is None else regex.compile(pattern, regex.DOTALL)


class _ByTemplate:
    """Parser of one output."""

    def __init__(
        self, parser: Any, call: _CallRegion | None, tools: Sequence[Mapping[str, Any]], keeps_space: set[str]
    ) -> None:
        self._parser, self._call, self._tools, self._keeps_space = parser, call, tools, keeps_space
        self._space = ""  # white space that is told if its region goes on
        self._is_first = True  # nothing of the region was told

    def feed(self, text: str) -> Sequence[Piece]:
        """Take the next text; return what is certain now."""
        return self._pieces(self._parser.feed(text))

    def finish(self) -> Sequence[Piece]:
        """Return what was held back; the output ends here."""
        return self._pieces(self._parser.finalize()[1])

    def _pieces(self, events: Sequence[Mapping[str, Any]]) -> list[Piece]:
        found: list[Piece] = []
        for event in events:
            kind, field = event["type"], event["field"]
            if kind == "region_open":
                self._space, self._is_first = "", True
            elif field == _CALLS:
                if kind == "region_close" and self._call is not None:
                    value = event["value"]
                    found += self._call.calls(value[_OPEN], value["text"], value[_CLOSE], self._tools)
            elif kind == "region_chunk":
                self._grow(field, event["text"], found)
        return found

    def _grow(self, field: str, text: str, found: list[Piece]) -> None:
        """Add text to the open region, without white space at its ends unless the template keeps it."""
        told = text
        if field not in self._keeps_space:
            whole = self._space + text
            told = whole.rstrip()
            self._space = whole[len(told) :]
            if self._is_first:
                told = told.lstrip()
        if told:
            self._is_first = False
            found.append(Thought(told) if field in _THOUGHTS else Text(told))
