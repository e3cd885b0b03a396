"""Parser of harmony, the format of gpt-oss: channels for thoughts, for calls and for the answer.

Holds the parser. Must not know requests.
Read next: `longspan.server.parsing.base`; `longspan.server.parsing.formats`, which names it.

    <|channel|>analysis<|message|>THOUGHTS<|end|>
    <|start|>assistant<|channel|>commentary to=functions.find <|constrain|>json<|message|>{"text": "a"}<|call|>
    <|start|>assistant<|channel|>final<|message|>ANSWER<|return|>
"""

import re
from collections.abc import Sequence

from longspan.server.parsing.base import CallArguments, CallStart, Piece, Text, Thought, held_back

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([A-Za-z0-9_.:-]+)")


class Harmony:
    """Parser of one output."""

    def __init__(self) -> None:
        self._kept = ""
        self._kind: type[Thought | Text | CallArguments] | None = None  # of the message's body; None in its header

    def feed(self, text: str) -> Sequence[Piece]:
        """Take the next text; return what is certain now."""
        self._kept += text
        found: list[Piece] = []
        while self._kept:
            if self._kind is None:
                header, seen, rest = self._kept.partition(_MESSAGE)
                if not seen:
                    break
                self._begin(header, found)
                self._kept = rest
                continue
            places = [(place, end) for end in _ENDS if (place := self._kept.find(end)) >= 0]
            place, end = min(places, default=(len(self._kept) - held_back(self._kept, _ENDS), ""))
            if place:
                found.append(self._kind(self._kept[:place]))
            self._kept = self._kept[place + len(end) :]
            if not end:
                break
            self._kind = None
        return found

    def finish(self) -> Sequence[Piece]:
        """Return what was held back; the output ends here."""
        kept, self._kept = self._kept, ""
        if not kept:
            return []
        if self._kind is not None:
            return [self._kind(kept)]
        return [] if "<|" in kept or kept.strip() in ("", "assistant") else [Text(kept)]  # a header that was cut off

    def _begin(self, header: str, found: list[Piece]) -> None:
        """Read a message's header."""
        recipient = _RECIPIENT.search(header)
        if recipient is not None:
            found.append(CallStart(recipient[1]))
            self._kind = CallArguments
        elif "final" in header:
            self._kind = Text
        elif "commentary" in header:
            self._kind = Text  # what the user may read before a call
        else:
            self._kind = Thought
