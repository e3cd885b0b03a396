"""State that all requests of one server share. `make_app` gets it, and tests make several.

Holds the engine, the tokenizers, the limits, and whether requests are still taken. Must not know HTTP.
Read next: `longspan.server.app`; `longspan.server.lengths`.
"""

import asyncio
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from longspan.engine.async_engine import CHECK_INLINE_TOKENS, AsyncEngine
from longspan.server.config import ServerConfig
from longspan.server.errors import ApiError, describe
from longspan.server.grammars import LazyGrammars
from longspan.server.lengths import Lengths
from longspan.server.metrics import Metrics
from longspan.server.parsing.select import Parsers
from longspan.server.protocol import pieces_of
from longspan.server.response_store import ResponseStore
from longspan.server.token_texts import TokenTexts
from longspan.server.tokenizers import TokenizerPool
from longspan.types import Adapter

if TYPE_CHECKING:
    from longspan.server.tracing import Traces  # its packages are optional

Result = TypeVar("Result")

MAX_DROPPED = 1000
"""Most names of dropped fields that are told, and kept."""


@dataclass(slots=True)
class ServerState:
    """State of one server."""

    engine: AsyncEngine
    tokenizers: TokenizerPool
    grammars: LazyGrammars
    lengths: Lengths
    config: ServerConfig
    metrics: Metrics
    token_texts: TokenTexts
    parsers: Parsers
    marks: Mapping[str, int]
    """Tokens of the vocabulary that are no text, with their ids."""
    model_name: str
    sampling_defaults: Mapping[str, Any]
    """Fields of `SamplingParams` for requests that do not set them; `max_tokens` for chats alone."""
    created: int
    """Unix time at which the model was loaded, in seconds."""
    num_open: int = 0
    """Number of HTTP requests that are being answered."""
    is_draining: bool = False
    """Whether new requests are refused, while those that run may end."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Event that is set while no HTTP request is being answered."""
    responses: ResponseStore = field(default_factory=ResponseStore)
    """Stored responses of `/v1/responses`, and the conversations up to them."""
    traces: "Traces | None" = None
    """What sends a span per request, if the option says so."""
    _dropped: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.idle.set()

    def close(self) -> None:
        """End the threads of tokenizers and traces."""
        self.tokenizers.close()
        if self.traces is not None:
            self.traces.close()

    def drops_unknown(self, names: Iterable[str]) -> bool:
        """Whether unknown fields are dropped; each is then named on standard error, once."""
        if self.config.unknown_fields == "refuse":
            return False
        for name in names:
            if name not in self._dropped and len(self._dropped) < MAX_DROPPED:
                self._dropped.add(name)
                shown = name if len(name) <= 100 else f"{name[:100]}..."
                print(f"longspan: the unknown field {shown!r} of a request was dropped", file=sys.stderr, flush=True)
        return True

    def checked(self, make: Callable[[], Result]) -> Result:
        """Make a request out of another one.

        Raises:
            ApiError: its fields contradict each other.
        """
        try:
            return make()
        except ValidationError as error:
            message, param = describe(error.errors(include_url=False))
            raise ApiError(400, message, param=param) from None

    def adapter_of(self, name: str | None) -> Adapter | None:
        """Adapter that a request names as its model; None for the model itself, which need not be named.

        Raises:
            ApiError: the name is none of this server's.
        """
        if name is None or name == self.model_name:
            return None
        adapters = {adapter.name: adapter for adapter in self.engine.adapters}
        if name not in adapters:
            raise ApiError(
                404,
                f"model: got {name!r}, legal is {' or '.join(map(repr, [self.model_name, *adapters]))}",
                param="model",
                code="model_not_found",
            )
        return adapters[name]

    def name_of(self, adapter: Adapter | None) -> str:
        """What clients call the model with an adapter, or without."""
        return self.model_name if adapter is None else adapter.name

    async def check_token_ids(self, name: str, token_ids: Sequence[int]) -> None:
        """Refuse token ids that the model does not know, and an empty list.

        Raises:
            ApiError: there is such an id, or none.
        """
        if len(token_ids) > CHECK_INLINE_TOKENS:
            await asyncio.to_thread(self._check_token_ids, name, token_ids)
        else:
            self._check_token_ids(name, token_ids)

    def _check_token_ids(self, name: str, token_ids: Sequence[int]) -> None:
        size = self.engine.model.vocab_size
        pieces = pieces_of(token_ids)
        ends = {end for piece in pieces for end in (min(piece), max(piece))}
        wrong = next((token_id for token_id in ends if not 0 <= token_id < size), None)
        if wrong is not None or not token_ids:
            got = "no tokens" if wrong is None else f"the token id {wrong}"
            raise ApiError(400, f"{name}: got {got}, legal is at least one token id from 0 to {size - 1}", param=name)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out."""

        def decode(tokenizer: PreTrainedTokenizerBase) -> str:
            text = tokenizer.decode([*token_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert isinstance(text, str)
            return text

        return await self.tokenizers.run(decode, len(token_ids))
