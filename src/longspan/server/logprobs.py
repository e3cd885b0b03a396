"""Log-probabilities in the two shapes of OpenAI's API.

Holds the two shapes. Must not know requests or streams.
Read next: `longspan.types` (`TokenLogprobs`).
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from longspan.models.detokenizer import Detokenizer
from longspan.server.token_texts import TokenTexts
from longspan.types import TokenLogprobs

LEAST = -9999.0
"""Log-probability in place of minus infinity, which JSON does not have."""


def chat_logprobs(texts: TokenTexts, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Return the log-probabilities of a chat's choice or delta."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        found = texts.bytes_of(token_id)
        return {"token": texts.text_of(token_id), "logprob": max(logprob, LEAST), "bytes": list(found)}

    content = [
        entry(one.token_id, one.logprob) | {"top_logprobs": [entry(token_id, value) for token_id, value in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def prompt_entries(texts: TokenTexts, logprobs: Sequence[TokenLogprobs], num_top: int) -> list[dict[str, Any] | None]:
    """Return the log-probabilities of a prompt as vLLM does: by token id, None for the first token."""

    def entry(one: TokenLogprobs) -> dict[str, Any]:
        ranked = [(token_id, value, i + 1) for i, (token_id, value) in enumerate(one.top[:num_top])]
        return {
            str(token_id): {"logprob": max(value, LEAST), "rank": rank, "decoded_token": texts.text_of(token_id)}
            for token_id, value, rank in [*ranked, (one.token_id, one.logprob, one.rank)]
        }

    return [None, *(entry(one) for one in logprobs)]


class LegacyLogprobs:
    """Log-probabilities of a completion's choice: lists of equal length."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self.json: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add_prompt(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offsets: Sequence[int]) -> None:
        """Add the tokens of an echoed prompt; nothing comes before the first one, so it has no probability."""
        self._append(self._texts.name_of(token_ids[0]), None, None, offsets[0])
        self.add(logprobs, offsets[1:])

    def add(self, logprobs: Sequence[TokenLogprobs], offsets: Sequence[int], base: int = 0) -> None:
        """Add tokens, each with the place in the text where it begins, counted from `base`."""
        for one, offset in zip(logprobs, offsets, strict=True):
            top: dict[str, float] = {}
            for token_id, logprob in (*one.top, (one.token_id, one.logprob)):
                top.setdefault(self._texts.name_of(token_id), max(logprob, LEAST))
            self._append(self._texts.name_of(one.token_id), max(one.logprob, LEAST), top, base + offset)

    def _append(self, token: str, logprob: float | None, top: dict[str, float] | None, offset: int) -> None:
        for values, value in zip(self.json.values(), (token, logprob, top, offset), strict=True):
            values.append(value)


def prompt_offsets(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[int]:
    """Return where each token of a prompt begins, in characters of the prompt's text."""
    detokenizer = Detokenizer(tokenizer, [])
    offsets: list[int] = []
    text_len = 0
    for token_id in token_ids:
        offsets.append(text_len)
        text_len += len(detokenizer.add(token_id))
    return offsets
