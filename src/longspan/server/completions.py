"""Answers of `/v1/completions`, which continues prompts as they are.

Holds the tokenization of prompts, and the shape of choices. Must not know how requests run.
Read next: `longspan.server.answers`, the base class; `longspan.server.chat`, for conversations.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import Response

from longspan.engine.output_reader import OutputDelta
from longspan.models.detokenizer import encode_prompt
from longspan.server.answers import Answer
from longspan.server.generation import AnswerChoice, EncodedPrompt, Generation
from longspan.server.logprobs import LegacyLogprobs, prompt_offsets
from longspan.server.protocol import CompletionRequest
from longspan.server.state import ServerState
from longspan.server.token_texts import TokenTexts


async def complete(state: ServerState, body: CompletionRequest) -> Response:
    """Answer a request.

    Raises:
        LongspanError, ApiError: the request is refused.
    """
    params = await body.in_thread_if_long(lambda: body.sampling_params(state.sampling_defaults))
    prompts = [await _prompt(state, prompt, needs_text=bool(body.echo)) for prompt in body.prompts]
    generation = await Generation.start(state, prompts, params, body.num_choices)
    answer = _Completion(state, generation, body)
    return answer.stream() if body.stream else await answer.whole()


async def _prompt(state: ServerState, prompt: str | list[int], *, needs_text: bool) -> EncodedPrompt:
    if isinstance(prompt, str):
        token_ids = await state.tokenizers.run(lambda tokenizer: encode_prompt(tokenizer, prompt), len(prompt))
        return EncodedPrompt(prompt, token_ids)
    await state.check_token_ids("prompt", prompt)
    if not needs_text:
        return EncodedPrompt(None, prompt)
    return EncodedPrompt(await state.decode(prompt), prompt)


class _Completion(Answer):
    ID_PREFIX, OBJECT, CHUNK_OBJECT = "cmpl", "text_completion", "text_completion"

    def __init__(self, state: ServerState, generation: Generation, body: CompletionRequest) -> None:
        super().__init__(state, generation, wants_usage=body.wants_usage, wants_progress=bool(body.return_progress))
        self._echo, self._only_echo = bool(body.echo), body.is_only_echo
        self._wants_logprobs = body.logprobs is not None
        self._is_begun: set[int] = set()  # choices of which a chunk was sent

    def size(self, choice: AnswerChoice) -> int:
        return choice.reader.num_generated + len(choice.prompt.token_ids) * (self._echo and self._wants_logprobs)

    def usage(self) -> dict[str, Any]:
        found = super().usage()
        return {**found, "completion_tokens": 0, "total_tokens": found["prompt_tokens"]} if self._only_echo else found

    def choice(self, choice: AnswerChoice, deltas: Sequence[OutputDelta], texts: TokenTexts) -> dict[str, Any]:
        text = "" if self._only_echo else choice.reader.text
        return self._shape(choice, (self._front(choice) or "") + text, self._logprobs(choice, deltas, texts, True))

    def chunks(self, choice: AnswerChoice, delta: OutputDelta, texts: TokenTexts) -> list[dict[str, Any]]:
        is_first = choice.index not in self._is_begun
        self._is_begun.add(choice.index)
        front = self._front(choice) if is_first else None
        if not self._only_echo:
            text = (front or "") + delta.text
            return [self._shape(choice, text, self._logprobs(choice, [delta], texts, is_first))]
        return [self._shape(choice, front or "", self._logprobs(choice, [], texts, is_first))]

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
