"""Answers in blocks: thoughts, text and calls, one after another, each begun, continued and ended.

Holds the conversion of pieces to blocks, and the frame of an answer that is streamed in named events. Must not know the
shape of any API's events.
Read next: `longspan.server.anthropic`, `longspan.server.responses`, the two APIs with such answers;
`longspan.server.dialogue`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fastapi import Response

from longspan.errors import LongspanError
from longspan.server.dialogue import Call, ChoiceReader, Dialogue
from longspan.server.errors import ApiError, as_api_error, json_response
from longspan.server.parsing.base import CallArguments, CallStart, Piece, Text, Thought
from longspan.server.sse import KEEP_ALIVE, EventStream, event
from longspan.server.state import ServerState


class BlockKind(Enum):
    """What a block holds."""

    THOUGHTS = "thoughts"
    TEXT = "text"
    CALL = "call"


@dataclass(slots=True)
class Block:
    """Block of an answer."""

    index: int
    kind: BlockKind
    text: str = ""
    """Thoughts, text, or the JSON text of a call's arguments."""
    call: Call | None = None


class Step(Enum):
    """What happens to a block."""

    BEGIN = "begin"
    GROW = "grow"
    END = "end"


class Blocks:
    """The blocks of one choice so far."""

    def __init__(self, reader: ChoiceReader) -> None:
        self._reader = reader
        self.all: list[Block] = []
        self._is_open = False

    def take(self, pieces: Sequence[Piece]) -> Iterator[tuple[Step, Block, str]]:
        """Yield what pieces, which the reader has read, do to blocks: the step, the block, and the new text."""
        num_calls = len(self._reader.calls) - sum(isinstance(piece, CallStart) for piece in pieces)
        for piece in pieces:
            match piece:
                case CallStart():
                    yield from self._begin(BlockKind.CALL, self._reader.calls[num_calls])
                    num_calls += 1
                    continue
                case Thought(text):
                    kind = BlockKind.THOUGHTS
                case Text(text):
                    kind = BlockKind.TEXT
                case CallArguments(text):
                    kind = BlockKind.CALL
            if not self._is_open or self.all[-1].kind is not kind:
                yield from self._begin(kind, None)
            self.all[-1].text += text
            yield Step.GROW, self.all[-1], text

    def end(self) -> Iterator[tuple[Step, Block, str]]:
        """Yield the end of the last block, if one is open."""
        if self._is_open:
            self._is_open = False
            yield Step.END, self.all[-1], ""

    def _begin(self, kind: BlockKind, call: Call | None) -> Iterator[tuple[Step, Block, str]]:
        yield from self.end()
        self.all.append(Block(len(self.all), kind, call=call))
        self._is_open = True
        yield Step.BEGIN, self.all[-1], ""


class BlockAnswer(ABC):
    """Answer of one choice, in blocks."""

    def __init__(self, state: ServerState, dialogue: Dialogue) -> None:
        self.state, self.generation = state, dialogue.generation
        self.reader = dialogue.read_choice()
        self.blocks = Blocks(self.reader)

    @abstractmethod
    def json(self) -> dict[str, Any]:
        """Return the answer when it is complete."""

    @abstractmethod
    def first_events(self) -> Iterator[dict[str, Any]]:
        """Yield the events in front of the first block; each has its name in `type`."""

    @abstractmethod
    def block_events(self, step: Step, block: Block, text: str) -> Iterator[dict[str, Any]]:
        """Yield the events of what happens to a block."""

    @abstractmethod
    def last_events(self) -> Iterator[dict[str, Any]]:
        """Yield the events behind the last block."""

    @abstractmethod
    def error_event(self, error: ApiError) -> dict[str, Any]:
        """Return the event of an error, which is the last."""

    def on_complete(self) -> None:
        """Do what is to be done when the answer is complete; nothing by default."""
        return

    async def whole(self) -> Response:
        """Return one response, when the answer is complete."""
        (deltas,) = await self.generation.finish()
        for delta in deltas:
            for _ in self.blocks.take(self.reader.read(delta)):
                pass
        self.on_complete()
        return json_response(self.json())

    def stream(self) -> Response:
        """Return a response that sends events while the answer is being made."""
        return EventStream(self._events(), self.generation.cancel)

    def _events_of(self, steps: Iterator[tuple[Step, Block, str]]) -> Iterator[bytes]:
        return (_named(one) for step, block, text in steps for one in self.block_events(step, block, text))

    async def _events(self) -> AsyncGenerator[bytes, None]:
        try:
            has_begun = False
            async with aclosing(self.generation.deltas(self.state.config.keep_alive_s)) as deltas:
                async for found in deltas:
                    if found is None:
                        yield KEEP_ALIVE
                        continue
                    if not has_begun:
                        has_begun = True
                        for one in self.first_events():
                            yield _named(one)
                    for sent in self._events_of(self.blocks.take(self.reader.read(found[1]))):
                        yield sent
            for sent in self._events_of(self.blocks.end()):
                yield sent
            self.on_complete()
            for one in self.last_events():
                yield _named(one)
        except LongspanError as error:
            yield _named(self.error_event(as_api_error(error)))
        except Exception as error:
            logging.getLogger(__name__).exception("internal error in a stream")
            yield _named(self.error_event(ApiError(500, f"internal error: {type(error).__name__}")))


def _named(data: dict[str, Any]) -> bytes:
    """Return an event under the name that its `type` says."""
    name: str = data["type"]
    return b"event: " + name.encode() + b"\n" + event(data)
