"""What a parser of a model's output yields: thoughts, text and calls, in order, as the text comes.

Holds the pieces, and the protocol of parsers. Must not know tokenizers, requests or JSON answers.
Read next: `longspan.server.parsing.select`, which chooses a parser; `longspan.server.parsing.reasoning`,
`longspan.server.parsing.calls`, two kinds of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Thought:
    """Part of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """Part of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """Begin of a call; the pieces `CallArguments` up to the next one are its."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """Part of the JSON text of a call's arguments."""

    text: str


Piece = Thought | Text | CallStart | CallArguments


class Parser(Protocol):
    """Parser of one output. Whatever it does not understand is text: nothing that a model wrote is lost."""

    def feed(self, text: str) -> Sequence[Piece]:
        """Take the next text; return what is certain now."""

    def finish(self) -> Sequence[Piece]:
        """Return what was held back; the output ends here."""


class Plain:
    """Parser of an output without structure."""

    def feed(self, text: str) -> Sequence[Piece]:
        """Return the text as it is."""
        return [Text(text)] if text else []

    def finish(self) -> Sequence[Piece]:
        """Return nothing: no text was held back."""
        return []


def held_back(text: str, marks: Sequence[str]) -> int:
    """Return the number of characters at a text's end that may be the beginning of a mark."""
    return max(
        (
            length
            for mark in marks
            for length in range(1, min(len(mark), len(text) + 1))
            if text.endswith(mark[:length])
        ),
        default=0,
    )
