"""Choice of parsers: by the options, or by what the chat template writes.

Holds the choice, made once at the start, and the parser of one output. Must not know requests.
Read next: `longspan.server.parsing.formats`; `longspan.server.chat`, which parses.
"""

from collections.abc import Collection
from dataclasses import dataclass

from longspan.errors import ConfigError
from longspan.server.parsing.base import Parser, Plain
from longspan.server.parsing.formats import CALL_FORMATS, CallFormat, Schemas
from longspan.server.parsing.harmony import Harmony
from longspan.server.parsing.reasoning import Thoughts

REASONING_MARKS = {"think": ("<think>", "</think>"), "mistral": ("[THINK]", "[/THINK]")}
"""Marks of thoughts by parser; `harmony` has channels instead."""

REASONING_NAMES = ("auto", "none", *REASONING_MARKS, "harmony")
CALL_NAMES = ("auto", *CALL_FORMATS)


@dataclass(frozen=True, slots=True)
class Parsers:
    """The parsers of one server."""

    calls: str
    """Name of the format of calls."""
    reasoning: str | None
    """Name of the reasoning parser, or None."""
    are_calls_special: bool = False
    """Whether calls are found only in a text that keeps special tokens."""
    are_thoughts_special: bool = False
    """The same of thoughts."""

    @property
    def call_format(self) -> CallFormat:
        """The format of calls."""
        return CALL_FORMATS[self.calls]

    def make(self, schemas: Schemas | None, prompt: str) -> Parser:
        """Make the parser of one output.

        Args:
            schemas: schema of every function that may be called; None if none may.
            prompt: text of the prompt, whose end says whether the output begins with thoughts.
        """
        if self.reasoning == "harmony" or (schemas is not None and self.calls == "harmony"):
            return Harmony()
        answer: Parser = Plain() if schemas is None else self.call_format.make(schemas)
        if self.reasoning is None:
            return answer
        start, end = REASONING_MARKS[self.reasoning]
        return Thoughts(start, end, answer, is_inside=self.begins_inside(prompt))

    def begins_inside(self, prompt: str) -> bool:
        """Whether an output begins with thoughts, as the prompt ends with their mark."""
        return self.reasoning in REASONING_MARKS and prompt.rstrip().endswith(REASONING_MARKS[self.reasoning][0])


def choose_parsers(calls: str, reasoning: str, template: str, special: Collection[str] = ()) -> Parsers:
    """Choose the parsers of a server.

    Args:
        calls: option `tool_call_parser`.
        reasoning: option `reasoning_parser`.
        template: text of the chat template; empty where the model has none.
        special: special tokens of the vocabulary, which a text does not keep by itself.

    Raises:
        ConfigError: a name is unknown.
    """
    for name, value, names in (
        ("tool_call_parser", calls, CALL_NAMES),
        ("reasoning_parser", reasoning, REASONING_NAMES),
    ):
        if value not in names:
            raise ConfigError(f"{name}: got {value!r}, legal is one of {', '.join(names)}")
    if calls == "auto":
        found = (name for name, format in CALL_FORMATS.items() if any(sign in template for sign in format.signs))
        calls = next(found, "hermes")
    if reasoning == "auto":
        signs = {"harmony": "<|channel|>", **{name: marks[0] for name, marks in REASONING_MARKS.items()}}
        reasoning = next((name for name, sign in signs.items() if sign in template), "none")
    format = CALL_FORMATS[calls]
    return Parsers(
        calls,
        None if reasoning == "none" else reasoning,
        are_calls_special=format.needs_special or format.opens in special,
        are_thoughts_special=reasoning == "harmony"
        or any(mark in special for mark in REASONING_MARKS.get(reasoning, ())),
    )
