"""Choice of parsers: by the options, by the tokenizer's response template, or by what the chat template writes.

Holds the choice, made once at the start, and the parser of one output. Must not know requests.
Read next: `longspan.server.parsing.formats`; `longspan.server.chat`, which parses.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from longspan.errors import ConfigError
from longspan.server.parsing.base import Parser, Plain
from longspan.server.parsing.formats import CALL_FORMATS, CallFormat, Schemas
from longspan.server.parsing.harmony import Harmony
from longspan.server.parsing.reasoning import Thoughts
from longspan.server.parsing.response_template import ResponseTemplate

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
    template: ResponseTemplate | None = None
    """The tokenizer's response template, where it parses outputs."""
    reads_forced: bool = True
    """Whether the response template reads calls as the format writes them."""

    @property
    def call_format(self) -> CallFormat:
        """The format of calls, in which they are forced."""
        return CALL_FORMATS[self.calls]

    @property
    def thought_marks(self) -> tuple[str, str] | None:
        """Marks around thoughts, if there are such."""
        if self.reasoning == "template":
            return None if self.template is None else self.template.thought_marks
        return None if self.reasoning is None else REASONING_MARKS.get(self.reasoning)

    def make(self, schemas: Schemas | None, prompt: str, *, is_forced: bool = False) -> Parser:
        """Make the parser of one output.

        Args:
            schemas: schema of every function that may be called; None if none may.
            prompt: text of the prompt, whose end says whether the output begins with thoughts.
            is_forced: whether a grammar forces the output to be calls.
        """
        if self.template is not None and (self.reads_forced or not is_forced):
            return self.template.make(schemas, prompt, with_thoughts=self.reasoning is not None)
        if self.reasoning == "harmony" or (schemas is not None and self.calls == "harmony"):
            return Harmony()
        answer: Parser = Plain() if schemas is None else self.call_format.make(schemas)
        marks = self.thought_marks
        if marks is None:
            return answer
        start, end = marks
        return Thoughts(start, end, answer, is_inside=self.begins_inside(prompt))

    def begins_inside(self, prompt: str) -> bool:
        """Whether an output begins with thoughts, as the prompt ends with their mark."""
        marks = self.thought_marks
        return marks is not None and prompt.rstrip().endswith(marks[0])

    def describe(self) -> str:
        """Return what is said of them when a server starts."""
        thoughts = self.reasoning or "none"
        if self.template is None:
            return f"parsers: tool calls {self.calls}, reasoning {thoughts}"
        forced = "" if self.reads_forced else f", forced tool calls {self.calls}"
        return f"parsers: the tokenizer's response template{forced}, reasoning {thoughts}"


def choose_parsers(
    calls: str, reasoning: str, template: str, special: Collection[str] = (), response_template: Any = None
) -> Parsers:
    """Choose the parsers of a server.

    Args:
        calls: option `tool_call_parser`.
        reasoning: option `reasoning_parser`.
        template: text of the chat template; empty where the model has none.
        special: special tokens of the vocabulary, which a text does not keep by itself.
        response_template: the tokenizer's own, or None. It is used where no option names a parser.

    Raises:
        ConfigError: a name is unknown, or the response template is broken.
    """
    for name, value, names in (
        ("tool_call_parser", calls, CALL_NAMES),
        ("reasoning_parser", reasoning, REASONING_NAMES),
    ):
        if value not in names:
            raise ConfigError(f"{name}: got {value!r}, legal is one of {', '.join(names)}")
    used = None
    if response_template is not None and calls == "auto" and reasoning in ("auto", "none"):
        used = ResponseTemplate(response_template)
        reasoning = "template" if reasoning == "auto" and used.has_thoughts else "none"
    if calls == "auto":
        found = (name for name, format in CALL_FORMATS.items() if any(sign in template for sign in format.signs))
        calls = next(found, "hermes")
    if reasoning == "auto":
        signs = {"harmony": "<|channel|>", **{name: marks[0] for name, marks in REASONING_MARKS.items()}}
        reasoning = next((name for name, sign in signs.items() if sign in template), "none")
    format = CALL_FORMATS[calls]
    if used is not None:
        before, middle, behind = format.call
        arguments = "<parameter=x>\n1\n</parameter>\n" if calls == "qwen_xml" else '{"x": 1}'
        text = f"{format.around[0]}{before}f{middle}{arguments}{behind}{format.around[1]}"
        return Parsers(
            calls,
            None if reasoning == "none" else reasoning,
            are_calls_special=True,  # its marks may be special tokens, and it says what becomes of the others
            are_thoughts_special=True,
            template=used,
            reads_forced=used.reads(text, "f", "x", 1),
        )
    return Parsers(
        calls,
        None if reasoning == "none" else reasoning,
        are_calls_special=format.needs_special or format.opens in special,
        are_thoughts_special=reasoning == "harmony"
        or any(mark in special for mark in REASONING_MARKS.get(reasoning, ())),
    )
