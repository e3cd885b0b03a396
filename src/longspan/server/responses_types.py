"""Requests of OpenAI's Responses API, and their conversion to those of the chat API, which are then served.

Holds the types of `/v1/responses`. Must not know how requests run.
Read next: `longspan.server.responses`, the answers; `longspan.server.messages`, what they become.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from longspan.server.fields import Body, JsonSchema, ResponseFormat, legal
from longspan.server.messages import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    FunctionCall,
    FunctionTool,
    Message,
    NamedFunction,
    NamedTool,
    Tool,
    ToolCall,
)
from longspan.server.protocol import ChatRequest


class ContentPart(Body):
    """Text part of an item; what an answer had beside its text is taken back."""

    TAKEN: ClassVar = frozenset({"annotations", "logprobs"})
    type: Literal["input_text", "output_text", "reasoning_text", "summary_text", "text"]
    text: str


def _text_or_parts(value: Any) -> str | None:
    if isinstance(value, str):
        return "(text)"
    return "(parts)" if isinstance(value, list) else None


_CONTENT_RULE: dict[str, Any] = {
    "custom_error_type": "longspan",
    "custom_error_message": "legal is a text or a list of parts of the type 'input_text' or 'output_text'",
}
ItemContent = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[ContentPart], Field(max_length=MAX_PARTS), Tag("(parts)")],
    Discriminator(_text_or_parts, **_CONTENT_RULE),
]


def text_of(content: str | Sequence[ContentPart]) -> str:
    """Return the text of an item's content."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class MessageItem(Body):
    """Message."""

    TAKEN: ClassVar = frozenset({"id", "status", "phase"})
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: ItemContent


class CallItem(Body):
    """Call of a function, in the history."""

    TAKEN: ClassVar = frozenset({"id", "status"})
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class ResultItem(Body):
    """Result of a call."""

    TAKEN: ClassVar = frozenset({"id", "status"})
    type: Literal["function_call_output"]
    call_id: str
    output: ItemContent


class ReasoningItem(Body):
    """What the model thought."""

    TAKEN: ClassVar = frozenset({"id", "status", "encrypted_content", "summary"})
    type: Literal["reasoning"]
    content: list[ContentPart] | None = None


_ITEMS = {"message", "function_call", "function_call_output", "reasoning"}


def _kind_of_item(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    kind = "message" if kind is None else kind
    return f"({kind})" if kind in _ITEMS else None


Item = Annotated[
    Annotated[MessageItem, Tag("(message)")]
    | Annotated[CallItem, Tag("(function_call)")]
    | Annotated[ResultItem, Tag("(function_call_output)")]
    | Annotated[ReasoningItem, Tag("(reasoning)")],
    Discriminator(
        _kind_of_item,
        custom_error_type="longspan",
        custom_error_message=f"legal is an item of the type {', '.join(sorted(_ITEMS))}",
    ),
]


class ResponseTool(Body):
    """Function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def for_chat(self) -> Tool:
        """Return the tool as the chat API has it."""
        function = FunctionTool(
            name=self.name, description=self.description, parameters=self.parameters, strict=self.strict
        )
        return Tool(type="function", function=function)


class NamedChoice(Body):
    """Choice of one function."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """Form that the text must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    def for_chat(self) -> ResponseFormat:
        """Return the form as the chat API has it.

        Raises:
            pydantic.ValidationError: a schema is missing, or one too many.
        """
        if self.schema_ is None:
            return ResponseFormat.model_validate({"type": self.type})
        schema = JsonSchema.model_validate({"name": self.name, "schema": self.schema_})
        return ResponseFormat.model_validate({"type": self.type, "json_schema": schema})


class TextOptions(Body):
    """Options of the text."""

    REFUSED: ClassVar = {"verbosity": ("medium",)}
    format: TextFormat | None = None


class ReasoningOptions(Body):
    """Options of thoughts."""

    TAKEN: ClassVar = frozenset({"summary", "generate_summary"})  # thoughts are told whole
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


_CHOICE_RULE = 'none, auto, required, or {"type": "function", "name": NAME}'


class ResponsesRequest(Body):
    """Body of `POST /v1/responses`."""

    TAKEN: ClassVar = frozenset(
        {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "client_metadata"}
    )
    REFUSED: ClassVar = {
        "background": (False,),
        "truncation": ("disabled",),
        "include": ([], ["reasoning.encrypted_content"]),
        "max_tool_calls": (),
        "top_logprobs": (0,),
        "conversation": (),
        "prompt": (),
        "service_tier": ("auto", "default"),
        "stream_options": ({}, {"include_obfuscation": False}),
        "context_management": (),
    }
    ENTRIES: ClassVar = {"input": (None, MAX_MESSAGES)}

    model: str | None = None
    input: Annotated[
        Annotated[str, Tag("(text)")]
        | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES), Tag("(items)")],
        Discriminator(
            lambda value: "(text)" if isinstance(value, str) else "(items)" if isinstance(value, list) else None,
            custom_error_type="longspan",
            custom_error_message="legal is a text or a list of items",
        ),
    ]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    """Whether a later request can go on from the response; true by default."""
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[Literal["none", "auto", "required"] | NamedChoice | None, legal(_CHOICE_RULE)] = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None

    def new_messages(self) -> list[Message]:
        """Return the input as messages of the chat API: what one turn thought, said and called is one message there."""
        if isinstance(self.input, str):
            return [Message(role="user", content=self.input)]
        found: list[Message] = []
        thoughts: list[str] = []
        for item in self.input:
            if isinstance(item, ReasoningItem):
                thoughts += [part.text for part in item.content or ()]
            elif isinstance(item, ResultItem):
                found.append(Message(role="tool", content=text_of(item.output), tool_call_id=item.call_id))
            elif isinstance(item, MessageItem) and item.role != "assistant":
                found.append(Message(role=item.role, content=text_of(item.content)))
            else:
                _extend_turn(found, item, "\n".join(thoughts))
                thoughts = []
        return found

    def chat_request(self, earlier: Sequence[Message]) -> ChatRequest:
        """Return the request of the chat API that asks for the same.

        Args:
            earlier: the conversation so far.

        Raises:
            pydantic.ValidationError: fields contradict each other.
        """
        first = [Message(role="system", content=self.instructions)] if self.instructions else []
        choice: Any = self.tool_choice
        if isinstance(choice, NamedChoice):
            choice = NamedTool(type="function", function=NamedFunction(name=choice.name))
        form = None if self.text is None or self.text.format is None else self.text.format.for_chat()
        return ChatRequest.model_validate(
            {
                "model": self.model,
                "messages": [*first, *earlier, *self.new_messages()],
                "tools": None if self.tools is None else [tool.for_chat() for tool in self.tools],
                "tool_choice": choice,
                "parallel_tool_calls": self.parallel_tool_calls,
                "max_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
                "response_format": form,
                "stream": self.stream,
            }
        )


def _extend_turn(found: list[Message], item: Any, thoughts: str) -> None:
    """Add an assistant's text or call to its last message, or begin one."""
    text = text_of(item.content) if isinstance(item, MessageItem) else None
    last = found[-1] if found and found[-1].role == "assistant" else None
    if last is None or thoughts or (text is not None and (last.content is not None or last.tool_calls)):
        last = Message(role="assistant", content=None, reasoning_content=thoughts or None)
        found.append(last)
    if text is not None:
        last.content = text
    else:
        call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
        last.tool_calls = [*(last.tool_calls or ()), call]
