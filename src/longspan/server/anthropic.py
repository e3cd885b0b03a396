"""Answers of `/v1/messages`, Anthropic's API.

Holds the shape of its answers and events. Must not know how requests run.
Read next: `longspan.server.anthropic_types`, the requests; `longspan.server.blocks`, the base class.
"""

import json
import uuid
from collections.abc import Iterator
from typing import Any

from fastapi import Response

from longspan.server.access_log import RequestRecord
from longspan.server.anthropic_types import CountRequest, MessagesRequest
from longspan.server.blocks import Block, BlockAnswer, BlockKind, Step
from longspan.server.dialogue import Dialogue, conversation_of, start_dialogue
from longspan.server.errors import ApiError, anthropic_body, json_response
from longspan.server.state import ServerState
from longspan.server.templates import render
from longspan.types import FinishReason


async def messages(state: ServerState, body: MessagesRequest, record: RequestRecord) -> Response:
    """Answer a request.

    Args:
        state: state of the server.
        body: the request.
        record: where the log finds what is told of it.

    Raises:
        LongspanError, ApiError: the request is refused.
    """
    answer = _Message(state, await start_dialogue(state, state.checked(body.chat_request), record))
    return answer.stream() if body.stream else await answer.whole()


async def count_tokens(state: ServerState, body: CountRequest) -> Response:
    """Return the number of tokens of a conversation.

    Raises:
        ApiError: the model has no template, or the template refuses the messages.
    """
    prompt = await render(state, conversation_of(state.checked(body.chat_request)))
    return json_response({"input_tokens": len(prompt.token_ids)})


class _Message(BlockAnswer):
    def __init__(self, state: ServerState, dialogue: Dialogue) -> None:
        super().__init__(state, dialogue)
        self._id = f"msg_{uuid.uuid4().hex}"

    def json(self) -> dict[str, Any]:
        content = [self._block_json(block) for block in self.blocks.all]
        return self._head() | {"content": content, **self._end(), "usage": self._usage()}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.generation.model_name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _usage(self) -> dict[str, Any]:
        """Return the token counts; as there, cached tokens are no input tokens."""
        usage = self.generation.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }

    def _end(self) -> dict[str, Any]:
        """Return why the answer ended."""
        stop = self.generation.choices[0].reader.stop_text
        if self.reader.finish_reason is FinishReason.LENGTH:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if self.reader.calls:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        return {"stop_reason": "end_turn" if stop is None else "stop_sequence", "stop_sequence": stop}

    def _block_json(self, block: Block, *, is_empty: bool = False) -> dict[str, Any]:
        text = "" if is_empty else block.text
        if block.kind is BlockKind.TEXT:
            return {"type": "text", "text": text}
        if block.kind is BlockKind.THOUGHTS:
            return {"type": "thinking", "thinking": text, "signature": ""}
        assert block.call is not None
        return {"type": "tool_use", "id": block.call.call_id, "name": block.call.name, "input": _input(text)}

    def first_events(self) -> Iterator[dict[str, Any]]:
        yield {"type": "message_start", "message": self._head() | {"usage": self._usage()}}

    def block_events(self, step: Step, block: Block, text: str) -> Iterator[dict[str, Any]]:
        if step is Step.BEGIN:
            content = self._block_json(block, is_empty=True)
            yield {"type": "content_block_start", "index": block.index, "content_block": content}
        elif step is Step.GROW:
            kinds = {
                BlockKind.TEXT: ("text_delta", "text"),
                BlockKind.THOUGHTS: ("thinking_delta", "thinking"),
                BlockKind.CALL: ("input_json_delta", "partial_json"),
            }
            kind, name = kinds[block.kind]
            yield {"type": "content_block_delta", "index": block.index, "delta": {"type": kind, name: text}}
        else:
            if block.kind is BlockKind.THOUGHTS:
                delta = {"type": "signature_delta", "signature": ""}
                yield {"type": "content_block_delta", "index": block.index, "delta": delta}
            yield {"type": "content_block_stop", "index": block.index}

    def last_events(self) -> Iterator[dict[str, Any]]:
        yield {"type": "message_delta", "delta": self._end(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def error_event(self, error: ApiError) -> dict[str, Any]:
        return anthropic_body(error)


def _input(text: str) -> Any:
    """Return a call's arguments; what is no JSON object, as an answer that was cut off, stands under `raw`."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {"raw": text}
    return found if isinstance(found, dict) else {"raw": text}
