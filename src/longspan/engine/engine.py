"""The engine: schedule, run, update, until no request is left.

Holds the loop and the start-up. Must not know text: prompts and outputs are token ids here.
Read next: `longspan.llm`, the Python API on top; `longspan.scheduler.scheduler`.
"""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from types import TracebackType

import msgspec
import torch

from longspan.config import EngineConfig
from longspan.engine.executor import Executor
from longspan.engine.processes import ProcessExecutor
from longspan.engine.threads import ThreadExecutor
from longspan.errors import ConfigError
from longspan.kvcache.capacity import pool_pages
from longspan.models.inspect import inspect_model
from longspan.models.loader import load_config, resolve_dtype
from longspan.plan.types import PlanResult
from longspan.scheduler.request import Request
from longspan.scheduler.scheduler import Scheduler
from longspan.types import FinishReason, ModelSpec, SamplingParams
from longspan.worker.build import DEVICE
from longspan.worker.messages import Start

DEFAULT_KV_CACHE_MEMORY = 4 * 2**30


class RankStats(msgspec.Struct, frozen=True):
    """One rank's share of the work so far. Page and byte figures are peaks, summed over KV groups."""

    rank: int
    kv_pages_used: int
    kv_pages_total: int
    kv_bytes: int
    tokens_computed: int
    bytes_sent: int


class Engine:
    """Runs requests on the ranks of one cp_group. Not safe to use from several threads."""

    def __init__(self, config: EngineConfig, model: torch.nn.Module | None = None) -> None:
        """Check everything that can be checked before weights are loaded, then start the ranks.

        Args:
            config: what to run, and how.
            model: with the `threads` executor, a loaded module with the `longspan` attention function.

        Raises:
            ConfigError: something in the config is illegal or not proven.
            WorkerError: a worker could not start.
        """
        if model is not None and config.executor != "threads":
            raise ConfigError(f"executor: got {config.executor!r} with a loaded model, legal is 'threads'")
        model_config, generation_config = load_config(config.model)
        self.config = config
        self.spec: ModelSpec = inspect_model(model_config, generation_config, resolve_dtype(config.dtype, DEVICE))
        memory = config.kv_cache_memory or _default_kv_cache_memory(config.context_parallel_size)
        num_pages = pool_pages(self.spec, memory, config.page_size, config.max_num_batched_tokens)
        self.scheduler = Scheduler(self.spec, config, num_pages)
        start = Start(config, self.spec, num_pages, "")
        self._executor: Executor = (
            ThreadExecutor(start, model) if config.executor == "threads" else ProcessExecutor(start)
        )
        self._futures: set[Future[PlanResult]] = set()
        self.strategy_counts: Counter[str] = Counter()
        """(plan, KV group) pairs per strategy."""
        self._rank_totals = [(0, 0)] * config.context_parallel_size  # tokens computed, bytes sent

    def add_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> Request:
        """Queue a request. Raises: as `Scheduler.add_request`."""
        return self.scheduler.add_request(prompt_token_ids, params)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request early, for example because its text holds a stop string. Not while it is in flight."""
        self.scheduler.finish(request, reason)

    @property
    def has_requests(self) -> bool:
        return self.scheduler.has_requests

    def step(self) -> list[Request]:
        """Submit what can run, wait for the first plan to end, take in its result.

        Returns:
            The requests that advanced.

        Raises:
            WorkerError: a worker died or failed; the engine is of no more use.
        """
        while (plan := self.scheduler.schedule()) is not None:
            self.strategy_counts.update(group.strategy.value for group in plan.groups)
            self._futures.add(self._executor.submit(plan))
        assert self._futures, "requests wait, but no plan runs"
        done, self._futures = wait(self._futures, return_when=FIRST_COMPLETED)
        advanced: list[Request] = []
        for future in done:
            result = future.result()
            for r in result.ranks:
                self._rank_totals[r.rank] = (r.tokens_computed, r.bytes_sent)
            advanced += self.scheduler.update(result)
        return advanced

    def rank_stats(self) -> list[RankStats]:
        """What every rank holds and has done."""
        stats: list[RankStats] = []
        for rank, allocators in enumerate(self.scheduler.memory.allocators):
            tokens_computed, bytes_sent = self._rank_totals[rank]
            stats.append(
                RankStats(
                    rank=rank,
                    kv_pages_used=sum(allocator.peak_used for allocator in allocators),
                    kv_pages_total=sum(allocator.num_pages for allocator in allocators),
                    kv_bytes=sum(
                        allocator.peak_used * self.config.page_size * group.token_bytes
                        for allocator, group in zip(allocators, self.spec.kv_groups, strict=True)
                    ),
                    tokens_computed=tokens_computed,
                    bytes_sent=bytes_sent,
                )
            )
        return stats

    def close(self) -> None:
        """End the ranks. May be called twice."""
        self._executor.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _default_kv_cache_memory(num_ranks: int) -> int:
    """Bytes per rank: 4 GiB, or an equal share of half the memory that is free now."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return min(DEFAULT_KV_CACHE_MEMORY, free // 2 // num_ranks)
