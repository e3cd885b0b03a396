"""Answers to one HTTP request: their submission to the engine, and the merge of their updates.

Holds choices while they run. Must not know HTTP, the shape of answers, or how tokens become text.
Read next: `longspan.engine.output_reader`, `longspan.engine.async_engine`; `longspan.server.completions`, which turns
deltas into JSON.

    prompts x n  -->  RequestStream per choice  --(pump task per choice)-->  one queue  -->  deltas, in order
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longspan.engine.output_reader import OutputDelta, OutputReader
from longspan.engine.request_stream import RequestStream
from longspan.engine.update import Update
from longspan.errors import LongspanError
from longspan.models.detokenizer import with_special_stops
from longspan.scheduler.request import Constraint
from longspan.server.access_log import RequestRecord
from longspan.server.errors import ApiError
from longspan.server.grammars import CallRule
from longspan.server.metrics import RequestMetrics
from longspan.server.protocol import MAX_PROMPTS, nth_choice
from longspan.server.state import ServerState
from longspan.types import Adapter, FinishReason, SamplingParams

MAX_BEHIND = 4096
"""Updates that may wait for a client that reads slowly; one more ends its answer."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Prompt to continue."""

    text: str | None
    """Text of the prompt; None if the client sent token ids, unless the answer repeats the prompt."""
    token_ids: list[int]


@dataclass(slots=True)
class AnswerChoice:
    """One answer while it is being made."""

    index: int
    prompt: EncodedPrompt
    stream: RequestStream
    reader: OutputReader


class Generation:
    """All answers to one HTTP request."""

    def __init__(
        self, state: ServerState, num_prompts: int, record: RequestRecord, adapter: Adapter | None = None
    ) -> None:
        self._state = state
        self.model_name = state.name_of(adapter)
        """What clients call what answers."""
        self.choices: list[AnswerChoice] = []
        self.num_prompts = num_prompts
        self._queue: asyncio.Queue[tuple[AnswerChoice, Update | LongspanError]] = asyncio.Queue()
        self._pumps: list[asyncio.Task[None]] = []
        self._metrics = RequestMetrics(state.metrics)
        self._record = record
        self._started_s = time.perf_counter()

    @classmethod
    async def start(
        cls,
        state: ServerState,
        prompts: Sequence[EncodedPrompt],
        params: SamplingParams,
        num_choices: int,
        record: RequestRecord,
        *,
        adapter: Adapter | None = None,
        field: str = "response_format",
        calls: CallRule | None = None,
        wrap: Callable[[Constraint], Constraint] | None = None,
    ) -> "Generation":
        """Submit all choices, or none.

        Args:
            state: state of the server.
            prompts: prompts, each of which gets `num_choices` answers.
            params: sampling parameters of every prompt's first choice.
            num_choices: answers per prompt.
            record: where the log finds what is told of the request.
            adapter: what all answers are generated with beside the model, or None.
            field: field of the request that says which form answers have, for errors.
            calls: rule for calls in an answer that is free else.
            wrap: makes of a choice's constraint the one that counts.

        Raises:
            LongspanError, ApiError: a choice was refused; nothing runs.
        """
        queue = state.config.max_queued_requests
        slots = state.engine.config.max_num_seqs
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
            state.lengths.check(len(prompt.token_ids), params.max_tokens)
        record.prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        record.params, record.num_choices, record.num_sequences = params, num_choices, total
        generation = cls(state, len(prompts), record, adapter)
        params = with_special_stops(state.tokenizers.tokenizer, params)
        try:
            constraint = await state.grammars.constraints(params, field, calls)
            for prompt in prompts:
                for i in range(num_choices):
                    one = nth_choice(params, i)
                    made = constraint()
                    made = wrap(made) if made is not None and wrap is not None else made
                    stream = await state.engine.submit(prompt.token_ids, one, constraint=made, adapter=adapter)
                    reader = OutputReader(state.tokenizers.tokenizer, prompt.token_ids, one)
                    generation.choices.append(AnswerChoice(len(generation.choices), prompt, stream, reader))
                    await asyncio.sleep(0)  # a thousand choices must not hold up other requests
        except BaseException:
            generation.cancel()
            raise
        generation.begin()
        return generation

    def begin(self) -> None:
        """Start to collect the updates of the choices."""
        self._pumps = [asyncio.create_task(self._pump(choice)) for choice in self.choices]

    async def _pump(self, choice: AnswerChoice) -> None:
        try:
            async for update in choice.stream:
                if self._queue.qsize() > MAX_BEHIND + 16 * len(self.choices):
                    choice.stream.cancel()
                    raise LongspanError("the client reads too slowly")
                self._queue.put_nowait((choice, update))
        except LongspanError as error:
            self._queue.put_nowait((choice, error))

    async def deltas(
        self, silence_s: float | None = None
    ) -> AsyncGenerator[tuple[AnswerChoice, OutputDelta] | None, None]:
        """Yield every choice's deltas until all choices have ended. Close it, for the log to know what was generated.

        Args:
            silence_s: seconds without a delta after which None is yielded; with None, it never is.

        Raises:
            LongspanError: the engine failed; all choices have ended.
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
                if choice.reader.finish_reason is not None:
                    continue  # the choice ended at a stop string before this update came
                delta = choice.reader.read(update)
                if self._record.first_token_s is None and update.token_ids:
                    self._record.first_token_s = time.perf_counter() - self._started_s
                    self._record.prefill_s = update.since_start_s
                self._metrics.advanced(choice.index, len(choice.prompt.token_ids), len(update.token_ids))
                if delta.finish_reason is not None:
                    num_running -= 1
                    if update.finish_reason is None:
                        choice.stream.cancel()  # at a stop string: the engine does not know text
                    self._metrics.ended(delta.finish_reason)
                yield choice, delta
        finally:
            self.cancel()
            self._note()

    def _note(self) -> None:
        """Take down for the log what became of the choices."""
        usage = self.usage()
        self._record.ended_s = time.perf_counter() - self._started_s
        self._record.generated_tokens = usage["completion_tokens"]
        self._record.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        reasons = [choice.reader.finish_reason for choice in self.choices]
        self._record.reasons = tuple(dict.fromkeys("abort" if one is None else one.value for one in reasons))

    async def finish(self) -> list[list[OutputDelta]]:
        """Wait for all choices to end; return the deltas of each."""
        found: list[list[OutputDelta]] = [[] for _ in self.choices]
        async for one in self.deltas():
            assert one is not None
            choice, delta = one
            found[choice.index].append(delta)
        return found

    def cancel(self, reason: FinishReason = FinishReason.ABORT) -> None:
        """End the choices that still run, and free their pages. After the end it does nothing."""
        for pump in self._pumps:
            pump.cancel()
        for choice in self.choices:
            if choice.reader.finish_reason is None:
                choice.stream.cancel()
                choice.reader.end(reason)
                self._metrics.ended(reason)

    def usage(self) -> dict[str, Any]:
        """Return the token counts of all choices, as OpenAI counts: a prompt once, however many answers it has."""
        per_prompt = max(1, len(self.choices) // self.num_prompts)
        first = self.choices[::per_prompt]
        num_prompt = sum(len(choice.prompt.token_ids) for choice in first)
        num_generated = sum(choice.reader.num_generated for choice in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(choice.reader.num_cached for choice in first)},
            **self._draft_details(),
        }

    def _draft_details(self) -> dict[str, Any]:
        """Return the counts of drafts, if the engine has any."""
        if not self._state.engine.has_drafts:
            return {}
        accepted = sum(choice.reader.num_accepted for choice in self.choices)
        rejected = sum(choice.reader.num_rejected for choice in self.choices)
        counts = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}
        return {"completion_tokens_details": counts}
