"""The one way from a conversation to its answers: prompt, constraint, generation, and what the answers hold.

Holds the start of a generation for a conversation, and the reading of its choices. Must not know the shape of any API's
answers.
Read next: `longspan.server.chat`, `longspan.server.responses`, `longspan.server.anthropic`: three shapes;
`longspan.server.parsing.base`.
"""

import asyncio
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from longspan.engine.output_reader import OutputDelta
from longspan.scheduler.request import Constraint
from longspan.server.access_log import RequestRecord
from longspan.server.errors import ApiError
from longspan.server.generation import EncodedPrompt, Generation
from longspan.server.grammars import AfterThoughts, CallRule
from longspan.server.messages import Tool
from longspan.server.parsing.base import CallArguments, CallStart, Parser, Piece, Text, Thought
from longspan.server.parsing.formats import Schemas
from longspan.server.parsing.grammar import calls_grammar, strict_calls
from longspan.server.protocol import ChatRequest
from longspan.server.state import ServerState
from longspan.server.templates import Conversation, RenderedPrompt, render
from longspan.types import FinishReason


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation whose answers are being generated."""

    generation: Generation
    make_parser: Callable[[], Parser]
    short_ids: bool

    def read_choice(self) -> "ChoiceReader":
        """Return a reader for one choice, to which all its deltas go in order."""
        return ChoiceReader(self.make_parser(), short_ids=self.short_ids)


async def start_dialogue(state: ServerState, body: ChatRequest, record: RequestRecord) -> Dialogue:
    """Begin to answer a conversation.

    Args:
        state: state of the server.
        body: the request.
        record: where the log finds what is told of it.

    Raises:
        LongspanError, ApiError: the request is refused.
    """
    adapter, defaults, parsers = state.adapter_of(body.model), state.sampling_defaults, state.parsers
    asked = body.asked_max_tokens
    more = _forced(state, body)
    schemas = {tool.function.name: schema_of(tool) for tool in body.offered_tools} or None
    if parsers.are_thoughts_special or (schemas is not None and parsers.are_calls_special):
        more["skip_special_tokens"] = False
    least = body.min_tokens or 1 if asked is None else asked
    await body.in_thread_if_long(lambda: body.sampling_params(least, defaults, **more))  # refused before any work
    prompt = await render(state, conversation_of(body))
    token_ids = body.truncated(prompt.token_ids)
    default = max(defaults.get("max_tokens", 2**31 - 1), body.min_tokens or 1)
    clamps = state.config.clamp_max_tokens
    max_tokens = await asyncio.to_thread(state.lengths.max_tokens, len(token_ids), asked, default, clamps=clamps)
    params = await body.in_thread_if_long(lambda: body.sampling_params(max_tokens, defaults, **more))
    generation = await Generation.start(
        state,
        [EncodedPrompt(prompt.text, token_ids)],
        params,
        body.num_choices,
        record,
        adapter=adapter,
        field="tools" if body.offered_tools and not body.form() else body.form_field,
        calls=_strict(state, body),
        wrap=_waits_for_thoughts(state, prompt),
    )
    is_forced = bool(body.forced_tools)
    return Dialogue(
        generation, lambda: parsers.make(schemas, prompt.text, is_forced=is_forced), parsers.call_format.short_ids
    )


def schema_of(tool: Tool) -> dict[str, object]:
    """Return the JSON schema of a tool's arguments."""
    return tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def conversation_of(body: ChatRequest) -> Conversation:
    """Return what the chat template renders for a request."""
    return Conversation(
        body.messages,
        tools=body.offered_tools,
        variables=body.chat_template_kwargs or {},
        reasoning_effort=body.reasoning_effort,
        wants_answer=body.add_generation_prompt is not False,
        continues=bool(body.continue_final_message),
        add_special_tokens=body.add_special_tokens is True,
    )


def _forced(state: ServerState, body: ChatRequest) -> dict[str, object]:
    """Return the sampling parameter that forces calls, if the request does."""
    forced = body.forced_tools
    if not forced:
        return {}
    schemas: Schemas = {tool.function.name: schema_of(tool) for tool in forced}
    _check_schemas(schemas.values())
    parallel = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, BaseModel)
    return {"grammar": calls_grammar(state.parsers.calls, schemas, state.marks, parallel=parallel)}


def _strict(state: ServerState, body: ChatRequest) -> CallRule | None:
    """Return the rule for calls that the model makes by itself, if a tool is strict; others take any object."""
    tools = body.offered_tools
    if body.forced_tools or not any(tool.function.strict for tool in tools):
        return None
    if not state.parsers.reads_forced:
        legal = "none: this model's format of calls is known by its response template alone, which forces nothing"
        raise ApiError(400, f"tools: got a strict one, legal is {legal}", param="tools")
    _check_schemas(schema_of(tool) for tool in tools)
    anything: dict[str, object] = {"type": "object"}
    schemas = {tool.function.name: schema_of(tool) if tool.function.strict else anything for tool in tools}
    begin, grammar = strict_calls(state.parsers.calls, schemas, state.marks)
    return CallRule(begin, grammar)


def _check_schemas(schemas: Iterable[Mapping[str, object]]) -> None:
    if any("x-guidance" in schema for schema in schemas):
        raise ApiError(400, "tools: got the key 'x-guidance', legal are those of JSON Schema", param="tools")


def _waits_for_thoughts(state: ServerState, prompt: RenderedPrompt) -> Callable[[Constraint], Constraint] | None:
    """Return what lets the model think before a constraint counts; None if it does not think."""
    parsers = state.parsers
    if parsers.thought_marks is None:
        return None
    start, end = (state.marks.get(mark) for mark in parsers.thought_marks)
    if start is None or end is None:
        return None  # marks of several tokens: thoughts cannot be told from text, so there are none
    is_inside = parsers.begins_inside(prompt.text)
    return lambda inner: AfterThoughts(inner, start, end, is_inside=is_inside)


@dataclass(slots=True)
class Call:
    """Call of a tool."""

    call_id: str
    name: str
    arguments: str = ""
    """JSON text."""


@dataclass(slots=True)
class ChoiceReader:
    """Puts one choice together."""

    parser: Parser
    short_ids: bool = False
    text: str = ""
    thoughts: str = ""
    calls: list[Call] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    _num_before_answer: int | None = None

    def read(self, delta: OutputDelta) -> Sequence[Piece]:
        """Take in the next delta; return what it adds."""
        pieces = [*self.parser.feed(delta.text)] if delta.text else []
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            pieces += self.parser.finish()
        for piece in pieces:
            if self._num_before_answer is None and not isinstance(piece, Thought):
                self._num_before_answer = self.num_tokens
            match piece:
                case Thought(text):
                    self.thoughts += text
                case Text(text):
                    self.text += text
                case CallStart(name):
                    self.calls.append(Call(self._new_id(), name))
                case CallArguments(text):
                    self.calls[-1].arguments += text
        self.num_tokens += len(delta.token_ids)
        return pieces

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens generated before the answer, if there were thoughts."""
        if not self.thoughts:
            return 0
        return self.num_tokens if self._num_before_answer is None else self._num_before_answer

    @property
    def reason(self) -> str | None:
        """Finish reason in the words of OpenAI's API."""
        if self.finish_reason is FinishReason.STOP and self.calls:
            return "tool_calls"
        return None if self.finish_reason is None else self.finish_reason.value

    def _new_id(self) -> str:
        return uuid.uuid4().hex[:9] if self.short_ids else f"call_{uuid.uuid4().hex}"
