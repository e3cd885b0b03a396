"""Intake: which requests are taken at all, and how one begins.

Holds the checks of a request against the model and the ranks' memory. Must not know queues or other requests: any
thread may ask.
Read next: `longspan.scheduler.request`; `longspan.scheduler.scheduler`, which queues what is taken.
"""

import secrets
from collections.abc import Sequence

from longspan.config import EngineConfig
from longspan.errors import ConfigError
from longspan.kv.prefix import extend_hashes
from longspan.scheduler.page_placer import PagePlacer
from longspan.scheduler.request import Constraint, Request, hash_root
from longspan.types import Adapter, ModelSpec, SamplingParams


class Intake:
    """Takes requests for one model on some ranks."""

    def __init__(self, model: ModelSpec, config: EngineConfig, placer: PagePlacer) -> None:
        """Keep what requests are checked against.

        Args:
            model: its vocabulary and limits.
            config: of the engine.
            placer: knows what fits the ranks.
        """
        self._model, self._config, self._placer = model, config, placer

    def check(self, prompt: Sequence[int], params: SamplingParams, adapter: Adapter | None = None) -> list[bytes]:
        """Refuse a request that can never run. Reads only what never changes.

        Args:
            prompt: its tokens.
            params: how to continue it.
            adapter: what it is continued with beside the model, or None.

        Returns:
            Hashes of the prompt's full pages, for the prefix cache; none where it is off.

        Raises:
            ConfigError: the prompt is empty, too long for the model, or holds a token that it does not know.
            CapacityError: it would not fit even on empty ranks.
        """
        if not prompt:
            raise ConfigError("prompt: got no tokens, legal is at least one")
        model = self._model
        biased = [token_id for token_id, _ in params.logit_bias]
        for token_id in (min(prompt), max(prompt), *params.stop_token_ids, *biased):
            if not 0 <= token_id < model.vocab_size:
                raise ConfigError(f"token id: got {token_id}, legal is 0 to {model.vocab_size - 1}")
        if params.min_tokens and len({*model.eos_token_ids, *params.stop_token_ids}) >= model.vocab_size:
            raise ConfigError("stop_token_ids: got all tokens of the model, legal with min_tokens is not all")
        limit = model.max_position
        if limit is not None and len(prompt) + params.max_tokens > limit:
            total = len(prompt) + params.max_tokens
            raise ConfigError(
                f"prompt + max_tokens: got {len(prompt)} + {params.max_tokens} = {total} tokens, legal is at most "
                f"{limit} (max_position_embeddings of the model)"
            )
        self._placer.check_fits(len(prompt), params.max_tokens)
        page_hashes: list[bytes] = []
        if self._config.enable_prefix_caching:
            root = hash_root(model.rope_lengths, len(prompt), adapter)
            extend_hashes(page_hashes, prompt, self._config.page_size, root)
        return page_hashes

    def take(
        self,
        request_id: int,
        prompt: list[int],
        params: SamplingParams,
        constraint: Constraint | None,
        page_hashes: list[bytes] | None,
        adapter: Adapter | None = None,
    ) -> Request:
        """Make a request.

        Args:
            request_id: its number.
            prompt: its tokens; the request keeps the list.
            params: how to continue it.
            constraint: which tokens are allowed next, or None.
            page_hashes: what `check` returned, if it has been called already.
            adapter: what it is continued with beside the model, or None.

        Raises:
            ConfigError, CapacityError: as in `check`.
        """
        if page_hashes is None:
            page_hashes = self.check(prompt, params, adapter)
        else:
            self._placer.check_fits(len(prompt), params.max_tokens)  # there may be fewer ranks since
        if params.is_constrained and constraint is None:
            raise ConfigError("json_schema: got no constraint with it, legal is one that `models.grammar` made of it")
        rope = self._model.rope_lengths
        return Request(
            request_id=request_id,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            token_ids=prompt,
            prompt_len=len(prompt),
            eos_token_ids=() if params.ignore_eos else self._model.eos_token_ids,
            constraint=constraint,
            page_hashes=page_hashes,
            rope_lengths=rope,
            rope_len=0 if rope is None else len(prompt),
            adapter=adapter,
        )
