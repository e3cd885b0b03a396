"""Requests of Anthropic's API, and their conversion to those of the chat API, which are then served.

Holds the types of `/v1/messages`. Must not know how requests run.
Read next: `longspan.server.anthropic`, the answers; `longspan.server.messages`, what they become.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from longspan.server.fields import Body
from longspan.server.messages import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    FunctionCall,
    FunctionTool,
    Message,
    NamedFunction,
    NamedTool,
    TextPart,
    Tool,
    ToolCall,
)
from longspan.server.protocol import MAX_STOP_LEN, MAX_STOPS, ChatRequest

_CACHED: frozenset[str] = frozenset({"cache_control", "citations"})


class TextBlock(Body):
    """Text."""

    TAKEN: ClassVar = _CACHED
    type: Literal["text"]
    text: str


class ThinkingBlock(Body):
    """What the model thought."""

    TAKEN: ClassVar = frozenset({"signature", "cache_control"})  # nobody else could read what a signature protects
    type: Literal["thinking"]
    thinking: str


class ToolUseBlock(Body):
    """Call of a tool, in the history."""

    TAKEN: ClassVar = frozenset({"cache_control", "caller"})
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Body):
    """Result of a call."""

    TAKEN: ClassVar = frozenset({"cache_control"})
    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[
        Annotated[str | None, Tag("(text)")] | Annotated[list[TextBlock], Tag("(parts)")],
        Discriminator(lambda value: "(parts)" if isinstance(value, list) else "(text)"),
    ] = None
    is_error: bool | None = None

    @property
    def text(self) -> str:
        """The result's text; one that is an error says so."""
        content = self.content or ""
        text = content if isinstance(content, str) else "\n".join(block.text for block in content)
        return f"Error: {text}" if self.is_error else text


_BLOCKS = {"text", "thinking", "tool_use", "tool_result"}


def _kind_of_block(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"({kind})" if kind in _BLOCKS else None


AnyBlock = Annotated[
    Annotated[TextBlock, Tag("(text)")]
    | Annotated[ThinkingBlock, Tag("(thinking)")]
    | Annotated[ToolUseBlock, Tag("(tool_use)")]
    | Annotated[ToolResultBlock, Tag("(tool_result)")],
    Discriminator(
        _kind_of_block,
        custom_error_type="longspan",
        custom_error_message=f"legal is a block of the type {', '.join(sorted(_BLOCKS))}",
    ),
]


def _text_or_list(value: Any) -> str | None:
    if isinstance(value, str):
        return "(text)"
    return "(blocks)" if isinstance(value, list) else None


_CONTENT_RULE: dict[str, Any] = {
    "custom_error_type": "longspan",
    "custom_error_message": "legal is a text or a list of blocks",
}


class Turn(Body):
    """Message of a conversation."""

    ENTRIES: ClassVar = {"content": (None, MAX_PARTS)}
    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("(text)")] | Annotated[list[AnyBlock], Field(max_length=MAX_PARTS), Tag("(blocks)")],
        Discriminator(_text_or_list, **_CONTENT_RULE),
    ]

    @model_validator(mode="after")
    def _fits_role(self) -> "Turn":
        wrong = ("tool_result",) if self.role == "assistant" else ("tool_use", "thinking")
        if not isinstance(self.content, str) and any(block.type in wrong for block in self.content):
            raise PydanticCustomError(
                "longspan", "content: got a block that the role {role} cannot have", {"role": self.role}
            )
        return self

    def messages(self) -> list[Message]:
        """Return the message as those of the chat API: results of tools are messages of their own there."""
        if isinstance(self.content, str):
            return [Message(role=self.role, content=self.content)]
        found = [
            Message(role="tool", content=block.text, tool_call_id=block.tool_use_id)
            for block in self.content
            if isinstance(block, ToolResultBlock)
        ]
        texts = [TextPart(type="text", text=block.text) for block in self.content if isinstance(block, TextBlock)]
        thoughts = "\n".join(block.thinking for block in self.content if isinstance(block, ThinkingBlock))
        calls = [
            ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=json.dumps(block.input)))
            for block in self.content
            if isinstance(block, ToolUseBlock)
        ]
        if self.role == "assistant":
            content = "\n".join(part.text for part in texts) or None
            found.append(
                Message(role="assistant", content=content, reasoning_content=thoughts or None, tool_calls=calls or None)
            )
        elif texts or not found:
            found.append(Message(role="user", content="\n".join(part.text for part in texts)))
        return found


class ClientTool(Body):
    """Tool that the client runs."""

    TAKEN: ClassVar = frozenset({"cache_control", "eager_input_streaming"})
    REFUSED: ClassVar = {"defer_loading": (False,), "input_examples": ([],)}
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Body):
    """Which tools the model may or must call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ToolChoice":
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError("longspan", "name: legal with the type tool, and only with it")
        return self


class Thinking(Body):
    """Whether the model thinks first."""

    TAKEN: ClassVar = frozenset({"budget_tokens", "display"})  # the model itself ends its thoughts
    type: Literal["enabled", "disabled", "adaptive"]


class CountRequest(Body):
    """Body of `POST /v1/messages/count_tokens`."""

    TAKEN: ClassVar = frozenset({"cache_control", "metadata", "service_tier", "betas"})
    REFUSED: ClassVar = {"mcp_servers": ([],), "container": (), "context_management": (), "output_config": ({},)}
    ENTRIES: ClassVar = {"messages": (Turn, MAX_MESSAGES), "system": (TextBlock, MAX_PARTS)}

    model: str | None = None
    messages: list[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Annotated[
        Annotated[str | None, Tag("(text)")] | Annotated[list[TextBlock], Tag("(blocks)")],
        Discriminator(lambda value: "(blocks)" if isinstance(value, list) else "(text)"),
    ] = None
    tools: Annotated[list[ClientTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    def conversation(self) -> list[Message]:
        """Return the conversation as messages of the chat API."""
        system = self.system or ""
        text = system if isinstance(system, str) else "\n".join(block.text for block in system)
        first = [Message(role="system", content=text)] if text else []
        return first + [message for turn in self.messages for message in turn.messages()]

    def chat_fields(self) -> dict[str, Any]:
        """Return the fields of the chat API's request."""
        found: dict[str, Any] = {"model": self.model, "messages": self.conversation()}
        if self.tools:
            found["tools"] = [_tool(tool) for tool in self.tools]
        if self.thinking is not None:
            found["reasoning_effort"] = "none" if self.thinking.type == "disabled" else "medium"
        choice = self.tool_choice
        if choice is None:
            return found
        found["tool_choice"] = {"auto": "auto", "any": "required", "none": "none"}.get(choice.type)
        if choice.name is not None:
            found["tool_choice"] = NamedTool(type="function", function=NamedFunction(name=choice.name))
        if choice.disable_parallel_tool_use is not None:
            found["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        return found

    def chat_request(self) -> ChatRequest:
        """Return the request of the chat API that asks for the same.

        Raises:
            pydantic.ValidationError: fields contradict each other.
        """
        return ChatRequest.model_validate(self.chat_fields())


class MessagesRequest(CountRequest):
    """Body of `POST /v1/messages`."""

    max_tokens: int = Field(ge=1)
    stop_sequences: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LEN)]], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = None
    top_k: int | None = None

    def chat_fields(self) -> dict[str, Any]:
        """Return the fields of the chat API's request."""
        names = ("max_tokens", "stream", "temperature", "top_p", "top_k")
        return super().chat_fields() | {name: getattr(self, name) for name in names} | {"stop": self.stop_sequences}


def _tool(tool: ClientTool) -> Tool:
    function = FunctionTool(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return Tool(type="function", function=function)
