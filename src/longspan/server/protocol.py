"""Requests of clients: OpenAI's, with the fields that vLLM adds and that are honoured here.

Holds the request types, and their conversion to sampling parameters. Must not know engines, streams or answers.
Read next: `longspan.server.fields`, the base class and Note [No field is ignored]; `longspan.server.messages`;
`longspan.server.completions`, `longspan.server.chat`.
"""

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from longspan.errors import ConfigError
from longspan.server.fields import Body, ResponseFormat, StreamOptions, StructuredOutputs, legal
from longspan.server.messages import MAX_MESSAGES, MAX_TOOLS, Message, NamedTool, Tool
from longspan.types import SamplingParams

Result = TypeVar("Result")

NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})

LONG_LIST = 5_000
"""Token ids in `logit_bias` and `stop_token_ids` above which a thread checks them: 5,000 took 5 ms."""

MAX_N = 128
"""Most answers to one prompt."""

MAX_PROMPTS = 2048
"""Most prompts in one request, and most answers to all of them together."""

MAX_STOPS, MAX_STOP_LEN = 16, 1000
"""Most stop strings, and most characters of each: every new token is compared with all of them."""


# -- what completions and chat share -----------------------------------------------------------------------------------

_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LEN)]
_STOP_RULE = f"a text of 1 to {MAX_STOP_LEN} characters, or a list of up to {MAX_STOPS} such texts"


_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
"""Older names in vLLM of the fields of `structured_outputs`."""


class Common(Body):
    """Fields that completions and chats share."""

    REFUSED: ClassVar = {
        "best_of": (1,),
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "early_stopping": (False,),
        "spaces_between_special_tokens": (True,),
        "guided_decoding_backend": (),
        "guided_whitespace_pattern": (),
        "allowed_token_ids": (),
        "bad_words": ([],),
        "logits_processors": ([],),
        "kv_transfer_params": (),
    }

    model: str | None = None
    """The served model's name; may be left out."""

    n: int | None = Field(default=None, ge=1, le=MAX_N)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Annotated[_Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None, legal(_STOP_RULE)] = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = Field(default=None, min_length=1)
    guided_choice: list[str] | None = Field(default=None, min_length=1)
    guided_grammar: str | None = Field(default=None, min_length=1)

    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its special tokens; by default only to a prompt, as chat templates have their own."""
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=1)
    """Number of tokens at a prompt's end that are kept."""
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    """Whether the answer has the token ids of prompt and choices."""
    priority: int | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,200}$")] | None = None
    """Last part of the answer's id."""

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
    def _needs_stream(self) -> "Common":
        for name in ("stream_options", "return_progress"):
            if getattr(self, name) and not self.stream:
                raise PydanticCustomError("longspan", "{name} needs stream to be true", {"name": name})
        return self

    @model_validator(mode="after")
    def _has_one_form(self) -> "Common":
        forms = [name for name in _FORMS if getattr(self, name) is not None]
        if self.response_format is not None and self.response_format.type == "text":
            forms.remove("response_format")
        if len(forms) > 1:
            raise PydanticCustomError(
                "longspan", "{name}: legal is one of {all}", {"name": forms[1], "all": " and ".join(forms)}
            )
        return self

    @property
    def form_field(self) -> str:
        """Name of the field that says which form the answer must have."""
        return next((name for name in _FORMS if getattr(self, name) is not None), "response_format")

    def form(self) -> dict[str, str | None]:
        """Return the field of `SamplingParams` that says which form the answer must have; nothing for free text."""
        for name, other in _GUIDED.items():
            if (value := getattr(self, name)) is not None:
                return dict(StructuredOutputs.model_validate({other: value}).params())
        if self.structured_outputs is not None:
            return dict(self.structured_outputs.params())
        return {} if self.response_format is None else {"json_schema": self.response_format.schema_text()}

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

    @property
    def counts_always(self) -> bool:
        """Whether every chunk of a stream counts the tokens so far."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def truncated(self, token_ids: list[int]) -> list[int]:
        """Return the tokens at a prompt's end that are kept."""
        return token_ids if self.truncate_prompt_tokens is None else token_ids[-self.truncate_prompt_tokens :]

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
        return SamplingParams(**{"temperature": 1.0, **defaults, **given, **self.form(), **more})


_FORMS = ("response_format", "structured_outputs", *_GUIDED)


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


class CompletionRequest(Common):
    """Body of `POST /v1/completions`."""

    REFUSED: ClassVar = {**Common.REFUSED, "suffix": ("",)}

    prompt: Annotated[_Prompt, PlainValidator(_check_prompt, json_schema_input_type=_Prompt)]
    max_tokens: int | None = None
    """Most tokens to generate; 0, which generates none, is legal with `echo`."""
    echo: bool | None = None
    """Whether the text starts with the prompt."""
    logprobs: Annotated[int | bool | None, legal("a whole number, or true for 1")] = None
    """Number of most probable tokens to tell beside each token; true is 1, as lm-eval sends it."""

    @property
    def num_logprobs(self) -> int | None:
        """Number of most probable tokens to tell; None tells nothing."""
        return (1 if self.logprobs else None) if isinstance(self.logprobs, bool) else self.logprobs

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

    def sampling_params(self, max_tokens: int, defaults: Mapping[str, Any] = NO_DEFAULTS) -> SamplingParams:
        """Return the sampling parameters of every prompt's first choice.

        Args:
            max_tokens: most tokens to generate.
            defaults: fields of `SamplingParams` that a request need not set.

        Raises:
            ConfigError: a value is outside its legal range.
        """
        more: dict[str, Any] = {"max_tokens": 1 if self.is_only_echo else max_tokens, "logprobs": self.num_logprobs}
        if self.echo and self.num_logprobs is not None:
            more["prompt_logprobs"] = max(self.num_logprobs, self.prompt_logprobs or 0)
        return self._sampling(defaults, **more)


# -- /v1/chat/completions ----------------------------------------------------------------------------------------------

MAX_TOP_LOGPROBS = 20
_CHOICE_RULE = 'none, auto, required, or {"type": "function", "function": {"name": NAME}}'


class ChatRequest(Common):
    """Body of `POST /v1/chat/completions`."""

    REFUSED: ClassVar = {
        **Common.REFUSED,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "verbosity": (),
        "web_search_options": (),
        "echo": (False,),
        "chat_template": (),
        "documents": ([],),
        "mm_processor_kwargs": ({},),
    }
    ENTRIES: ClassVar = {"messages": (Message, MAX_MESSAGES)}

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[Literal["none", "auto", "required"] | NamedTool | None, legal(_CHOICE_RULE)] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as `enable_thinking`."""
    include_reasoning: bool | None = None
    """Whether the answer tells what the model thought, if a reasoning parser is in use; true by default."""
    add_generation_prompt: bool | None = None
    """Whether the template ends where the model's answer begins; true by default."""
    continue_final_message: bool | None = None
    """Whether the answer goes on in the last message, which must be the assistant's."""
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
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError("longspan", "continue_final_message: legal with add_generation_prompt false")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise PydanticCustomError("longspan", "continue_final_message: legal if the last message is an assistant's")
        return self

    @model_validator(mode="after")
    def _has_tools(self) -> "ChatRequest":
        if self.tools:
            names = [tool.function.name for tool in self.tools]
            if len(set(names)) < len(names):
                raise PydanticCustomError("longspan", "tools: got one name twice, legal is a name for each")
            if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
                raise PydanticCustomError(
                    "longspan",
                    "tool_choice: got {name}, legal is a function of tools",
                    {"name": repr(self.tool_choice.function.name[:100])},
                )
        elif self.tool_choice not in (None, "none", "auto"):
            raise PydanticCustomError("longspan", "tool_choice: legal without tools is none or auto")
        if self.forced_tools and self.form():
            raise PydanticCustomError("longspan", "tool_choice: legal with response_format is none or auto")
        return self

    @property
    def offered_tools(self) -> list[Tool]:
        """Tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced_tools(self) -> list[Tool]:
        """Tools of which the model must call one; empty where it may answer as it likes."""
        if isinstance(self.tool_choice, NamedTool):
            wanted = self.tool_choice.function.name
            return [tool for tool in self.tools or () if tool.function.name == wanted]
        return list(self.tools or ()) if self.tool_choice == "required" else []

    @property
    def asked_max_tokens(self) -> int | None:
        """Most tokens to generate; None asks for all that fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling_params(
        self, max_tokens: int, defaults: Mapping[str, Any] = NO_DEFAULTS, **more: Any
    ) -> SamplingParams:
        """Return the sampling parameters of the first choice.

        Args:
            max_tokens: most tokens to generate.
            defaults: fields of `SamplingParams` that a request need not set.
            more: fields of `SamplingParams` that stand whatever the request says.

        Raises:
            ConfigError: a value is outside its legal range.
        """
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(defaults, max_tokens=max_tokens, logprobs=logprobs, **more)


# -- /tokenize, /detokenize --------------------------------------------------------------------------------------------


class TokenizeRequest(Body):
    """Body of `POST /tokenize`: a text, or messages for the chat template."""

    ENTRIES: ClassVar = {"messages": (Message, MAX_MESSAGES)}

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds special tokens; by default only for a prompt, as chat templates have their own."""
    add_generation_prompt: bool | None = None
    """Whether the template of `messages` ends where an answer begins; true by default."""
    return_token_strs: bool | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _has_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("longspan", "legal is exactly one of prompt and messages")
        for name in ("add_generation_prompt", "tools", "chat_template_kwargs", "continue_final_message"):
            if self.prompt is not None and getattr(self, name) is not None:
                raise PydanticCustomError("longspan", "{name} needs messages", {"name": name})
        return self


class DetokenizeRequest(Body):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[int], PlainValidator(_check_token_ids, json_schema_input_type=list[int])]


# -- adapters ----------------------------------------------------------------------------------------------------------


class LoadAdapterRequest(Body):
    """Body of `POST /v1/load_lora_adapter`."""

    REFUSED: ClassVar = {"load_inplace": (False,), "is_3d_lora_weight": (False,)}

    lora_name: str
    """Name that requests call it by."""
    lora_path: str
    """Its directory, on all hosts."""


class UnloadAdapterRequest(Body):
    """Body of `POST /v1/unload_lora_adapter`."""

    REFUSED: ClassVar = {"lora_int_id": ()}

    lora_name: str
