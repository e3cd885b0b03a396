"""One HTTP request's answers: submits them to the engine, merges their updates, turns tokens into text.

Holds choices while they run. Must not know HTTP or the shape of answers.
Read next: `longspan.engine.async_engine`; `longspan.server.completions`, which shows the events.

    prompts x n  -->  RequestStream per choice  --(pump task per choice)-->  one queue  -->  events, in order
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from longspan.engine.async_engine import RequestStream, Update
from longspan.engine.estimate import time_left_s
from longspan.errors import LongspanError
from longspan.models.detokenizer import TextStream
from longspan.server.errors import ApiError
from longspan.server.metrics import RequestMetrics
from longspan.server.protocol import MAX_PROMPTS, nth_choice
from longspan.server.state import ServerState
from longspan.types import FinishReason, SamplingParams, TokenLogprobs

MAX_BEHIND = 4096
"""Updates that may wait for a client that reads slowly; one more ends its answer."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to continue."""

    text: str | None
    """As the client sent it; None for token ids, unless the answer repeats them."""
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of a choice's prompt is computed."""

    total: int
    cached: int
    """Tokens found in the prefix cache."""
    processed: int
    """Tokens computed or found."""
    elapsed_s: float
    """Since the first step; waiting for a place is not counted."""
    left_s: float | None
    """Estimate of what is left; None when there is nothing to go by."""
    is_recovering: bool = False
    """The ranks were lost: all is computed again when new ones are ready."""


@dataclass(slots=True)
class Choice:
    """One answer while it is made."""

    index: int
    prompt: Prompt
    params: SamplingParams
    stream: RequestStream
    text: TextStream
    num_sent: int = 0
    """Characters of the text that events have carried."""
    num_generated: int = 0
    num_prefilled: int = -1
    num_cached: int = 0
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    samples: list[tuple[int, float]] = field(default_factory=list)
    """(prompt tokens computed, seconds)"""


@dataclass(frozen=True, slots=True)
class Event:
    """What one step did for one choice."""

    choice: Choice
    text: str
    """New text that no stop string can take back any more."""
    logprobs: list[TokenLogprobs]
    """One per new token, if asked for."""
    offsets: list[int]
    """Per new token, where in the choice's text it begins."""
    progress: Progress | None
    """If more of the prompt is computed than before."""

    @property
    def is_answer(self) -> bool:
        """Whether there is more to tell than progress."""
        return bool(self.text or self.logprobs) or self.choice.finish_reason is not None


class Generation:
    """All answers to one HTTP request."""

    def __init__(self, state: ServerState, num_prompts: int) -> None:
        self._state = state
        self.choices: list[Choice] = []
        self.num_prompts = num_prompts
        self._queue: asyncio.Queue[tuple[Choice, Update | LongspanError]] = asyncio.Queue()
        self._pumps: list[asyncio.Task[None]] = []
        self._metrics = RequestMetrics(state.metrics)

    @classmethod
    async def start(
        cls, state: ServerState, prompts: Sequence[Prompt], params: SamplingParams, num_choices: int
    ) -> "Generation":
        """Submit all choices, or none.

        Args:
            state: the server's.
            prompts: each gets `num_choices` answers.
            params: of every prompt's first choice.
            num_choices: answers per prompt.

        Raises:
            LongspanError, ApiError: a choice was refused; nothing runs.
        """
        queue = state.config.max_queued_requests
        slots = state.engine_config.max_num_seqs
        limit = MAX_PROMPTS if queue is None else min(MAX_PROMPTS, slots + queue)
        total = len(prompts) * num_choices
        if total > limit:
            raise ApiError(
                400,
                f"n: got {len(prompts)} prompts x {num_choices} answers = {total} requests, legal is at most {limit}"
                + " (--max-num-seqs + --max-queued-requests)" * (limit < MAX_PROMPTS),
                param="n",
            )
        for prompt in prompts:
            state.check_length(len(prompt.token_ids), params.max_tokens)
        generation = cls(state, len(prompts))
        try:
            constraint = await state.grammars.constraints(params)
            for prompt in prompts:
                for i in range(num_choices):
                    one = nth_choice(params, i)
                    stream = await state.engine.submit(prompt.token_ids, one, constraint=constraint())
                    text = TextStream(state.tokenizers.tokenizer, prompt.token_ids, one)
                    generation.choices.append(Choice(len(generation.choices), prompt, one, stream, text))
                    await asyncio.sleep(0)  # a thousand choices must not hold up everybody else
        except BaseException:
            generation.cancel()
            raise
        generation._pumps = [asyncio.create_task(generation._pump(choice)) for choice in generation.choices]
        return generation

    async def _pump(self, choice: Choice) -> None:
        try:
            async for update in choice.stream:
                if self._queue.qsize() > MAX_BEHIND + 16 * len(self.choices):
                    choice.stream.cancel()
                    raise LongspanError("the client reads too slowly")
                self._queue.put_nowait((choice, update))
        except LongspanError as error:
            self._queue.put_nowait((choice, error))

    async def events(self, silence_s: float | None = None) -> AsyncIterator[Event | None]:
        """What happens, until all choices have ended.

        Args:
            silence_s: after so many seconds without an event comes None; None waits for ever.

        Raises:
            LongspanError: the engine failed; all choices are over.
        """
        num_running = len(self.choices)
        try:
            while num_running:
                try:
                    async with asyncio.timeout(silence_s):
                        choice, update = await self._queue.get()
                except TimeoutError:
                    yield None
                    continue
                if isinstance(update, LongspanError):
                    self.cancel(FinishReason.ERROR)
                    raise update
                if choice.finish_reason is not None:
                    continue  # it ended at a stop string; this was under way
                event = _take(choice, update)
                self._metrics.advanced(choice.index, len(choice.prompt.token_ids), len(update.token_ids))
                if choice.finish_reason is not None:
                    num_running -= 1
                    if update.finish_reason is None:
                        choice.stream.cancel()  # at a stop string: the engine does not know text
                    self._metrics.ended(choice.finish_reason)
                yield event
        finally:
            self.cancel()

    async def finish(self) -> list[list[Event]]:
        """Wait for all choices to end; returns each one's events."""
        found: list[list[Event]] = [[] for _ in self.choices]
        async for event in self.events():
            assert event is not None
            found[event.choice.index].append(event)
        return found

    def cancel(self, reason: FinishReason = FinishReason.ABORT) -> None:
        """Nobody waits any more: end what still runs and free its pages. After the end it does nothing."""
        for pump in self._pumps:
            pump.cancel()
        for choice in self.choices:
            if choice.finish_reason is None:
                choice.stream.cancel()
                choice.finish_reason = reason
                self._metrics.ended(reason)

    def usage(self) -> dict[str, object]:
        """Tokens of all choices, as OpenAI counts: a prompt once, however many answers it got."""
        per_prompt = max(1, len(self.choices) // self.num_prompts)
        first = self.choices[::per_prompt]
        num_prompt = sum(len(choice.prompt.token_ids) for choice in first)
        num_generated = sum(choice.num_generated for choice in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached for choice in first)},
        }


def _take(choice: Choice, update: Update) -> Event:
    """Take an engine's update into a choice."""
    choice.num_cached = update.num_cached
    if update.prompt_logprobs is not None:
        choice.prompt_logprobs = update.prompt_logprobs
    progress = _progress(choice, update)
    offsets: list[int] = []
    for token_id in update.token_ids:
        offsets.append(len(choice.text.text))
        choice.text.add(token_id)
        choice.num_generated += 1
        if choice.text.stopped:
            break
    if update.finish_reason is not None:
        choice.text.finish()
    choice.finish_reason = FinishReason.STOP if choice.text.stopped else update.finish_reason
    text = choice.text.text
    end = len(text) - (_held_back(text, choice.params.stop) if choice.finish_reason is None else 0)
    first, choice.num_sent = choice.num_sent, max(choice.num_sent, end)
    return Event(choice, text[first:end], update.logprobs[: len(offsets)], offsets, progress)


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of a text that may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest


def _progress(choice: Choice, update: Update) -> Progress | None:
    """None if nothing has changed."""
    total, done = len(choice.prompt.token_ids), update.num_prefilled
    if update.is_recovering:
        choice.samples.clear()
        choice.num_prefilled = done
        return Progress(total, update.num_cached, done, update.since_start_s, None, is_recovering=True)
    if done == choice.num_prefilled:
        return None
    if done < choice.num_prefilled:  # it had to give up its pages, and starts again
        choice.samples.clear()
    choice.num_prefilled = done
    choice.samples.append((done - update.num_cached, update.since_start_s))
    left_s = time_left_s(choice.samples, total - update.num_cached) if total > update.num_cached else 0.0
    return Progress(total, update.num_cached, done, update.since_start_s, left_s)
