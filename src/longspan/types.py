"""Plain values that every layer may name: model facts, sampling parameters, outputs.

Holds frozen data only. Must not know torch, pages, plans or processes. Everything here can travel between driver and
workers as a message.
Read next: `longspan.plan.types`, the message that says what a step does.
"""

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, NoReturn

import msgspec

from longspan.errors import ConfigError
from longspan.kv.layout import KVGroup
from longspan.kv.state_layout import StateGroup
from longspan.option import Group, Option, check_options, is_number, refusal


class Strategy(StrEnum):
    """Movement between ranks that brings queries and keys together."""

    LOCAL = "local"
    """Nothing moves: every key that a query sees is on the query's rank."""
    GATHER_KV = "gather_kv"
    """Visible keys and values move, at once."""
    PASS_KV = "pass_kv"
    """Keys and values go round a ring, in blocks of fixed size."""
    PASS_Q = "pass_q"
    """Queries go to the owners of the keys, partials come back."""
    TREE = "tree"
    """Queries and partials move as in `pass_q`, but partials are merged inside each node before one leaves it."""


class Placement(StrEnum):
    """Policy for the rank of a request's next page."""

    PACKED = "packed"
    """All pages on one home rank."""
    STRIPED = "striped"
    """Stripes go round the ranks in snake order."""
    SPILL = "spill"
    """Pages fill the home rank first, then the next ranks in turn."""


class Phase(StrEnum):
    """Whether a step computes prompt tokens or one new token per request."""

    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(StrEnum):
    """Reason why a request ended."""

    STOP = "stop"
    """An end token, a stop token id or a stop string came."""
    LENGTH = "length"
    """All `max_tokens` were generated."""
    ABORT = "abort"
    """The client left before the end."""
    ERROR = "error"
    """The request could not go on; `Request.error` says why. Other requests are not affected."""


class AttentionParams(msgspec.Struct, frozen=True):
    """Parameters of one layer that turn dot products into scores."""

    scale: float
    """Factor on the dot product of query and key."""
    softcap: float | None = None
    """Scores become `softcap * tanh(score / softcap)`; None leaves them."""
    window: int | None = None
    """Sliding window in tokens (a query's own position counts), or None."""

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ConfigError(f"softcap: got {self.softcap}, legal is None or a positive number")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window: got {self.window}, legal is None or a positive number of tokens")


class ExpertWeights(msgspec.Struct, frozen=True):
    """Weights of a mixture of experts: a token meets some experts of each layer."""

    num_parameters: int
    """Weights of all experts of all layers."""
    num_experts: int
    """Experts of one layer."""
    num_chosen: int
    """Experts of one layer that a token meets."""

    def divided(self, size: int) -> "ExpertWeights":
        """One device's part where so many devices share every expert."""
        return ExpertWeights(-(-self.num_parameters // size), self.num_experts, self.num_chosen)


class Adapter(msgspec.Struct, frozen=True):
    """LoRA adapter that ranks have loaded, or are told to load, for the requests that name it."""

    adapter_id: int
    """Number of this load of it, never given twice in one engine: what plans say."""
    name: str
    """What requests call it."""
    directory: str
    """Where its files lie, on every host."""
    digest: bytes
    """Hash of its files, 16 bytes: what page hashes begin with, as keys and values depend on it."""


class RopeLengths(msgspec.Struct, frozen=True):
    """Dependence of RoPE's frequencies on the length of a request.

    The length that counts for a row is the prompt's for a prompt token, and `position + 1` for a generated one, as on
    one device, where a prompt is one pass and every generated token another.
    """

    same_up_to: int
    """Length up to which all requests have the same frequencies."""
    is_each_different: bool
    """Whether every greater length has frequencies of its own; else all of them have the same."""
    is_recomputed: bool
    """Whether a request is computed again from its start, with the frequencies of greater lengths, once it exceeds
    `same_up_to` by a generated token."""

    def counted(self, length: int) -> int:
        """A length for all lengths with the frequencies of this one."""
        if length <= self.same_up_to:
            return self.same_up_to
        return length if self.is_each_different else self.same_up_to + 1

    def hash_root(self, length: int) -> bytes:
        """What page hashes of a request must begin with, whose rows count at least this length."""
        return b"" if length <= self.same_up_to else self.counted(length).to_bytes(8, "little")


class ModelSpec(msgspec.Struct, frozen=True):
    """Facts of a model that driver and scheduler need; no weights, no torch."""

    architecture: str
    num_layers: int
    vocab_size: int
    max_position: int | None
    """Longest sequence that the model's config admits, in tokens, or None when it does not say."""
    eos_token_ids: tuple[int, ...]
    """Tokens any of which ends a request; see Note [End tokens] in `longspan.models.generation`."""
    kv_groups: tuple[KVGroup, ...]
    layer_params: tuple[AttentionParams | None, ...]
    """Attention parameters of each layer; None in a layer without attention."""
    num_parameters: int = 0
    """All weights, embeddings not counted."""
    weight_bytes: int = 0
    """Bytes of all weights, embeddings included."""
    experts: ExpertWeights | None = None
    """Part of `num_parameters` that lies in experts; None where every token meets every weight."""
    rope_lengths: RopeLengths | None = None
    """How RoPE depends on a request's length; None where it does not."""
    state_groups: tuple[StateGroup, ...] = ()
    """Recurrent layers; a layer may be in one of these, in one of `kv_groups`, in both or in neither."""

    def attention_params(self, layer: int) -> AttentionParams:
        """Attention parameters of a layer that has attention."""
        params = self.layer_params[layer]
        assert params is not None, f"layer {layer} has no attention"
        return params

    @property
    def state_bytes(self) -> int:
        """Bytes of one request's state in all recurrent layers; 0 where there are none."""
        return sum(group.state_bytes for group in self.state_groups)

    @property
    def last_group(self) -> KVGroup | None:
        """KV group of the last layer, if rows of the layer that nobody reads need no attention; None where the layer
        has none, or carries a state on."""
        last = self.num_layers - 1
        if any(last in group.layers for group in self.state_groups):
            return None
        return next((group for group in self.kv_groups if last in group.layers), None)

    @property
    def active_parameters(self) -> float:
        """Weights that one token meets, embeddings not counted: what its flops follow from."""
        return self.parameters_read(1)

    def parameters_read(self, num_tokens: float) -> float:
        """Weights that a step of so many tokens reads, embeddings not counted: at most, as tokens may share experts."""
        if self.experts is None:
            return self.num_parameters
        experts = self.experts
        read = min(1.0, num_tokens * experts.num_chosen / experts.num_experts)
        return self.num_parameters - (1 - read) * experts.num_parameters


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Rules for sampling the next tokens of one request, and for stopping. Shaped like vLLM's.

    `longspan.worker.sampler` has the order in which the rules apply.

    Raises:
        ConfigError: a value is outside its legal range; the message names field, value and range.
    """

    max_tokens: Annotated[int, Option("Most tokens to generate.", Group.SAMPLING, least=1)] = 16
    """Most tokens to generate."""
    min_tokens: Annotated[int, Option("No end before so many tokens.", Group.SAMPLING, least=0)] = 0
    """Tokens before which end tokens, `stop_token_ids` and stop strings are not honoured."""
    temperature: Annotated[float, Option("Divisor of logits; 0 is greedy.", Group.SAMPLING, least=0)] = 0.0
    """Divisor of logits; 0 is greedy. vLLM's default is 1.0."""
    top_p: Annotated[
        float, Option("Keep the fewest tokens whose probabilities sum to this.", Group.SAMPLING, above=0, most=1)
    ] = 1.0
    """Sum of probabilities that the smallest set of tokens to keep reaches at least."""
    top_k: Annotated[
        int,
        Option(
            "Keep so many most probable tokens; 0 keeps all.", Group.SAMPLING, least=0, most=2**31 - 1, note="0: all"
        ),
    ] = 0
    """Number of most probable tokens to keep; 0 keeps all."""
    min_p: Annotated[
        float,
        Option("Drop tokens less probable than this share of the most probable one.", Group.SAMPLING, least=0, most=1),
    ] = 0.0
    """Share of the most probable token's probability below which tokens are dropped."""
    presence_penalty: Annotated[
        float,
        Option(
            "Subtracted from logits of tokens that were generated.",
            Group.SAMPLING,
            least=-2,
            most=2,
            on_command_line=False,
        ),
    ] = 0.0
    """Number subtracted from the logits of all tokens that were generated before; negative favours them."""
    frequency_penalty: Annotated[
        float,
        Option(
            "Subtracted from logits for every time a token was generated.",
            Group.SAMPLING,
            least=-2,
            most=2,
            on_command_line=False,
        ),
    ] = 0.0
    """Number subtracted from a token's logit once for every time that it was generated before; negative favours
    repetition."""
    repetition_penalty: Annotated[
        float,
        Option(
            "Divisor of logits of tokens in prompt or answer; 1 changes nothing.",
            Group.SAMPLING,
            above=0,
            note="1 changes nothing",
            on_command_line=False,
        ),
    ] = 1.0
    """Divisor of the logits of tokens that stand in the prompt or were generated, where positive; negative ones are
    multiplied by it."""
    logit_bias: Annotated[
        tuple[tuple[int, float], ...],
        Option(
            "Numbers added to the logits of single tokens.",
            Group.SAMPLING,
            metavar="pairs of token id and number",
            on_command_line=False,
        ),
    ] = ()
    """Pairs (token id, number added to its logit), or a dict. Even -100 does not forbid a token for certain."""
    json_schema: Annotated[
        str | None,
        Option("JSON schema that the output satisfies.", Group.SAMPLING, metavar="JSON text", on_command_line=False),
    ] = None
    """JSON text of a JSON schema; the output is JSON that satisfies it, if `max_tokens` and stop strings let it end.

    Only an end token may follow a complete output, so `min_tokens` yields where nothing but tokens that end the request
    may follow. `longspan.models.grammar` says which schemas are legal.
    """
    grammar: Annotated[
        str | None,
        Option("Grammar that the output follows.", Group.SAMPLING, metavar="llguidance's Lark", on_command_line=False),
    ] = None
    """Grammar that the output follows, in llguidance's dialect of Lark; else as `json_schema`, which it excludes."""
    seed: Annotated[
        int | None, Option("Key of the random numbers.", Group.SAMPLING, least=0, most=2**63 - 1, unset="random")
    ] = None
    """Key of the random numbers. None takes one from the operating system, per request."""
    stop: Annotated[
        tuple[str, ...], Option("End before this text; may be given several times.", Group.SAMPLING, metavar="TEXT")
    ] = ()
    """Texts that end the output, which stops before the first of them."""
    stop_token_ids: Annotated[
        tuple[int, ...],
        Option("Tokens that end the request.", Group.SAMPLING, metavar="token ids", on_command_line=False),
    ] = ()
    """Tokens that end the request, as the model's end tokens do; the output text leaves them out."""
    include_stop_str_in_output: Annotated[
        bool, Option("Whether the text has the stop text that ended it.", Group.SAMPLING, on_command_line=False)
    ] = False
    """Whether the output text has the text or token of `stop` or `stop_token_ids` that ended it."""
    skip_special_tokens: Annotated[
        bool, Option("Whether special tokens are left out of the text.", Group.SAMPLING, on_command_line=False)
    ] = True
    """Whether special tokens are left out of the output text; the token that ends it is in any case."""
    priority: Annotated[
        int,
        Option(
            "Place in the queue; lower comes first.",
            Group.SAMPLING,
            least=-(2**31),
            most=2**31 - 1,
            on_command_line=False,
        ),
    ] = 0
    """Place in the queue of requests that wait: lower comes first. One more counts like having come 1,000 requests
    later, so that nothing waits for ever."""
    ignore_eos: Annotated[bool, Option("Go on after an end token.", Group.SAMPLING)] = False
    """Whether the request goes on after an end token of the model."""
    logprobs: Annotated[
        int | None,
        Option(
            "Log-probabilities of so many most probable tokens.",
            Group.SAMPLING,
            least=0,
            most=1000,
            on_command_line=False,
        ),
    ] = None
    """Number of most probable tokens whose log-probabilities are given for every generated token, beside its own."""
    prompt_logprobs: Annotated[
        int | None, Option("The same for the prompt.", Group.SAMPLING, least=0, most=1000, on_command_line=False)
    ] = None
    """Number of most probable tokens whose log-probabilities are given for every prompt token but the first, beside its
    own."""

    def __post_init__(self) -> None:
        self._take_other_types()
        check_options(self)
        if self.min_tokens > self.max_tokens:
            self._refuse("min_tokens", f"a whole number from 0 to max_tokens ({self.max_tokens})")
        if not self._is_legal_bias():
            self._refuse("logit_bias", "pairs of a token id, each at most once, and a number from -100 to 100")
        if self.json_schema is not None and not _is_json_object(self.json_schema):
            self._refuse("json_schema", "None or JSON text of an object")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            self._refuse("stop", "strings that are not empty")
        ids = self.stop_token_ids
        if not isinstance(ids, tuple) or not all(is_number(i, whole=True) and i >= 0 for i in ids):
            self._refuse("stop_token_ids", "whole numbers from 0")
        if self.grammar is not None and (not isinstance(self.grammar, str) or not self.grammar):
            self._refuse("grammar", "None or the text of a grammar")
        if self.grammar is not None and self.json_schema is not None:
            self._refuse("grammar", "None with json_schema")
        if self.ignore_eos and self.is_constrained:
            self._refuse("ignore_eos", "false with json_schema: only an end token may follow a complete output")

    @property
    def is_constrained(self) -> bool:
        """Whether the output must have a form."""
        return self.json_schema is not None or self.grammar is not None

    def _take_other_types(self) -> None:
        """Take a lone stop string, lists and dicts for the tuples that they stand for."""
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            if isinstance(getattr(self, name), list):
                msgspec.structs.force_setattr(self, name, tuple(getattr(self, name)))
        if isinstance(self.logit_bias, (Mapping, list)):
            pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
            bias = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in pairs)
            msgspec.structs.force_setattr(self, "logit_bias", bias)

    def _is_legal_bias(self) -> bool:
        return (
            isinstance(self.logit_bias, tuple)
            and all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.logit_bias)
            and all(
                is_number(i, whole=True) and i >= 0 and is_number(bias) and -100 <= bias <= 100
                for i, bias in self.logit_bias
            )
            and len({i for i, _ in self.logit_bias}) == len(self.logit_bias)
        )

    def _refuse(self, name: str, rule: str) -> NoReturn:
        raise refusal(name, getattr(self, name), rule)


def _is_json_object(text: object) -> bool:
    """Whether a value is standard JSON text of an object."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return isinstance(text, str) and isinstance(json.loads(text, parse_constant=refuse), dict)
    except (ValueError, RecursionError):
        return False


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities at one position, natural log, from the logits before any sampling parameter."""

    token_id: int
    """Token at the position."""
    logprob: float
    rank: int
    """Place of the token by probability; the most probable one has rank 1."""
    top: tuple[tuple[int, float], ...]
    """Pairs (token id, log-probability) of the most probable tokens, best first."""
