"""Messages of a conversation, and tools, as OpenAI's chat API has them.

Holds their types, and the form in which chat templates read them. Must not know requests, templates or answers.
Read next: `longspan.server.protocol`, whose `ChatRequest` holds them; `longspan.server.templates`, which renders them.
"""

import json
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from longspan.server.fields import Body

MAX_MESSAGES, MAX_PARTS, MAX_CALLS, MAX_TOOLS = 16_384, 2048, 1024, 1024
"""Most messages of a conversation, most parts and calls of one message, and most tools of a request."""


class TextPart(Body):
    """Text part of a message."""

    TAKEN: ClassVar = frozenset({"cache_control"})  # every prompt is cached as far as there is room

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """Call of a function, as the model made it."""

    name: str
    arguments: str | dict[str, Any] | None = None
    """JSON text of the arguments, or the object itself."""


class ToolCall(Body):
    """Call of a tool in the history."""

    TAKEN: ClassVar = frozenset({"index", "cache_control"})  # SDKs send back what a stream had

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """Return the call as templates read it: arguments as an object, if they are one."""
        arguments: Any = self.function.arguments
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = self.function.arguments  # a model may have written what is no JSON
        call = {"name": self.function.name, "arguments": {} if arguments is None else arguments}
        return {"type": "function", "function": call} | ({} if self.id is None else {"id": self.id})


def _kind_of_content(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return "(text)"
    return "(parts)" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str | None, Tag("(text)")] | Annotated[list[TextPart], Field(max_length=MAX_PARTS), Tag("(parts)")],
    Discriminator(
        _kind_of_content,
        custom_error_type="longspan",
        custom_error_message=f"legal is a text, or a list of up to {MAX_PARTS} parts of the type 'text'",
    ),
]
"""Text, parts or nothing. Tags in brackets are left out where an error names a field."""


class Message(Body):
    """One message of a conversation."""

    REFUSED: ClassVar = {"function_call": (), "refusal": (), "audio": (), "annotations": ([],)}
    TAKEN: ClassVar = frozenset({"cache_control"})
    ENTRIES: ClassVar = {"content": (TextPart, MAX_PARTS)}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    """Text; an assistant's message may have none, if it was a call or stayed empty."""
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """Another name of `reasoning_content`."""
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _fits_role(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError(
                "longspan", "content: got none, legal with the role {role} is a text or parts", {"role": self.role}
            )
        for name, role in (
            ("tool_calls", "assistant"),
            ("reasoning_content", "assistant"),
            ("reasoning", "assistant"),
            ("tool_call_id", "tool"),
        ):
            if getattr(self, name) and self.role != role:
                raise PydanticCustomError(
                    "longspan", "{name}: legal with the role {role} alone", {"name": name, "role": role}
                )
        return self

    @property
    def text(self) -> str:
        """The text of all parts."""
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """Return the message in the form that chat templates read."""
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.name is not None:
            found["name"] = self.name
        if thoughts := self.reasoning_content or self.reasoning:
            found["reasoning_content"] = found["thinking"] = thoughts
        if self.tool_calls:
            found["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        return found


class FunctionTool(Body):
    """Function that the model may call."""

    TAKEN: ClassVar = frozenset({"cache_control"})

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments; none is a function without arguments."""
    strict: bool | None = None
    """Whether a call that the model makes by itself must follow the schema too."""

    @model_validator(mode="after")
    def _has_name(self) -> "FunctionTool":
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,128}", self.name):
            raise PydanticCustomError(
                "longspan", "name: legal is 1 to 128 letters, digits, dots, colons, dashes and underscores"
            )
        return self


class Tool(Body):
    """Tool of a request."""

    TAKEN: ClassVar = frozenset({"cache_control"})

    type: Literal["function"]
    function: FunctionTool

    def for_template(self) -> dict[str, Any]:
        """Return the tool in the form that chat templates read."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}, **function}}


class NamedFunction(Body):
    """Name of a function."""

    name: str


class NamedTool(Body):
    """Choice of one tool."""

    type: Literal["function"]
    function: NamedFunction
