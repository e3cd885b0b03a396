"""Parts that request types share: the base class, and fields with rules of their own.

Holds `Body`, and the types of single fields. Must not know routes, engines or answers.
Read next: `longspan.server.protocol`, the requests; `longspan.server.messages`, the parts of a conversation.

Note [No field is ignored]
    A field that is declared is honoured. A field in a class's `REFUSED`, unless its value asks for nothing, and an
    unknown field are answered 400 by name. Fields in a class's `TAKEN` are accepted whatever they say, for the reason
    that stands there. With the option `unknown_fields="warn"` unknown fields are dropped (`longspan.server.bodies`).
"""

import json
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


def legal(rule: str) -> WrapValidator:
    """Make a validator with one message for a field of several types; pydantic would give one for each."""

    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise PydanticCustomError("longspan", "legal is {rule}", {"rule": rule}) from None

    return WrapValidator(check)


class Body(BaseModel):
    """Request type that refuses unknown fields and converts no types."""

    model_config = ConfigDict(extra="forbid", strict=True)

    REFUSED: ClassVar[dict[str, tuple[object, ...]]] = {}
    """Fields of the API that are not supported, with the values, beside null, that ask for nothing and are accepted."""
    TAKEN: ClassVar[frozenset[str]] = frozenset()
    """Fields that are dropped whatever they say, since they ask for nothing that an answer could show."""
    ENTRIES: ClassVar[dict[str, tuple[Any, int]]] = {}
    """Fields that are long lists of objects: the type of an entry, and the most entries."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        """Drop refused fields that ask for nothing; the others are refused here, or later as unknown fields."""
        if not isinstance(data, dict):
            return data
        kept = {name: value for name, value in data.items() if name not in cls.TAKEN}
        for name, harmless in cls.REFUSED.items():
            if name in kept:
                value = kept[name]
                if value is None or any(type(value) is type(other) and value == other for other in harmless):
                    del kept[name]
                elif harmless:
                    rule = " or ".join(msgspec.json.encode(other).decode() for other in harmless)
                    error = PydanticCustomError("longspan", "only {rule} is supported", {"rule": rule})
                    details = InitErrorDetails(type=error, loc=(name,), input=value)
                    raise ValidationError.from_exception_data(cls.__name__, [details])
        return kept


class StreamOptions(Body):
    """Options of a stream."""

    REFUSED: ClassVar = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    """Whether a last chunk without choices has `usage`."""
    continuous_usage_stats: bool | None = None
    """Whether every chunk has `usage` so far, as in vLLM."""


class JsonSchema(Body):
    """A named JSON schema."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """Accepted without effect: the answer always follows the schema."""


class ResponseFormat(Body):
    """Form that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("longspan", "json_schema goes with the type 'json_schema', and only with it")
        return self

    def schema_text(self) -> str | None:
        """Return the JSON schema that the answer must follow, as JSON; None for plain text."""
        if self.type == "text":
            return None
        schema = {"type": "object"} if self.json_schema is None else self.json_schema.schema_
        return msgspec.json.encode(schema).decode()


class StructuredOutputs(Body):
    """Form that the answer must have, in vLLM's words: exactly one of these."""

    REFUSED: ClassVar = {
        "disable_fallback": (False, True),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
        "structural_tag": (),
    }

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    """JSON schema, or its text."""
    json_object: bool | None = None
    regex: str | None = Field(default=None, min_length=1)
    choice: list[str] | None = Field(default=None, min_length=1)
    grammar: str | None = Field(default=None, min_length=1)
    """Grammar in llguidance's dialect of Lark."""

    @model_validator(mode="after")
    def _has_one(self) -> "StructuredOutputs":
        given = [self.json_, self.json_object or None, self.regex, self.choice, self.grammar]
        if sum(one is not None for one in given) != 1:
            raise PydanticCustomError("longspan", "legal is exactly one of json, json_object, regex, choice, grammar")
        return self

    def params(self) -> dict[str, str]:
        """Return the field of `SamplingParams` that says the same."""
        if self.json_object:
            return {"json_schema": '{"type": "object"}'}
        if self.json_ is not None:
            return {"json_schema": self.json_ if isinstance(self.json_, str) else json.dumps(self.json_)}
        if self.regex is not None:
            escaped = self.regex.replace("/", r"\/").replace("\n", r"\n")
            return {"grammar": f"start: /{escaped}/"}
        if self.choice is not None:
            return {"grammar": "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in self.choice)}
        assert self.grammar is not None
        return {"grammar": self.grammar}
