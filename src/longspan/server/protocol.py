"""Requests of clients: OpenAI's, with the fields that vLLM adds and that are honoured here.

Holds the request types, and their conversion to sampling parameters. Must not know engines, streams or answers.
Read next: `longspan.server.completions`, `longspan.server.chat`.

Note [No field is ignored]
    A field that is declared here is honoured. A field in a class's `REFUSED`, unless its value asks for nothing, and an
    unknown field are answered 400 by name. The exceptions are fields in `_Common` about an account at OpenAI, which are
    accepted and mean nothing here.
"""

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, WrapValidator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from longspan.errors import ConfigError
from longspan.types import SamplingParams

Result = TypeVar("Result")

NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})

LONG_LIST = 5_000
"""Token ids in `logit_bias` and `stop_token_ids` above which a thread checks them: 5,000 took 5 ms."""

MAX_N = 128
"""Most answers to one prompt."""

MAX_PROMPTS = 2048
"""Most prompts in one request, and most answers to all of them together."""

MAX_MESSAGES, MAX_PARTS = 16_384, 2048
"""Most messages of a conversation, and most parts of one message."""

MAX_STOPS, MAX_STOP_LEN = 16, 1000
"""Most stop strings, and most characters of each: every new token is compared with all of them."""


def _legal(rule: str) -> WrapValidator:
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

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        """Drop refused fields that ask for nothing; the others are refused here, or later as unknown fields."""
        if not isinstance(data, dict):
            return data
        kept = dict(data)
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


# -- what completions and chat share -----------------------------------------------------------------------------------


class StreamOptions(Body):
    """Options of a stream."""

    REFUSED: ClassVar = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool | None = None
    """Whether a last chunk without choices has `usage`."""


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


_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LEN)]
_STOP_RULE = f"a text of 1 to {MAX_STOP_LEN} characters, or a list of up to {MAX_STOPS} such texts"


class _Common(Body):
    """Fields that completions and chats share."""

    model: str | None = None
    """The served model's name; may be left out."""

    n: int | None = Field(default=None, ge=1, le=MAX_N)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Annotated[_Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None, _legal(_STOP_RULE)] = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None
    """Whether a stream has chunks that say how much of the prompt is computed."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _needs_stream(self) -> "_Common":
        for name in ("stream_options", "return_progress"):
            if getattr(self, name) and not self.stream:
                raise PydanticCustomError("longspan", "{name} needs stream to be true", {"name": name})
        return self

    @property
    def num_choices(self) -> int:
        """Number of answers to each prompt."""
        return self.n or 1

    async def in_thread_if_long(self, make: Callable[[], Result]) -> Result:
        """Call a function that reads every entry of this request's lists, in a thread if they are long."""
        if len(self.logit_bias or ()) + len(self.stop_token_ids or ()) > LONG_LIST:
            return await asyncio.to_thread(make)
        return make()

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _sampling(self, defaults: Mapping[str, Any], **more: Any) -> SamplingParams:
        """Return the sampling parameters of the first choice.

        Args:
            defaults: fields of `SamplingParams` that a request need not set.
            more: fields that stand whatever the request says.

        Raises:
            ConfigError: a value is outside its legal range.
        """
        given: dict[str, Any] = {
            name: value
            for name in SamplingParams.__struct_fields__
            if name in type(self).model_fields and (value := getattr(self, name)) is not None
        }
        if self.logit_bias is not None:
            given["logit_bias"] = _token_biases(self.logit_bias)
        if self.response_format is not None:
            given["json_schema"] = self.response_format.schema_text()
        return SamplingParams(**{"temperature": 1.0, **defaults, **given, **more})


_TOKEN_ID = re.compile("0|[1-9][0-9]{0,18}")


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    """Convert the keys of `logit_bias` from text, as JSON has them, to token ids."""
    wrong = [key for key in biases if not _TOKEN_ID.fullmatch(key)]
    if wrong:  # with two spellings of one token, one of the two biases would be lost
        shown = [key[:20] for key in wrong[:5]]
        raise ConfigError(
            f'logit_bias: got the keys {shown}, legal is token ids as text, without leading zeros, such as "42"'
        )
    return {int(key): bias for key, bias in biases.items()}


def nth_choice(params: SamplingParams, choice_idx: int) -> SamplingParams:
    """Return a choice's parameters: the first choice keeps the seed, the others get seeds derived from it."""
    if params.seed is None or choice_idx == 0:
        return params
    digest = hashlib.blake2b(f"{params.seed} {choice_idx}".encode(), digest_size=8).digest()
    return msgspec.structs.replace(params, seed=int.from_bytes(digest) >> 1)


# -- /v1/completions ---------------------------------------------------------------------------------------------------

DEFAULT_MAX_TOKENS = 16
"""Most tokens of a completion that asks for no number, as in OpenAI's API."""

PROMPT_RULE = f"a text, a list of token ids, or a list of either with 1 to {MAX_PROMPTS} entries"


_Prompt = str | list[int] | list[str] | list[list[int]]


def pieces_of(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield a long list in pieces: one call over ten million values would hold the GIL for a third of a second."""
    return (values[start : start + 2**16] for start in range(0, len(values), 2**16))


def _has_only(kind: type, values: list[Any]) -> bool:
    return all(set(map(type, piece)) == {kind} for piece in pieces_of(values))


def _check_prompt(prompt: Any) -> Any:
    """Check that all entries have the first one's type: a pydantic union would try every type on millions of them."""
    kind = type(prompt[0]) if isinstance(prompt, list) and prompt else None
    legal = isinstance(prompt, str) and prompt != ""
    if kind is int:
        legal = _has_only(int, prompt)
    elif kind in (str, list):
        legal = len(prompt) <= MAX_PROMPTS and _has_only(kind, prompt)
        legal = legal and (kind is str or all(_has_only(int, one) for one in prompt))
    if not legal:
        raise PydanticCustomError("longspan", "legal is {rule}", {"rule": PROMPT_RULE})
    return prompt


def _check_token_ids(value: Any) -> Any:
    if not isinstance(value, list) or not _has_only(int, value):
        raise PydanticCustomError("longspan", "legal is a list of token ids")
    return value


class CompletionRequest(_Common):
    """Body of `POST /v1/completions`."""

    REFUSED: ClassVar = {"suffix": ("",), "best_of": (1,), "use_beam_search": (False,)}

    prompt: Annotated[_Prompt, PlainValidator(_check_prompt, json_schema_input_type=_Prompt)]
    max_tokens: int | None = None
    """Most tokens to generate; 0, which generates none, is legal with `echo`."""
    echo: bool | None = None
    """Whether the text starts with the prompt."""
    logprobs: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def is_only_echo(self) -> bool:
        """Whether only the prompt is asked for."""
        return bool(self.echo) and self.max_tokens == 0

    def sampling_params(self, defaults: Mapping[str, Any] = NO_DEFAULTS) -> SamplingParams:
        """Return the sampling parameters of every prompt's first choice.

        Args:
            defaults: fields of `SamplingParams` that a request need not set.

        Raises:
            ConfigError: a value is outside its legal range.
        """
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        more: dict[str, Any] = {"max_tokens": 1 if self.is_only_echo else max_tokens}
        if self.echo and self.logprobs is not None:
            more["prompt_logprobs"] = self.logprobs
        return self._sampling(defaults, **more)


# -- /v1/chat/completions ----------------------------------------------------------------------------------------------

MAX_TOP_LOGPROBS = 20


class TextPart(Body):
    """Text part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a conversation."""

    REFUSED: ClassVar = {
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(max_length=MAX_PARTS)],
        _legal(f"a text, or a list of up to {MAX_PARTS} parts of the type 'text'"),
    ]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """Return the message in the form that chat templates read."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatRequest(_Common):
    """Body of `POST /v1/chat/completions`."""

    REFUSED: ClassVar = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": (),
        "web_search_options": (),
        "best_of": (1,),
        "use_beam_search": (False,),
        "echo": (False,),
    }

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    """Newer name of `max_tokens`; without both, the answer may have all tokens that fit."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("longspan", "top_logprobs needs logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("longspan", "max_tokens and max_completion_tokens differ; send one of them")
        return self

    @property
    def asked_max_tokens(self) -> int | None:
        """Most tokens to generate; None asks for all that fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling_params(self, max_tokens: int, defaults: Mapping[str, Any] = NO_DEFAULTS) -> SamplingParams:
        """Return the sampling parameters of the first choice.

        Args:
            max_tokens: most tokens to generate.
            defaults: fields of `SamplingParams` that a request need not set.

        Raises:
            ConfigError: a value is outside its legal range.
        """
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(defaults, max_tokens=max_tokens, logprobs=logprobs)


# -- /tokenize, /detokenize --------------------------------------------------------------------------------------------


class TokenizeRequest(Body):
    """Body of `POST /tokenize`: a text, or messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds special tokens; by default only for a prompt, as chat templates have their own."""
    add_generation_prompt: bool | None = None
    """Whether the template of `messages` ends where an answer begins; true by default."""
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _has_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("longspan", "legal is exactly one of prompt and messages")
        if self.prompt is not None and self.add_generation_prompt is not None:
            raise PydanticCustomError("longspan", "add_generation_prompt needs messages")
        return self


class DetokenizeRequest(Body):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[int], PlainValidator(_check_token_ids, json_schema_input_type=list[int])]
