"""Between text and token ids: prompts in, generated text out, stop strings.

Holds the use of a tokenizer. Must not know requests in flight or plans.
Read next: `longspan.llm`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from longspan.errors import ConfigError
from longspan.types import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 8
"""Prompt tokens that the first generated token is decoded with: some tokenizers drop a leading space otherwise."""

_CHARACTER_TOKENS = 4
"""Most tokens of one character: bytes in UTF-8."""

_MAX_PENDING = 2 * _CHARACTER_TOKENS
"""Most tokens that wait for a character to become whole."""

_INCOMPLETE = "\ufffd"
"""What an unfinished UTF-8 sequence decodes to."""


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer adds by itself, or without.

    Raises:
        ConfigError: the text is empty, or not valid Unicode.
    """
    if not text:
        raise ConfigError("prompt: got an empty text, legal is at least one character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompt: got a lone surrogate at character {error.start}, legal is valid Unicode") from None
    token_ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return token_ids


class TextStream:
    """The text of one request as its tokens arrive."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._tokenizer, self._params = tokenizer, params
        self._ids = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._prefix, self._read = 0, len(self._ids)  # ids [prefix, read) are decoded; the rest is not
        self._num_generated = 0
        self._stop_from = 0
        self.text = ""
        """Text so far, without an unfinished character at its end."""
        self.stopped = False
        """Whether the text was cut before a stop string."""

    def _decode(self, first: int, last: int | None = None) -> str:
        text = self._tokenizer.decode(
            self._ids[first:last], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def add(self, token_id: int) -> str:
        """Take the next token.

        Returns:
            The text that it completes, cut before a stop string; may be empty.
        """
        before = len(self.text)
        if self._num_generated == self._params.min_tokens:
            self._stop_from = before
        self._num_generated += 1
        if token_id in self._params.stop_token_ids and self._num_generated > self._params.min_tokens:
            return ""
        self._ids.append(token_id)
        known, both = self._decode(self._prefix, self._read), self._decode(self._prefix)
        if len(both) > len(known) and not both.endswith(_INCOMPLETE):
            self.text += both[len(known) :]
            self._prefix, self._read = self._read, len(self._ids)
        elif len(self._ids) - self._read > _MAX_PENDING:
            self._flush(known, both)
        self._cut_at_stop()
        return self.text[before:]

    def _flush(self, known: str, both: str) -> None:
        """Give up waiting for tokens that are no text: all but the last ones, and not in the middle of a character.

        Without this, text would wait, and decoding take longer with every token, until the output ends.
        """
        for end in range(len(self._ids) - _CHARACTER_TOKENS + 1, self._read, -1):
            text = self._decode(self._prefix, end)
            if both.startswith(text):  # else the end cuts a character, which `both` has whole
                self.text += text[len(known) :]
                self._prefix, self._read = self._read, end
                return

    def finish(self) -> str:
        """No more tokens come.

        Returns:
            What was held back: replacement characters for an unfinished character.
        """
        before = len(self.text)
        if not self.stopped:
            self.text += self._decode(self._prefix)[len(self._decode(self._prefix, self._read)) :]
            self._prefix = self._read = len(self._ids)
            self._cut_at_stop()
        return self.text[before:]

    def _cut_at_stop(self) -> None:
        if self._num_generated <= self._params.min_tokens:
            return
        found = [
            place
            for stop in self._params.stop
            if (place := self.text.find(stop, max(0, self._stop_from - len(stop) + 1))) >= 0
        ]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        self._stop_from = len(self.text)  # what was searched needs no second look
