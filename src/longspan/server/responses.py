"""Answers of `/v1/responses`, OpenAI's Responses API.

Holds the shape of its answers and events. Must not know how requests run.
Read next: `longspan.server.responses_types`, the requests; `longspan.server.blocks`, the base class;
`longspan.server.response_store`, which keeps conversations.
"""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import Request, Response

from longspan.server.access_log import RequestRecord
from longspan.server.blocks import Block, BlockAnswer, BlockKind, Step
from longspan.server.dialogue import Dialogue, start_dialogue
from longspan.server.errors import ApiError, json_response
from longspan.server.messages import FunctionCall, Message, ToolCall
from longspan.server.responses_types import ResponsesRequest
from longspan.server.state import ServerState
from longspan.types import FinishReason


async def respond(state: ServerState, body: ResponsesRequest, record: RequestRecord) -> Response:
    """Answer a request.

    Args:
        state: state of the server.
        body: the request.
        record: where the log finds what is told of it.

    Raises:
        LongspanError, ApiError: the request is refused.
    """
    earlier: Sequence[Message] = ()
    if body.previous_response_id is not None:
        found = state.responses.messages(body.previous_response_id)
        if found is None:
            raise ApiError(
                400,
                f"previous_response_id: got {body.previous_response_id[:100]!r}, legal is a response that is stored",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        earlier = found
    dialogue = await start_dialogue(state, state.checked(lambda: body.chat_request(earlier)), record)
    answer = _Response(state, dialogue, body, [*earlier, *body.new_messages()])
    return answer.stream() if body.stream else await answer.whole()


def stored_response(state: ServerState, response_id: str, request: Request) -> Response:
    """Answer with a stored response.

    Args:
        state: state of the server.
        response_id: its id.
        request: the HTTP request, whose query may ask for more.

    Raises:
        ApiError: there is no such response, or the query asks for what is not honoured.
    """
    for name, legal in _QUERY.items():
        for value in request.query_params.getlist(name):
            if value not in legal:
                shown = " or ".join(map(repr, legal)) or "to leave it out"
                raise ApiError(400, f"{name}: got {value[:100]!r}, legal is {shown}", param=name)
    answer = state.responses.answer(response_id)
    if answer is None:
        raise _not_found(response_id)
    return Response(answer, media_type="application/json")


def delete_response(state: ServerState, response_id: str) -> Response:
    """Forget a stored response, so that nothing can go on from it.

    Raises:
        ApiError: there is no such response.
    """
    if not state.responses.delete(response_id):
        raise _not_found(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


_QUERY: Mapping[str, tuple[str, ...]] = {
    "stream": ("false",),
    "starting_after": (),
    "include": ("reasoning.encrypted_content",),
    "include[]": ("reasoning.encrypted_content",),
}
"""Legal values of a query about a stored response; what it may ask for beside them is not kept."""


def _not_found(response_id: str) -> ApiError:
    return ApiError(404, f"response_id: got {response_id[:100]!r}, legal is a response that is stored")


_PREFIXES = {BlockKind.TEXT: "msg", BlockKind.THOUGHTS: "rs", BlockKind.CALL: "fc"}


class _Response(BlockAnswer):
    def __init__(
        self, state: ServerState, dialogue: Dialogue, body: ResponsesRequest, messages: Sequence[Message]
    ) -> None:
        super().__init__(state, dialogue)
        self._body, self._messages = body, messages
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._item_ids: list[str] = []
        self._num_events = 0

    def on_complete(self) -> None:
        if self._body.store is False:
            return
        reader = self.reader
        calls = [
            ToolCall(id=call.call_id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in reader.calls
        ]
        answer = Message(
            role="assistant",
            content=reader.text or None,
            reasoning_content=reader.thoughts or None,
            tool_calls=calls or None,
        )
        self.state.responses.put(self._id, [*self._messages, answer], msgspec.json.encode(self.json()))

    # -- the answer --------------------------------------------------------------------------------------------------

    def json(self) -> dict[str, Any]:
        is_cut = self.reader.finish_reason is FinishReason.LENGTH
        return self._frame("incomplete" if is_cut else "completed")

    def _frame(self, status: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
        body = self._body
        choice = body.tool_choice
        is_over = status in ("completed", "incomplete")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.generation.model_name,
            "output": [self._item(block) for block in self.blocks.all] if is_over else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}} if body.text is None else _dump(body.text),
            "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else _dump(choice),
            "tools": [_dump(tool) for tool in body.tools or ()],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if is_over else None,
            "metadata": body.metadata or {},
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.generation.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self.reader.num_reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }

    def _item_id(self, block: Block) -> str:
        while len(self._item_ids) <= block.index:
            self._item_ids.append(f"{_PREFIXES[self.blocks.all[len(self._item_ids)].kind]}_{uuid.uuid4().hex}")
        return self._item_ids[block.index]

    def _item(self, block: Block, *, is_empty: bool = False) -> dict[str, Any]:
        """Return a block as an item of the output."""
        is_cut = self.reader.finish_reason is FinishReason.LENGTH and block is self.blocks.all[-1]
        status = "in_progress" if is_empty else "incomplete" if is_cut else "completed"
        head = {"id": self._item_id(block), "status": status}
        if block.kind is BlockKind.CALL:
            assert block.call is not None
            arguments = "" if is_empty else block.text
            call = {"call_id": block.call.call_id, "name": block.call.name, "arguments": arguments}
            return head | {"type": "function_call", **call}
        content = [] if is_empty else [_part(block)]
        if block.kind is BlockKind.THOUGHTS:
            return head | {"type": "reasoning", "summary": [], "content": content}
        return head | {"type": "message", "role": "assistant", "content": content}

    # -- the stream --------------------------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": kind, "sequence_number": number, **fields}

    def first_events(self) -> Iterator[dict[str, Any]]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._frame("in_progress"))

    def block_events(self, step: Step, block: Block, text: str) -> Iterator[dict[str, Any]]:
        place = {"item_id": self._item_id(block), "output_index": block.index}
        is_call = block.kind is BlockKind.CALL
        inner = place if is_call else place | {"content_index": 0}
        name = {
            BlockKind.CALL: "response.function_call_arguments",
            BlockKind.TEXT: "response.output_text",
            BlockKind.THOUGHTS: "response.reasoning_text",
        }[block.kind]
        logprobs: dict[str, Any] = {"logprobs": []} if block.kind is BlockKind.TEXT else {}
        if step is Step.BEGIN:
            item = self._item(block, is_empty=True)
            yield self._event("response.output_item.added", output_index=block.index, item=item)
            if not is_call:
                yield self._event("response.content_part.added", **inner, part=_part(block))
        elif step is Step.GROW:
            yield self._event(f"{name}.delta", **inner, delta=text, **logprobs)
        else:
            if is_call:
                assert block.call is not None
                yield self._event(f"{name}.done", **inner, name=block.call.name, arguments=block.text)
            else:
                yield self._event(f"{name}.done", **inner, text=block.text, **logprobs)
                yield self._event("response.content_part.done", **inner, part=_part(block))
            yield self._event("response.output_item.done", output_index=block.index, item=self._item(block))

    def last_events(self) -> Iterator[dict[str, Any]]:
        whole = self.json()
        yield self._event(f"response.{whole['status']}", response=whole)

    def error_event(self, error: ApiError) -> dict[str, Any]:
        code = error.code or "server_error"
        return self._event("response.failed", response=self._frame("failed", {"code": code, "message": error.message}))


def _part(block: Block) -> dict[str, Any]:
    """Return the content part of a block, with the text so far."""
    if block.kind is BlockKind.THOUGHTS:
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _dump(body: Any) -> dict[str, Any]:
    """Return a part of the request as it came."""
    found: dict[str, Any] = body.model_dump(by_alias=True, exclude_none=True)
    return found
