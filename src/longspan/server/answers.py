"""Common part of completions and chat answers: id, one response or many chunks, usage, progress, errors.

Holds the frame of an answer. Must not know what is inside a choice.
Read next: `longspan.server.completions`, `longspan.server.chat`.
"""

import functools
import logging
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, TypeVar

from fastapi import Response

from longspan.engine.output_reader import OutputDelta
from longspan.errors import LongspanError
from longspan.server.errors import ApiError, as_api_error, json_response
from longspan.server.generation import AnswerChoice, Generation
from longspan.server.protocol import Common
from longspan.server.sse import DONE, KEEP_ALIVE, EventStream, event
from longspan.server.state import ServerState
from longspan.server.token_texts import TokenTexts

Result = TypeVar("Result")

INLINE_SIZE = 2_000
"""Tokens from which an answer is built in a thread: 2,000 with log-probabilities took 20 ms."""


class Answer(ABC):
    """The answer to one HTTP request."""

    ID_PREFIX: ClassVar[str]
    OBJECT: ClassVar[str]
    CHUNK_OBJECT: ClassVar[str]

    def __init__(self, state: ServerState, generation: Generation, asked: Common) -> None:
        """Answer nothing yet.

        Args:
            state: state of the server.
            generation: what generates.
            asked: the request.
        """
        self.state, self.generation = state, generation
        self._wants_usage, self._wants_progress = asked.wants_usage, bool(asked.return_progress)
        self._counts_always = asked.counts_always
        self.wants_token_ids, self.num_prompt_logprobs = bool(asked.return_token_ids), asked.prompt_logprobs
        self._head = {
            "id": f"{self.ID_PREFIX}-{asked.request_id or uuid.uuid4().hex}",
            "object": self.OBJECT,
            "created": int(time.time()),
            "model": generation.model_name,
        }

    @abstractmethod
    def choice(self, choice: AnswerChoice, deltas: Sequence[OutputDelta], texts: TokenTexts) -> dict[str, Any]:
        """Return the JSON of a finished choice."""

    @abstractmethod
    def chunks(self, choice: AnswerChoice, delta: OutputDelta, texts: TokenTexts) -> list[dict[str, Any]]:
        """Return what a delta adds to its choice: the JSON of one choice per chunk."""

    def tells(self, delta: OutputDelta) -> bool:
        """Whether a stream may have a chunk for a delta."""
        return delta.is_output or (self.wants_token_ids and bool(delta.token_ids))

    def more(self, texts: TokenTexts) -> dict[str, Any]:
        """Return fields of the answer beside its choices; none by default."""
        return {}

    def size(self, choice: AnswerChoice) -> int:
        """Return the number of tokens that the answer has for one choice."""
        return choice.reader.num_generated

    def usage(self) -> dict[str, Any]:
        """Return the token counts."""
        return self.generation.usage()

    # -- at once -----------------------------------------------------------------------------------------------------

    async def whole(self) -> Response:
        """Return one response, when all choices have ended."""
        deltas = await self.generation.finish()

        def build(texts: TokenTexts) -> Response:
            choices = [
                self.choice(choice, found, texts) for choice, found in zip(self.generation.choices, deltas, strict=True)
            ]
            return json_response({**self._head, "choices": choices, "usage": self.usage(), **self.more(texts)})

        return await self._build(build, sum(self.size(choice) for choice in self.generation.choices))

    async def _build(self, build: Callable[[TokenTexts], Result], size: int) -> Result:
        if size < INLINE_SIZE:
            return build(self.state.token_texts)
        return await self.state.tokenizers.run(lambda tokenizer: build(TokenTexts(tokenizer)), size)

    # -- as it comes -------------------------------------------------------------------------------------------------

    def stream(self) -> Response:
        """Return a response that sends chunks while the choices are being made."""
        return EventStream(self._chunks(), self.generation.cancel)

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self.generation.deltas(self.state.config.keep_alive_s)) as deltas:
                async for found in deltas:
                    if found is None:
                        yield KEEP_ALIVE
                        continue
                    choice, delta = found
                    if delta.has_prefilled and self._wants_progress:
                        yield self._chunk([], prompt_progress=_progress(choice))
                    if self.tells(delta):
                        size = self.size(choice) if choice.reader.num_generated <= len(delta.offsets) else 0
                        build = functools.partial(self.chunks, choice, delta)
                        for one in await self._build(build, size):
                            yield self._chunk([one])
            if self._wants_usage:
                yield event({**self._head, "object": self.CHUNK_OBJECT, "choices": [], "usage": self.usage()})
            yield DONE
        except LongspanError as error:
            yield event(as_api_error(error).body)
        except Exception as error:
            logging.getLogger(__name__).exception("internal error in a stream")
            yield event(ApiError(500, f"internal error: {type(error).__name__}").body)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        usage: dict[str, Any] = {"usage": None} if self._wants_usage else {}
        if self._counts_always:
            usage = {"usage": self.usage()}
        return event({**self._head, "object": self.CHUNK_OBJECT, "choices": choices, **usage, **more})


def _progress(choice: AnswerChoice) -> dict[str, Any]:
    """Return the progress as llama.cpp's server does, and also the choice, the time left, and `recovering` if so."""
    progress = choice.reader.prefill_progress()
    recovering = {"recovering": True} if progress.is_recovering else {}
    return {
        **recovering,
        "index": choice.index,
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.processed,
        "time_ms": round(progress.elapsed_s * 1000),
        "time_left_ms": None if progress.left_s is None else math.ceil(progress.left_s * 1000),
    }
