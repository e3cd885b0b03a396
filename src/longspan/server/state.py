"""What every request of one server shares. No globals: `make_app` gets it, and tests make several.

Holds the engine, the tokenizers, the limits, and whether requests are still taken. Must not know HTTP.
Read next: `longspan.server.app`.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from transformers import PreTrainedTokenizerBase

from longspan.config import EngineConfig
from longspan.engine.async_engine import CHECK_INLINE_TOKENS, AsyncEngine
from longspan.errors import CapacityError, ConfigError
from longspan.server.config import ServerConfig
from longspan.server.errors import TOO_LONG, ApiError
from longspan.server.grammars import LazyGrammars
from longspan.server.metrics import Metrics
from longspan.server.protocol import pieces_of
from longspan.server.token_texts import TokenTexts
from longspan.server.tokenizers import TokenizerPool


@dataclass(slots=True)
class ServerState:
    """One server."""

    engine: AsyncEngine
    tokenizers: TokenizerPool
    grammars: LazyGrammars
    config: ServerConfig
    metrics: Metrics
    token_texts: TokenTexts
    model_name: str
    created: int
    """When the model was loaded, seconds since 1970."""
    longest_request: int = 0
    """Tokens of the longest request that can run, prompt and answer together; found at the start."""
    num_open: int = 0
    """HTTP requests being answered."""
    is_draining: bool = False
    """No new requests; those that run may end."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while no HTTP request is being answered."""

    def __post_init__(self) -> None:
        self.idle.set()
        self.longest_request = self._find_longest()

    @property
    def engine_config(self) -> EngineConfig:
        return self.engine.engine.config

    def check_model(self, name: str | None) -> None:
        """Raises: ApiError if a client asks for another model."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"model: got {name!r}, legal is {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def check_token_ids(self, name: str, token_ids: Sequence[int]) -> None:
        """Raises: ApiError for ids that the model does not know."""
        if len(token_ids) > CHECK_INLINE_TOKENS:
            await asyncio.to_thread(self._check_token_ids, name, token_ids)
        else:
            self._check_token_ids(name, token_ids)

    def _check_token_ids(self, name: str, token_ids: Sequence[int]) -> None:
        size = self.engine.engine.spec.vocab_size
        pieces = pieces_of(token_ids)
        ends = {end for piece in pieces for end in (min(piece), max(piece))}
        wrong = next((token_id for token_id in ends if not 0 <= token_id < size), None)
        if wrong is not None or not token_ids:
            got = "no tokens" if wrong is None else f"the token id {wrong}"
            raise ApiError(400, f"{name}: got {got}, legal is at least one token id from 0 to {size - 1}", param=name)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""

        def decode(tokenizer: PreTrainedTokenizerBase) -> str:
            text = tokenizer.decode([*token_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert isinstance(text, str)
            return text

        return await self.tokenizers.run(decode, len(token_ids))

    # -- lengths -----------------------------------------------------------------------------------------------------

    @property
    def max_len(self) -> int | None:
        """Most tokens of prompt and answer together that the model and the options admit; memory may admit fewer."""
        limits = [self.config.max_model_len, self.engine.engine.spec.max_position]
        return min((limit for limit in limits if limit is not None), default=None)

    def check_length(self, prompt_len: int, max_tokens: int) -> None:
        """Raises: ApiError if that is more than `max_len`."""
        limit, total = self.max_len, prompt_len + max_tokens
        if limit is None or total <= limit:
            return
        if limit == self.config.max_model_len:
            why = "what would fit it: a shorter prompt, fewer max_tokens, or a server with a larger --max-model-len"
        else:
            why = "max_position_embeddings of the model; what would fit it: a shorter prompt or fewer max_tokens"
        raise ApiError(
            400,
            f"prompt + max_tokens: got {prompt_len} + {max_tokens} = {total} tokens, legal is at most {limit} ({why})",
            param="prompt" if prompt_len >= limit else "max_tokens",
            code=TOO_LONG,
        )

    def refuse_length(self, name: str, num_tokens: int, max_tokens: int) -> NoReturn:
        """Refuse token ids of which there are more than `longest_request`, by their number alone.

        Raises:
            ApiError, CapacityError: always; says what would fit them, if anything would.
        """
        self.check_length(num_tokens, max_tokens)
        self.engine.engine.scheduler.memory.placer.check_fits(num_tokens, max_tokens)
        limit = self.longest_request
        raise ApiError(400, f"{name}: got {num_tokens} token ids, legal is at most {limit}", param=name, code=TOO_LONG)

    async def room_for(self, prompt_len: int) -> int:
        """Most tokens that can follow a prompt; at least 1, so that submitting it says what is wrong."""
        return await asyncio.to_thread(self.find_room, prompt_len)

    def find_room(self, prompt_len: int) -> int:
        """As `room_for`, at once."""
        return _largest(self._most_tokens - prompt_len, lambda max_tokens: self._fits(prompt_len, max_tokens))

    def _find_longest(self) -> int:
        return _largest(self._most_tokens - 1, lambda prompt_len: self._fits(prompt_len, 1)) + 1

    @property
    def _most_tokens(self) -> int:
        """No request is longer."""
        return self.total_tokens + 1 if self.max_len is None else self.max_len

    def _fits(self, prompt_len: int, max_tokens: int) -> bool:
        try:
            self.engine.engine.scheduler.memory.placer.check_fits(prompt_len, max_tokens)
        except CapacityError:
            return False
        return True

    @property
    def tokens_per_rank(self) -> int:
        """Tokens whose KV one rank can hold."""
        memory = self.engine.engine.scheduler.memory
        groups = zip(memory.allocators[0], self.engine.engine.spec.kv_groups, strict=True)
        unbounded = [allocator.num_pages for allocator, group in groups if group.spec.window is None]
        num_pages = min(unbounded) if unbounded else memory.allocators[0][0].num_pages
        return num_pages * self.engine_config.page_size

    @property
    def total_tokens(self) -> int:
        """Tokens whose KV all ranks can hold."""
        return self.tokens_per_rank * self.engine_config.context_parallel_size


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `most` that fits, if all below it do; 1 if none does."""
    least, most = 1, max(1, most)
    if fits(most):
        return most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def check_max_model_len(config: ServerConfig, max_position: int | None) -> None:
    """Raises: ConfigError if the user asks for more than the model can do."""
    if config.max_model_len is not None and max_position is not None and config.max_model_len > max_position:
        raise ConfigError(
            f"max_model_len: got {config.max_model_len}, legal is at most {max_position} (max_position_embeddings of "
            "the model)"
        )
