"""Parser of calls whose arguments are JSON between other marks: one table row per format.

Holds the parser, and the scanner that finds where a JSON object ends. Must not know tools, nor which model has which
format.
Read next: `longspan.server.parsing.formats`, the rows.

Note [How a call is read]

    text   begin    header                                  arguments, streamed   trailer
    "Hi "  "<tool_call>\\n{\\"name\\": \\"f\\", \\"arguments\\": "   "{\\"x\\": 1}"       "}\\n</tool_call>"

    What begins like a call and is none is text.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import regex

from longspan.server.parsing.base import CallArguments, CallStart, Piece, Text, held_back

MAX_HEADER = 4096
"""Most characters from a call's begin to its arguments."""


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """Marks of one format."""

    begins: tuple[str, ...]
    """Texts with which a call may begin."""
    header: str
    """Pattern from the begin to the arguments, with a group `name`."""
    trailer: str
    """Pattern from the arguments to the call's end."""
    whole_end: str | None = None
    """Mark of the end of a JSON object with name and arguments, to read calls whose keys have another order."""
    only_at_start: tuple[str, ...] = ()
    """Those of `begins` that count only where the output begins, or behind another call."""
    closer: str | None = None
    """Pattern of what may stand behind a call without being text."""


class JsonEnd:
    """Scanner that finds the end of a JSON object, one text after another."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._is_escaped = 0, False, False

    def find(self, text: str) -> int | None:
        """Return the number of characters up to the object's end, or None if it is not in this text."""
        for i, char in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None


class JsonCalls:
    """Parser of one output in which calls of one format may stand."""

    def __init__(self, syntax: CallSyntax) -> None:
        self._syntax = syntax
        self._header, self._trailer = regex.compile(syntax.header), regex.compile(syntax.trailer)
        self._closer = None if syntax.closer is None else regex.compile(syntax.closer)
        self._firsts = {mark[0] for mark in syntax.begins}
        self._kept = ""
        self._read = self._read_text
        self._json = JsonEnd()
        self._is_between = True  # nothing but white space since the output's begin, or since a call
        self._has_called = False

    def feed(self, text: str) -> Sequence[Piece]:
        """Take the next text; return what is certain now."""
        if self._is_plain(text):
            self._is_between = False
            return [Text(text)]
        self._kept += text
        found: list[Piece] = []
        while self._kept and self._read(found):
            pass
        return found

    def _is_plain(self, text: str) -> bool:
        """Whether a text is one all of it, as nearly all are: nothing is open, and no mark can begin in it."""
        if self._kept or self._has_called or self._read != self._read_text:
            return False
        return bool(text) and not text.isspace() and self._firsts.isdisjoint(text)

    def finish(self) -> Sequence[Piece]:
        """Return what was held back; the output ends here."""
        kept, self._kept = self._kept, ""
        if not kept or self._read in (self._read_trailer, self._read_arguments):
            return []
        return [] if self._has_called and not kept.strip() else [Text(kept)]

    # Each reader takes what it can from `_kept`, and returns False when it needs more text.

    def _read_text(self, found: list[Piece]) -> bool:
        if self._closer is not None and self._has_called and self._is_between:
            match = self._closer.match(self._kept, partial=True)
            if match is not None:
                self._kept = self._kept if match.partial else self._kept[match.end() :]
                return not match.partial
        marks = self._syntax.begins
        places = [(place, mark) for mark in marks if (place := self._find(mark)) is not None]
        if places:
            place, _ = min(places)
            self._tell(self._kept[:place], found)
            self._kept, self._read = self._kept[place:], self._read_header
            return True
        keep = held_back(self._kept, marks)
        sure = self._kept[: len(self._kept) - keep]
        if self._has_called and self._is_between and not sure.strip():
            return False  # white space behind a call, which another call may follow
        self._tell(sure, found)
        self._kept = self._kept[len(sure) :]
        return False

    def _find(self, mark: str) -> int | None:
        place = self._kept.find(mark)
        if place < 0:
            return None
        is_first = self._is_between and not self._kept[:place].strip()
        return place if mark not in self._syntax.only_at_start or is_first else None

    def _tell(self, text: str, found: list[Piece]) -> None:
        if text.strip() or (text and not self._has_called):
            found.append(Text(text))
            self._is_between = self._is_between and not text.strip()

    def _read_header(self, found: list[Piece]) -> bool:
        match = self._header.match(self._kept, partial=True)
        if match is not None and not match.partial:
            found.append(CallStart(match["name"]))
            self._kept, self._json = self._kept[match.end() :], JsonEnd()
            self._read = self._read_arguments
            return True
        if match is not None and len(self._kept) <= MAX_HEADER:
            return False
        self._read = self._read_no_call if self._syntax.whole_end is None else self._read_whole
        return True

    def _read_whole(self, found: list[Piece]) -> bool:
        """Read a call that has not the usual header, once its end has come."""
        assert self._syntax.whole_end is not None
        body, mark, rest = self._kept.partition(self._syntax.whole_end)
        if not mark:
            return False
        call = _whole_call(body)
        if call is None:
            self._read = self._read_no_call
            return True
        found += [CallStart(call[0]), CallArguments(call[1])]
        self._kept = rest
        self._end_call()
        return True

    def _read_no_call(self, found: list[Piece]) -> bool:
        """Take the begin of something that is no call for text."""
        mark = next(mark for mark in self._syntax.begins if self._kept.startswith(mark))
        found.append(Text(mark))
        self._is_between = False
        self._kept, self._read = self._kept[len(mark) :], self._read_text
        return True

    def _read_arguments(self, found: list[Piece]) -> bool:
        end = self._json.find(self._kept)
        text = self._kept if end is None else self._kept[:end]
        found.append(CallArguments(text))
        self._kept = self._kept[len(text) :]
        if end is not None:
            self._read = self._read_trailer
        return True

    def _read_trailer(self, found: list[Piece]) -> bool:
        match = self._trailer.match(self._kept, partial=True)
        if match is not None and match.partial:
            return False
        self._kept = self._kept[match.end() :] if match is not None else self._kept
        self._end_call()
        return True

    def _end_call(self) -> None:
        self._has_called = self._is_between = True
        self._read = self._read_text


def _whole_call(text: str) -> tuple[str, str] | None:
    """Return name and arguments of a call in a text with one JSON object, or None."""
    start = text.find("{")
    try:
        call = json.loads(text[start:]) if start >= 0 else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
