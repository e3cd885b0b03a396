"""Answers of `/v1/completions`, which continues prompts as they are.

Holds the tokenization of prompts, and the shape of choices. Must not know how requests run.
Read next: `longspan.server.answers`, the base class; `longspan.server.chat`, for conversations.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import Response
from transformers import PreTrainedTokenizerBase

from longspan.engine.output_reader import OutputDelta
from longspan.models.detokenizer import encode_prompt
from longspan.server.access_log import RequestRecord
from longspan.server.answers import Answer
from longspan.server.generation import AnswerChoice, EncodedPrompt, Generation
from longspan.server.logprobs import LegacyLogprobs, prompt_entries, prompt_offsets
from longspan.server.protocol import DEFAULT_MAX_TOKENS, CompletionRequest
from longspan.server.state import ServerState
from longspan.server.token_texts import TokenTexts


async def complete(state: ServerState, body: CompletionRequest, record: RequestRecord) -> Response:
    """Answer a request.

    Args:
        state: state of the server.
        body: the request.
        record: where the log finds what is told of it.

    Raises:
        LongspanError, ApiError: the request is refused.
    """
    adapter = state.adapter_of(body.model)
    defaults = {name: value for name, value in state.sampling_defaults.items() if name != "max_tokens"}
    least = max(DEFAULT_MAX_TOKENS, body.min_tokens or 1) if body.max_tokens is None else body.max_tokens
    await body.in_thread_if_long(lambda: body.sampling_params(least, defaults))  # refuses wrong values before any work
    prompts = [await _prompt(state, prompt, body) for prompt in body.prompts]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    clamps = state.config.clamp_max_tokens
    max_tokens = state.lengths.max_tokens(longest, body.max_tokens, least, clamps=clamps)
    params = await body.in_thread_if_long(lambda: body.sampling_params(max_tokens, defaults))
    generation = await Generation.start(
        state, prompts, params, body.num_choices, record, adapter=adapter, field=body.form_field
    )
    answer = _Completion(state, generation, body)
    return answer.stream() if body.stream else await answer.whole()


async def _prompt(state: ServerState, prompt: str | list[int], body: CompletionRequest) -> EncodedPrompt:
    if isinstance(prompt, str):
        special = body.add_special_tokens is not False

        def encode(tokenizer: PreTrainedTokenizerBase) -> list[int]:
            return encode_prompt(tokenizer, prompt, add_special_tokens=special)

        whole = await state.tokenizers.run(encode, len(prompt))
        token_ids = body.truncated(whole)
        if len(token_ids) == len(whole) or not body.echo:
            return EncodedPrompt(prompt, token_ids)
    else:
        await state.check_token_ids("prompt", prompt)
        token_ids = body.truncated(prompt)
    return EncodedPrompt(await state.decode(token_ids) if body.echo else None, token_ids)


class _Completion(Answer):
    ID_PREFIX, OBJECT, CHUNK_OBJECT = "cmpl", "text_completion", "text_completion"

    def __init__(self, state: ServerState, generation: Generation, body: CompletionRequest) -> None:
        super().__init__(state, generation, body)
        self._echo, self._only_echo = bool(body.echo), body.is_only_echo
        self._wants_logprobs = body.num_logprobs is not None
        self._is_begun: set[int] = set()  # choices of which a chunk was sent

    def size(self, choice: AnswerChoice) -> int:
        of_prompt = (self._echo and self._wants_logprobs) or self.num_prompt_logprobs is not None
        return choice.reader.num_generated + len(choice.prompt.token_ids) * of_prompt

    def usage(self) -> dict[str, Any]:
        found = super().usage()
        return {**found, "completion_tokens": 0, "total_tokens": found["prompt_tokens"]} if self._only_echo else found

    def choice(self, choice: AnswerChoice, deltas: Sequence[OutputDelta], texts: TokenTexts) -> dict[str, Any]:
        text = "" if self._only_echo else choice.reader.text
        logprobs = self._logprobs(choice, deltas, texts, True)
        more = self._more(choice, [token_id for delta in deltas for token_id in delta.token_ids], texts, is_first=True)
        return self._shape(choice, (self._front(choice) or "") + text, logprobs) | more

    def chunks(self, choice: AnswerChoice, delta: OutputDelta, texts: TokenTexts) -> list[dict[str, Any]]:
        is_first = choice.index not in self._is_begun
        self._is_begun.add(choice.index)
        front = self._front(choice) if is_first else None
        if not self._only_echo:
            text = (front or "") + delta.text
            more = self._more(choice, delta.token_ids, texts, is_first=is_first)
            return [self._shape(choice, text, self._logprobs(choice, [delta], texts, is_first)) | more]
        more = self._more(choice, [], texts, is_first=is_first)
        return [self._shape(choice, front or "", self._logprobs(choice, [], texts, is_first)) | more]

    def _more(self, choice: AnswerChoice, token_ids: list[int], texts: TokenTexts, *, is_first: bool) -> dict[str, Any]:
        """Return the fields that vLLM adds to a choice, as far as they are asked for."""
        found: dict[str, Any] = {}
        if self.wants_token_ids:
            found["token_ids"] = [] if self._only_echo else token_ids
            if is_first:
                found["prompt_token_ids"] = choice.prompt.token_ids
        if self.num_prompt_logprobs is not None and is_first:
            logprobs = choice.reader.prompt_logprobs or []
            found["prompt_logprobs"] = prompt_entries(texts, logprobs, self.num_prompt_logprobs)
        return found

    def _front(self, choice: AnswerChoice) -> str | None:
        """Return the prompt's text if the answer repeats it, else None."""
        return choice.prompt.text if self._echo else None

    def _logprobs(
        self, choice: AnswerChoice, deltas: Sequence[OutputDelta], texts: TokenTexts, is_first: bool
    ) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        found = LegacyLogprobs(texts)
        base = len(self._front(choice) or "")
        if self._echo and is_first:
            token_ids = choice.prompt.token_ids
            found.add_prompt(token_ids, choice.reader.prompt_logprobs or [], prompt_offsets(texts.tokenizer, token_ids))
        for delta in () if self._only_echo else deltas:
            found.add(delta.logprobs, delta.offsets, base)
        return found.json

    def _shape(self, choice: AnswerChoice, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        reason = choice.reader.finish_reason
        if self._only_echo and reason is not None:
            reason_text: str | None = "length"
        else:
            reason_text = None if reason is None else reason.value
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason_text}
