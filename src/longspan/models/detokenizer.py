"""Conversion between text and token ids: prompts to ids, generated ids to text.

Holds the use of a tokenizer. Must not know requests, stop strings or plans.
Read next: `longspan.engine.output_reader`, which reads text with this.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from longspan.errors import ConfigError
from longspan.types import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 8
"""Prompt tokens decoded together with the first generated token: without them some tokenizers drop a leading space."""

_CHARACTER_TOKENS = 4
"""Most tokens of one character: bytes in UTF-8."""

_MAX_PENDING = 2 * _CHARACTER_TOKENS
"""Most tokens that wait for a character to become whole."""

_INCOMPLETE = "\ufffd"
"""Character to which an unfinished UTF-8 sequence decodes."""


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Return the token ids of a prompt, with or without the special tokens that the tokenizer adds.

    Raises:
        ConfigError: the text is empty, or not valid Unicode.
    """
    if not text:
        raise ConfigError("prompt: got an empty text, legal is at least one character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompt: got a lone surrogate at character {error.start}, legal is valid Unicode") from None
    return token_ids_of(tokenizer, text, add_special_tokens=add_special_tokens)


LONG_TEXT = 20_000
"""Characters from which a text is encoded without offsets."""


def token_ids_of(tokenizer: "PreTrainedTokenizerBase", text: str, *, add_special_tokens: bool) -> list[int]:
    """Return the token ids of a text.

    Transformers also makes lists of offsets, masks and texts of tokens, for a megabyte with the interpreter's lock held
    for 70 ms. Long texts go to the library below it instead, where it would be asked for nothing more than ids: that
    took 0.65 s in place of 1.1, and 20 ms with the lock.
    """
    if len(text) >= LONG_TEXT and (backend := _backend(tokenizer)) is not None:
        found: list[int] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return found
    token_ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return token_ids


def with_special_stops(tokenizer: "PreTrainedTokenizerBase", params: SamplingParams) -> SamplingParams:
    """Return parameters whose stop strings that are special tokens also stand among `stop_token_ids`.

    The text has no special tokens, so that such a string would never be found there.
    """
    if not params.stop:
        return params
    special = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {special[stop] for stop in params.stop if stop in special} - {*params.stop_token_ids}
    if not ids:
        return params
    return msgspec.structs.replace(params, stop_token_ids=(*params.stop_token_ids, *sorted(ids)))


def _backend(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Return what encodes text below a tokenizer, if Transformers would only pass a text on to it; else None."""
    from transformers import PreTrainedTokenizerBase, TokenizersBackend  # slow to import

    kind = type(tokenizer)
    if not isinstance(tokenizer, TokenizersBackend) or kind.__call__ is not PreTrainedTokenizerBase.__call__:
        return None
    backend: Any = tokenizer.backend_tokenizer
    is_plain = (
        kind._encode_plus is TokenizersBackend._encode_plus
        and backend.truncation is None
        and backend.padding is None
        and backend.encode_special_tokens == tokenizer.split_special_tokens
    )
    return backend if is_plain else None


class Detokenizer:
    """Incremental decoder that turns tokens into text, whole characters only.

    Decision 0027 says why `tokenizers.decoders.DecodeStream` is not used.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self._ids = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._prefix, self._read = 0, len(self._ids)  # ids [prefix, read) are decoded; the rest is not

    def name_of(self, token_id: int) -> str:
        """Return a token's name in the vocabulary, which of a special token is its text."""
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def add(self, token_id: int) -> str:
        """Take the next token; return the text that it completes, which may be empty."""
        self._ids.append(token_id)
        known, both = self._decode(self._prefix, self._read), self._decode(self._prefix)
        if len(both) > len(known) and not both.endswith(_INCOMPLETE):
            self._prefix, self._read = self._read, len(self._ids)
            return both[len(known) :]
        if len(self._ids) - self._read > _MAX_PENDING:
            return self._give_up_waiting(known, both)
        return ""

    def finish(self) -> str:
        """End the output; return the text held back, with replacement characters for an unfinished character."""
        rest = self._decode(self._prefix)[len(self._decode(self._prefix, self._read)) :]
        self._prefix = self._read = len(self._ids)
        return rest

    def _give_up_waiting(self, known: str, both: str) -> str:
        """Return the text of tokens that become no character: all but the last ones, up to the end of a character.

        Without this, text would wait, and decoding take longer with every token, until the output ends.
        """
        for end in range(len(self._ids) - _CHARACTER_TOKENS + 1, self._read, -1):
            text = self._decode(self._prefix, end)
            if both.startswith(text):  # else the end cuts a character, which `both` has whole
                self._prefix, self._read = self._read, end
                return text[len(known) :]
        return ""

    def _decode(self, first: int, last: int | None = None) -> str:
        text = self._tokenizer.decode(
            self._ids[first:last], skip_special_tokens=self._skips, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text
