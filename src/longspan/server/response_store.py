"""Responses of `/v1/responses` that were stored, with the conversations that a later request can go on from.

Holds them by the response's id, in a bounded amount of memory. Must not know requests, nor what is in an answer.
Read next: `longspan.server.responses`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from longspan.server.messages import Message

MAX_CHARS = 64 * 2**20
"""Characters of all conversations and answers together; the least recently used are forgotten first."""

MESSAGE_CHARS = 200
"""Characters that a message counts beside its text."""


class _Stored(NamedTuple):
    messages: tuple[Message, ...]
    answer: bytes
    num_chars: int


class ResponseStore:
    """Stored responses by id. Only the event loop may use it."""

    def __init__(self, max_chars: int = MAX_CHARS) -> None:
        self._max_chars, self._num_chars = max_chars, 0
        self._stored: OrderedDict[str, _Stored] = OrderedDict()

    def messages(self, response_id: str) -> Sequence[Message] | None:
        """Return the conversation up to a response, its answer included; None if it is not there, or not any more."""
        found = self._used(response_id)
        return None if found is None else found.messages

    def answer(self, response_id: str) -> bytes | None:
        """Return a response as JSON, or None if it is not there, or not any more."""
        found = self._used(response_id)
        return None if found is None else found.answer

    def put(self, response_id: str, messages: Sequence[Message], answer: bytes = b"") -> None:
        """Store a response; one that is longer than all room is not stored.

        Args:
            response_id: id of the response, which is new.
            messages: conversation up to the response, its answer included.
            answer: the response as JSON.
        """
        num_chars = len(answer) + sum(_size(message) for message in messages)
        if num_chars > self._max_chars:
            return
        self._stored[response_id] = _Stored(tuple(messages), answer, num_chars)
        self._num_chars += num_chars
        while self._num_chars > self._max_chars:
            _, oldest = self._stored.popitem(last=False)
            self._num_chars -= oldest.num_chars

    def delete(self, response_id: str) -> bool:
        """Forget a response; return whether it was there."""
        found = self._stored.pop(response_id, None)
        if found is not None:
            self._num_chars -= found.num_chars
        return found is not None

    def _used(self, response_id: str) -> _Stored | None:
        found = self._stored.get(response_id)
        if found is not None:
            self._stored.move_to_end(response_id)
        return found


def _size(message: Message) -> int:
    """Return the characters that a message counts."""
    calls = message.tool_calls or ()
    thoughts = message.reasoning_content or ""
    of_calls = sum(len(call.function.name) + len(str(call.function.arguments)) + MESSAGE_CHARS for call in calls)
    return len(message.text) + len(thoughts) + of_calls + MESSAGE_CHARS
