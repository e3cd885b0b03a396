"""Answers of `/v1/chat/completions`, which continues conversations.

Holds the shape of choices. Must not know how requests run, nor how text becomes calls.
Read next: `longspan.server.answers`, the base class; `longspan.server.dialogue`, which generates;
`longspan.server.completions`, for plain prompts.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import Response

from longspan.engine.output_reader import OutputDelta
from longspan.server.access_log import RequestRecord
from longspan.server.answers import Answer
from longspan.server.dialogue import Call, ChoiceReader, Dialogue, start_dialogue
from longspan.server.generation import AnswerChoice
from longspan.server.logprobs import chat_logprobs, prompt_entries
from longspan.server.parsing.base import CallArguments, CallStart, Piece, Text
from longspan.server.protocol import ChatRequest
from longspan.server.state import ServerState
from longspan.server.token_texts import TokenTexts


async def chat(state: ServerState, body: ChatRequest, record: RequestRecord) -> Response:
    """Answer a request.

    Args:
        state: state of the server.
        body: the request.
        record: where the log finds what is told of it.

    Raises:
        LongspanError, ApiError: the request is refused.
    """
    answer = _Chat(state, await start_dialogue(state, body, record), body)
    return answer.stream() if body.stream else await answer.whole()


class _Chat(Answer):
    ID_PREFIX, OBJECT, CHUNK_OBJECT = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, state: ServerState, dialogue: Dialogue, body: ChatRequest) -> None:
        super().__init__(state, dialogue.generation, body)
        self._wants_logprobs = bool(body.logprobs)
        self._tells_thoughts = body.include_reasoning is not False
        self._readers = [dialogue.read_choice() for _ in dialogue.generation.choices]
        self._is_begun: set[int] = set()  # choices of which a chunk was sent

    def usage(self) -> dict[str, Any]:
        found = super().usage()
        num_thought = sum(reader.num_reasoning_tokens for reader in self._readers)
        if self.state.parsers.reasoning is None:
            return found
        details = {**found.get("completion_tokens_details", {}), "reasoning_tokens": num_thought}
        return {**found, "completion_tokens_details": details}

    def size(self, choice: AnswerChoice) -> int:
        of_prompt = self.num_prompt_logprobs is not None
        return choice.reader.num_generated + len(choice.prompt.token_ids) * of_prompt

    def tells(self, delta: OutputDelta) -> bool:
        return delta.is_output or bool(delta.token_ids)  # tokens without text count as thoughts, or not

    def more(self, texts: TokenTexts) -> dict[str, Any]:
        first, found = self.generation.choices[0], dict[str, Any]()
        if self.num_prompt_logprobs is not None:
            logprobs = first.reader.prompt_logprobs or []
            found["prompt_logprobs"] = prompt_entries(texts, logprobs, self.num_prompt_logprobs)
        if self.wants_token_ids:
            found["prompt_token_ids"] = first.prompt.token_ids
        return found

    def choice(self, choice: AnswerChoice, deltas: Sequence[OutputDelta], texts: TokenTexts) -> dict[str, Any]:
        reader = self._readers[choice.index]
        for delta in deltas:
            reader.read(delta)
        logprobs = [one for delta in deltas for one in delta.logprobs]
        found = {
            "index": choice.index,
            "message": self._message(reader),
            "logprobs": chat_logprobs(texts, logprobs) if self._wants_logprobs else None,
            "finish_reason": reader.reason,
        }
        if self.wants_token_ids:
            found["token_ids"] = [token_id for delta in deltas for token_id in delta.token_ids]
        return found

    def _message(self, reader: ChoiceReader) -> dict[str, Any]:
        content = None if reader.calls and not reader.text else reader.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reader.thoughts and self._tells_thoughts:
            message |= {"reasoning_content": reader.thoughts, "reasoning": reader.thoughts}
        if reader.calls:
            message["tool_calls"] = [
                _call_json(call) | {"function": {"name": call.name, "arguments": call.arguments}}
                for call in reader.calls
            ]
        return message

    def chunks(self, choice: AnswerChoice, delta: OutputDelta, texts: TokenTexts) -> list[dict[str, Any]]:
        reader = self._readers[choice.index]
        pieces = reader.read(delta)
        logprobs = chat_logprobs(texts, delta.logprobs) if self._wants_logprobs and delta.logprobs else None
        chunks: list[dict[str, Any]] = []
        if choice.index not in self._is_begun:
            self._is_begun.add(choice.index)
            chunks.append({"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None})
            if self.wants_token_ids:
                chunks[0]["prompt_token_ids"] = choice.prompt.token_ids
        deltas = self._deltas(reader, pieces)
        wants_ids = self.wants_token_ids and bool(delta.token_ids)
        if not deltas and (logprobs or wants_ids):
            deltas = [{"content": ""}]
        for i, one in enumerate(deltas):
            chunk = {"delta": one, "logprobs": None if i else logprobs, "finish_reason": None}
            chunks.append(chunk | ({"token_ids": [] if i else delta.token_ids} if wants_ids else {}))
        if delta.finish_reason is not None:
            chunks.append({"delta": {}, "logprobs": None, "finish_reason": reader.reason})
        return [{"index": choice.index, **chunk} for chunk in chunks]

    def _deltas(self, reader: ChoiceReader, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """Return what each piece adds to a streamed message."""
        index = len(reader.calls) - sum(isinstance(piece, CallStart) for piece in pieces) - 1
        found: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, CallStart):
                index += 1
                head = {"index": index, **_call_json(reader.calls[index])}
                found.append({"tool_calls": [head | {"function": {"name": piece.name, "arguments": ""}}]})
            elif isinstance(piece, CallArguments):
                found.append({"tool_calls": [{"index": index, "function": {"arguments": piece.text}}]})
            elif isinstance(piece, Text):
                found.append({"content": piece.text})
            elif self._tells_thoughts:
                found.append({"reasoning_content": piece.text, "reasoning": piece.text})
        return found


def _call_json(call: Call) -> dict[str, Any]:
    return {"id": call.call_id, "type": "function"}
