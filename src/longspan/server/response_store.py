"""Conversations that `/v1/responses` can go on from, by the id of their last response.

Holds them in a bounded amount of memory. Must not know requests or answers.
Read next: `longspan.server.responses`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from longspan.server.messages import Message

MAX_CHARS = 64 * 2**20
"""Characters of all conversations together; the least recently used are forgotten first."""

MESSAGE_CHARS = 200
"""Characters that a message counts beside its text."""


class _Stored(NamedTuple):
    messages: tuple[Message, ...]
    num_chars: int


class ResponseStore:
    """Conversations by response id. Only the event loop may use it."""

    def __init__(self, max_chars: int = MAX_CHARS) -> None:
        self._max_chars, self._num_chars = max_chars, 0
        self._stored: OrderedDict[str, _Stored] = OrderedDict()

    def get(self, response_id: str) -> Sequence[Message] | None:
        """Return a conversation up to a response, or None if it is not there, or not any more."""
        found = self._stored.get(response_id)
        if found is None:
            return None
        self._stored.move_to_end(response_id)
        return found.messages

    def put(self, response_id: str, messages: Sequence[Message]) -> None:
        """Store a conversation; one that is longer than all room is not stored."""
        num_chars = sum(_size(message) for message in messages)
        if num_chars > self._max_chars:
            return
        self._stored[response_id] = _Stored(tuple(messages), num_chars)
        self._num_chars += num_chars
        while self._num_chars > self._max_chars:
            _, oldest = self._stored.popitem(last=False)
            self._num_chars -= oldest.num_chars


def _size(message: Message) -> int:
    """Return the characters that a message counts."""
    calls = message.tool_calls or ()
    thoughts = message.reasoning_content or ""
    of_calls = sum(len(call.function.name) + len(str(call.function.arguments)) + MESSAGE_CHARS for call in calls)
    return len(message.text) + len(thoughts) + of_calls + MESSAGE_CHARS
