"""Needles in haystacks: a random fact at a chosen depth of a real text, and a question that only the fact answers.

Holds texts, prompts and verdicts. Must not know how a prompt runs, nor how results are shown.
Read next: `longspan.cli.needle`; `examples/needle.py`.
"""

import random
import re
import sysconfig
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from longspan.errors import ConfigError
from longspan.models.chat_template import frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FACT = "The number of the safe in the cellar is "
"""Beginning of the fact, before its number. The question ends with it, so that a model that only copies answers too."""

QUESTION = f"\n\nWhat is the number of the safe in the cellar? {FACT}"

NUM_DIGITS = 6


def standard_library_text(num_bytes: int) -> str:
    """The first `num_bytes` bytes, or a few more, of the installed Python's standard library, in file order.

    Raises:
        ConfigError: it is shorter.
    """
    parts: list[str] = []
    found = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        parts.append(text)
        found += len(text.encode())
        if found >= num_bytes:
            return "".join(parts)
    raise ConfigError(f"length: got {num_bytes} bytes of text, legal is at most {found}: Python's standard library")


class Verdict(StrEnum):
    """What an answer is worth."""

    RIGHT = "right"
    WRONG_NUMBER = "wrong number"
    NO_NUMBER = "no number"


def verdict(answer: str, number: str) -> tuple[Verdict, str]:
    """The verdict on an answer, and the first number in it; empty if there is none."""
    found = re.search(r"\d[\d,. ]*\d|\d", answer)
    digits = "" if found is None else re.sub(r"\D", "", found[0])
    if number in re.sub(r"[,. ](?=\d)", "", answer):
        return Verdict.RIGHT, number
    return (Verdict.WRONG_NUMBER if digits else Verdict.NO_NUMBER), digits


class Haystack:
    """Prompts of exact lengths around a number, for one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", longest: int) -> None:
        """Tokenize a text that is long enough.

        Args:
            tokenizer: the model's; its chat template is used if it has one.
            longest: tokens of the longest prompt.

        Raises:
            ConfigError: there is no text of that length.
        """
        self._tokenizer = tokenizer
        before, behind = frame(tokenizer) or ("", "")
        self._before = self._ids(before) if before else _special_ids(tokenizer)
        self._behind = self._ids(QUESTION + behind)
        num_bytes, self._filler = longest, list[int]()
        while len(self._filler) < longest:
            num_bytes *= 2 if self._filler else 1  # a token has a byte or more
            self._filler = self._ids(standard_library_text(num_bytes))

    def _ids(self, text: str) -> list[int]:
        token_ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return token_ids

    def prompt(self, length: int, depth: float, number: str) -> list[int]:
        """Token ids of a prompt.

        Args:
            length: tokens of the prompt.
            depth: place of the fact, from 0 (first) to 1 (last).
            number: the fact's number.

        Raises:
            ConfigError: the question alone is longer.
        """
        fact = self._ids(f"\n{FACT}{number}.\n")
        room = length - len(self._before) - len(fact) - len(self._behind)
        if room < 0:
            raise ConfigError(f"lengths: got {length}, legal is at least {length - room} tokens: fact and question")
        place = round(depth * room)
        return [*self._before, *self._filler[:place], *fact, *self._filler[place:room], *self._behind]


def random_number(rng: random.Random) -> str:
    """A number that no text has."""
    return f"{rng.randrange(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS)}"


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Special tokens that a tokenizer puts before a plain text."""
    whole: list[int] = tokenizer("a")["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    return whole[: len(whole) - len(bare)] if whole[len(whole) - len(bare) :] == bare else []
