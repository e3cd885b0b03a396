"""Parser of the calls of Qwen's coder models: functions and parameters between XML-like marks, values as text.

Holds the parser. Must not know requests.
Read next: `longspan.server.parsing.base`; `longspan.server.parsing.formats`, which names it.

    <tool_call>
    <function=find>
    <parameter=text>
    two
    lines
    </parameter>
    <parameter=count>
    3
    </parameter>
    </function>
    </tool_call>

A value is text if its schema says so, else JSON if it is any.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from longspan.server.parsing.base import CallArguments, CallStart, Piece, Text, held_back

_BEGIN, _END = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>\s*)?\Z", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)


class QwenXmlCalls:
    """Parser of one output; the arguments of a call come at once, when it ends."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        """Read nothing yet.

        Args:
            schemas: JSON schema of the arguments of every function.
        """
        self._schemas = schemas
        self._kept, self._is_inside, self._has_called = "", False, False

    def feed(self, text: str) -> Sequence[Piece]:
        """Take the next text; return what is certain now."""
        self._kept += text
        found: list[Piece] = []
        while True:
            mark = _END if self._is_inside else _BEGIN
            before, seen, rest = self._kept.partition(mark)
            if not seen:
                break
            if self._is_inside:
                found += self._call(before)
            else:
                self._tell(before, found)
            self._kept, self._is_inside = rest, not self._is_inside
        if not self._is_inside:
            sure = self._kept[: len(self._kept) - held_back(self._kept, [_BEGIN])]
            if sure.strip() or not self._has_called:
                self._tell(sure, found)
                self._kept = self._kept[len(sure) :]
        return found

    def finish(self) -> Sequence[Piece]:
        """Return what was held back; the output ends here."""
        kept, self._kept = self._kept, ""
        if self._is_inside:
            return [Text(_BEGIN + kept)]
        found: list[Piece] = []
        self._tell(kept, found)
        return found

    def _tell(self, text: str, found: list[Piece]) -> None:
        if text.strip() or (text and not self._has_called):
            found.append(Text(text))

    def _call(self, body: str) -> Sequence[Piece]:
        match = _FUNCTION.match(body)
        if match is None:
            return [Text(f"{_BEGIN}{body}{_END}")]
        self._has_called = True
        types = (self._schemas.get(match[1]) or {}).get("properties") or {}
        values = {name: _value(text, types.get(name)) for name, text in _PARAMETER.findall(match[2])}
        return [CallStart(match[1]), CallArguments(json.dumps(values, ensure_ascii=False))]


def _value(text: str, schema: Any) -> Any:
    """Return a parameter's value: text where the schema says so, else what the text is as JSON."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
