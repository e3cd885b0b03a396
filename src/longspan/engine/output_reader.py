"""Reader of one request's output: text, stop strings, finish reason, and progress of the prompt.

Holds what has been read of one request. Must not know engines, threads, or its users, `LLM` and the server.
Read next: `longspan.models.detokenizer`, which turns tokens into text; `longspan.engine.update`, which is read here.

Note [Who ends a request]
    The engine knows tokens, so it ends requests at end tokens, `stop_token_ids` and `max_tokens`. Stop strings are
    text, which only the reader knows. When `finish_reason` is set here and the update had none, the caller ends the
    request in the engine. Tokens that were computed after the stop string meanwhile do not count.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from longspan.engine.estimate import time_left_s
from longspan.engine.update import Update
from longspan.models.detokenizer import Detokenizer
from longspan.types import FinishReason, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class OutputDelta(msgspec.Struct, frozen=True):
    """Addition of one update to a request's output."""

    text: str
    """New text that no stop string can take back any more."""
    token_ids: list[int]
    """New tokens, without those after a stop string."""
    offsets: list[int]
    """Start of each new token, in characters of the output's text."""
    logprobs: list[TokenLogprobs]
    """One entry per new token, if asked for."""
    has_prefilled: bool
    """Whether `prefill_progress` has something new to tell."""
    finish_reason: FinishReason | None
    """Why the request ended; None in all deltas but the last."""

    @property
    def is_output(self) -> bool:
        """Whether the delta has text, log-probabilities or the end, not just progress."""
        return bool(self.text or self.logprobs) or self.finish_reason is not None


class PrefillProgress(msgspec.Struct, frozen=True):
    """Progress of a request's prefill, in tokens and seconds."""

    total: int
    cached: int
    """Prompt tokens found in the prefix cache."""
    processed: int
    """Prompt tokens computed or found in the prefix cache."""
    elapsed_s: float
    """Seconds since the request began."""
    left_s: float | None
    """Estimate of the seconds until the prompt is computed; None when there is nothing to estimate from."""
    is_recovering: bool
    """Whether the ranks were lost, so that the prompt is computed again when new ones are ready."""


class OutputReader:
    """Puts one request's updates together. Needs all of them, in order."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._params = params
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens)
        self._prompt_len = len(prompt_token_ids)
        self.text = ""
        """Text so far, cut before a stop string, without an unfinished character at its end."""
        self.finish_reason: FinishReason | None = None
        self.num_generated = 0
        """Generated tokens, without those after a stop string."""
        self.num_cached = 0
        """Prompt tokens that were found in the prefix cache."""
        self.num_accepted = 0
        """Drafts that became tokens."""
        self.num_rejected = 0
        """Drafts that were wrong."""
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        """One entry per prompt token but the first, if asked for; None before the first generated token."""
        self.stop_text: str | None = None
        """Stop string at which the text ended; None if it ended in another way."""
        self._is_stopped = False  # the text was cut before a stop string
        self._num_searched = 0  # characters in which no stop string begins and ends
        self._num_told = 0  # characters that deltas have carried
        self._num_prefilled: int | None = None
        self._elapsed_s = 0.0
        self._is_recovering = False
        self._samples: list[tuple[int, float]] = []  # (prompt tokens computed, seconds)
        self._progress: PrefillProgress | None = None  # made when asked for: its estimate takes all samples

    def read(self, update: Update) -> OutputDelta:
        """Take in one update; return what it adds."""
        self.num_cached = update.num_cached
        self.num_accepted, self.num_rejected = update.num_accepted, update.num_rejected
        if update.prompt_logprobs is not None:
            self.prompt_logprobs = update.prompt_logprobs
        has_prefilled = self._read_prefill(update)
        offsets: list[int] = []
        last = len(update.token_ids) - 1 if update.finish_reason is FinishReason.STOP else None
        for i, token_id in enumerate(update.token_ids):
            offsets.append(len(self.text))
            self._add(token_id, is_end=i == last)
            if self._is_stopped:
                break
        if update.finish_reason is not None and not self._is_stopped:
            self.text += self._detokenizer.finish()
            self._cut_at_stop()
        self.finish_reason = FinishReason.STOP if self._is_stopped else update.finish_reason
        logprobs = update.logprobs[: len(offsets)]
        token_ids = update.token_ids[: len(offsets)]
        return OutputDelta(self._untold(), token_ids, offsets, logprobs, has_prefilled, self.finish_reason)

    def end(self, reason: FinishReason) -> None:
        """End reading, for a reason that the engine does not know."""
        self.finish_reason = reason

    def prefill_progress(self) -> PrefillProgress:
        """Return how much of the prompt is computed, as of the last update."""
        if self._progress is None:
            total, cached, left_s = self._prompt_len, self.num_cached, None
            if not self._is_recovering:
                left_s = time_left_s(self._samples, total - cached) if total > cached else 0.0
            done = self._num_prefilled or 0
            self._progress = PrefillProgress(total, cached, done, self._elapsed_s, left_s, self._is_recovering)
        return self._progress

    def _read_prefill(self, update: Update) -> bool:
        """Take in the prompt's progress; return whether it has changed."""
        before, done = self._num_prefilled, update.num_prefilled
        if done == before and not update.is_recovering:
            return False
        if update.is_recovering or (before is not None and done < before):  # it starts again
            self._samples.clear()
        if not update.is_recovering:
            self._samples.append((done - update.num_cached, update.since_start_s))
        self._num_prefilled, self._elapsed_s = done, update.since_start_s
        self._is_recovering, self._progress = update.is_recovering, None
        return True

    def _add(self, token_id: int, *, is_end: bool) -> None:
        """Take the next token. Stop token ids and stop strings count from `min_tokens` on.

        Args:
            token_id: the token.
            is_end: whether the engine ended the request at this token.
        """
        params = self._params
        if self.num_generated == params.min_tokens:
            self._num_searched = len(self.text)
        self.num_generated += 1
        is_stop = token_id in params.stop_token_ids and self.num_generated > params.min_tokens
        if is_end and not is_stop and not params.skip_special_tokens:
            return  # an end token of the model
        if is_stop:
            name = self._detokenizer.name_of(token_id)
            self.stop_text = name if name in params.stop else None
        if is_stop and not params.include_stop_str_in_output:
            return
        self.text += self._detokenizer.add(token_id)
        self._cut_at_stop()

    def _cut_at_stop(self) -> None:
        if not self._params.stop or self.num_generated <= self._params.min_tokens:
            return
        found = [
            (place, len(stop), stop)
            for stop in self._params.stop
            if (place := self.text.find(stop, max(0, self._num_searched - len(stop) + 1))) >= 0
        ]
        if found:
            place, length, self.stop_text = min(found)
            end = place + length if self._params.include_stop_str_in_output else place
            self.text, self._is_stopped = self.text[:end], True
        self._num_searched = len(self.text)

    def _untold(self) -> str:
        """Return the text that is final and has not been in a delta."""
        end = len(self.text)
        if self._params.stop and self.finish_reason is None:
            end -= held_back(self.text, self._params.stop)
        first, self._num_told = self._num_told, max(self._num_told, end)
        return self.text[first:end]


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return the number of characters at a text's end that may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
