"""Limits on the length of a request, by the model, the options and the ranks' memory.

Holds limits and their refusals. Must not know HTTP routes, nor how tokens are counted.
Read next: `longspan.server.state`, which every route has; `Engine.check_fits` in `longspan.engine.engine`.
"""

from typing import NoReturn

from longspan.engine.async_engine import AsyncEngine
from longspan.engine.room import find_room, largest
from longspan.errors import CapacityError, ConfigError
from longspan.server.errors import TOO_LONG, ApiError


class Lengths:
    """Length limits of one server. Any thread may use them."""

    def __init__(self, engine: AsyncEngine, max_model_len: int | None) -> None:
        """Find the longest request that can run.

        Args:
            engine: engine that runs requests.
            max_model_len: the option of that name; None leaves the limit to the model.
        """
        self._engine, self._max_model_len = engine, max_model_len
        limits = [max_model_len, engine.model.max_position]
        self.max_len = min((limit for limit in limits if limit is not None), default=None)
        """Most tokens of prompt and answer together that model and options admit; memory may admit fewer."""
        self.longest_request = largest(self._most_tokens() - 1, lambda prompt_len: self._fits(prompt_len, 1)) + 1
        """Tokens of the longest request that can run, prompt and answer together; found at the start."""

    def check(self, prompt_len: int, max_tokens: int) -> None:
        """Refuse a request that is longer than `max_len`.

        Raises:
            ApiError: says what would fit.
        """
        limit, total = self.max_len, prompt_len + max_tokens
        if limit is None or total <= limit:
            return
        if limit == self._max_model_len:
            why = "what would fit it: a shorter prompt, fewer max_tokens, or a server with a larger --max-model-len"
        else:
            why = "max_position_embeddings of the model; what would fit it: a shorter prompt or fewer max_tokens"
        raise ApiError(
            400,
            f"prompt + max_tokens: got {prompt_len} + {max_tokens} = {total} tokens, legal is at most {limit} ({why})",
            param="prompt" if prompt_len >= limit else "max_tokens",
            code=TOO_LONG,
        )

    def refuse(self, name: str, num_tokens: int, max_tokens: int) -> NoReturn:
        """Refuse more than `longest_request` token ids, by their number alone.

        Raises:
            ApiError, CapacityError: always; says what would fit, if anything would.
        """
        self.check(num_tokens, max_tokens)
        self._engine.check_fits(num_tokens, max_tokens)
        limit = self.longest_request
        raise ApiError(400, f"{name}: got {num_tokens} token ids, legal is at most {limit}", param=name, code=TOO_LONG)

    def find_room(self, prompt_len: int, wanted: int | None = None) -> int:
        """Return the most tokens that can follow a prompt, `wanted` at most; at least 1, so that submitting it says
        what is wrong.
        """
        return find_room(prompt_len, self._most_tokens(), self._engine.check_fits, wanted)

    def max_tokens(self, prompt_len: int, asked: int | None, default: int, *, clamps: bool) -> int:
        """Return the most tokens of an answer.

        Args:
            prompt_len: tokens of the prompt.
            asked: what the request says.
            default: what counts where it says nothing, as far as it fits.
            clamps: whether what was asked for counts only as far as it fits, too.
        """
        if asked is not None and (asked < 1 or not clamps):
            return asked
        return self.find_room(prompt_len, default if asked is None else asked)

    def _most_tokens(self) -> int:
        """Return a length that no request exceeds."""
        return self._engine.capacity().num_tokens + 1 if self.max_len is None else self.max_len

    def _fits(self, prompt_len: int, max_tokens: int) -> bool:
        try:
            self._engine.check_fits(prompt_len, max_tokens)
        except CapacityError:
            return False
        return True


def check_max_model_len(max_model_len: int | None, max_position: int | None) -> None:
    """Refuse a `max_model_len` that is longer than the model admits.

    Raises:
        ConfigError: names both numbers.
    """
    if max_model_len is not None and max_position is not None and max_model_len > max_position:
        raise ConfigError(
            f"max_model_len: got {max_model_len}, legal is at most {max_position} (max_position_embeddings of "
            "the model)"
        )
