"""Answers of `/v1/chat/completions`, which continues conversations, by the model's own chat template.

Holds the use of the template, and the shape of choices. Must not know how requests run.
Read next: `longspan.server.answers`, the base class; `longspan.server.completions`, for plain prompts.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import Response
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from longspan.engine.output_reader import OutputDelta
from longspan.server.answers import Answer
from longspan.server.errors import ApiError
from longspan.server.generation import AnswerChoice, EncodedPrompt, Generation
from longspan.server.logprobs import chat_logprobs
from longspan.server.protocol import ChatRequest, Message
from longspan.server.state import ServerState
from longspan.server.token_texts import TokenTexts

_TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError)
"""Errors that a template raises for messages that it was not written for."""


async def chat(state: ServerState, body: ChatRequest) -> Response:
    """Answer a request.

    Raises:
        LongspanError, ApiError: the request is refused.
    """
    defaults = state.sampling_defaults
    least = body.asked_max_tokens or body.min_tokens or 1
    await body.in_thread_if_long(lambda: body.sampling_params(least, defaults))  # refuses wrong values before any work
    token_ids = await encode_messages(state, body.messages)
    max_tokens = body.asked_max_tokens
    if max_tokens is None:
        room = await asyncio.to_thread(state.lengths.find_room, len(token_ids))
        max_tokens = min(room, max(defaults.get("max_tokens", room), body.min_tokens or 1))
    params = await body.in_thread_if_long(lambda: body.sampling_params(max_tokens, defaults))
    generation = await Generation.start(state, [EncodedPrompt(None, token_ids)], params, body.num_choices)
    answer = _Chat(state, generation, body)
    return answer.stream() if body.stream else await answer.whole()


async def encode_messages(
    state: ServerState, messages: Sequence[Message], *, wants_answer: bool = True, add_special_tokens: bool = False
) -> list[int]:
    """Return the token ids of a conversation.

    Args:
        state: state of the server.
        messages: the conversation.
        wants_answer: whether the template ends where the model's answer begins.
        add_special_tokens: whether the tokenizer adds special tokens; templates have their own.

    Raises:
        ApiError: the model has no template, or the template refuses the messages.
    """
    if state.tokenizers.tokenizer.chat_template is None:
        raise ApiError(
            400,
            f"messages: the model {state.model_name!r} has no chat template; use /v1/completions with a prompt",
            param="messages",
            code="no_chat_template",
        )
    turns = [message.for_template() for message in messages]

    def encode(tokenizer: PreTrainedTokenizerBase) -> list[int]:
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=wants_answer)
        except _TEMPLATE_ERRORS as error:
            raise ApiError(400, f"messages: the chat template refuses them: {error}", param="messages") from None
        token_ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return token_ids

    token_ids = await state.tokenizers.run(encode, sum(len(turn["content"]) for turn in turns))
    if not token_ids:
        raise ApiError(400, "messages: they come to no tokens, legal is at least one", param="messages")
    return token_ids


class _Chat(Answer):
    ID_PREFIX, OBJECT, CHUNK_OBJECT = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, state: ServerState, generation: Generation, body: ChatRequest) -> None:
        super().__init__(state, generation, wants_usage=body.wants_usage, wants_progress=bool(body.return_progress))
        self._wants_logprobs = bool(body.logprobs)
        self._is_begun: set[int] = set()  # choices of which a chunk was sent

    def choice(self, choice: AnswerChoice, deltas: Sequence[OutputDelta], texts: TokenTexts) -> dict[str, Any]:
        reader = choice.reader
        assert reader.finish_reason is not None
        logprobs = [one for delta in deltas for one in delta.logprobs]
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": reader.text, "refusal": None},
            "logprobs": chat_logprobs(texts, logprobs) if self._wants_logprobs else None,
            "finish_reason": reader.finish_reason.value,
        }

    def chunks(self, choice: AnswerChoice, delta: OutputDelta, texts: TokenTexts) -> list[dict[str, Any]]:
        logprobs = chat_logprobs(texts, delta.logprobs) if self._wants_logprobs and delta.logprobs else None
        chunks: list[dict[str, Any]] = []
        if choice.index not in self._is_begun:
            self._is_begun.add(choice.index)
            chunks.append({"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None})
        if delta.text or logprobs:
            chunks.append({"delta": {"content": delta.text}, "logprobs": logprobs, "finish_reason": None})
        if delta.finish_reason is not None:
            chunks.append({"delta": {}, "logprobs": None, "finish_reason": delta.finish_reason.value})
        return [{"index": choice.index, **chunk} for chunk in chunks]
