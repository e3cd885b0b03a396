"""Replacement of lost ranks: how often it is tried, which requests are to blame, and how long it took.

Holds the budget of restarts, the choice of requests to give up, and totals over restarts. Must not know how ranks run,
nor streams.
Read next: `longspan.engine.engine`, whose `recover` uses this; Note [Lost ranks] in `longspan.scheduler.scheduler`.

Note [What may be lost]
    KV is a cache of what the driver knows: token ids, seeds, grammar states. So when a rank dies, all ranks end, new
    ones start, and every request that ran is computed again from its prompt and the tokens that it has. Tokens are not
    drawn again, and the next one depends on seed and position alone. A `ConfigError` is not tried again: options that
    cannot be done would fail again.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable

from msgspec import structs

from longspan.config import EngineConfig
from longspan.cpu_binding import with_processes
from longspan.errors import CapacityError, ConfigError, LongspanError, WorkerError
from longspan.plan.types import RankResult
from longspan.scheduler.request import Request
from longspan.scheduler.scheduler import Scheduler
from longspan.types import FinishReason

RESTART_WINDOW_S = 600.0
"""Seconds within which `max_restarts` limits the restarts."""

STARTS = 2
"""Failed starts after which one rank less is tried; counted anew for every rank less."""

POISON_CRASHES = 4
"""Losses in a row during one request after which it is not tried again; it ran alone during the last two."""

log = logging.getLogger(__name__)


class Restarts:
    """Record of restarts, and whether one more is allowed."""

    def __init__(self, most: int) -> None:
        """Make an empty record.

        Args:
            most: restarts allowed within `RESTART_WINDOW_S` seconds.
        """
        self._most = most
        self._at_s: deque[float] = deque()
        self.num_done = 0
        """Times that new ranks were ready."""
        self.total_s = 0.0
        """Seconds from the notice that ranks were lost until new ones were ready, summed over restarts."""
        self.last_s: float | None = None
        """Seconds that the last restart took; None if there was none."""

    def take(self, cause: BaseException) -> None:
        """Use up one restart.

        Args:
            cause: why the ranks are lost.

        Raises:
            BaseException: the cause, if a restart would not help or none is allowed.
            WorkerError: there were too many restarts; names the cause.
        """
        if not self._most or not isinstance(cause, LongspanError) or isinstance(cause, ConfigError):
            raise cause
        now = time.monotonic()
        while self._at_s and now - self._at_s[0] > RESTART_WINDOW_S:
            self._at_s.popleft()
        if len(self._at_s) >= self._most:
            times = "once" if self._most == 1 else f"{self._most} times"
            raise WorkerError(
                f"{cause}; the ranks were started again {times} within {RESTART_WINDOW_S:g} s before (max_restarts)"
            ) from cause
        self._at_s.append(now)
        log.warning("longspan: the ranks are lost: %s; new ones start", cause)

    def note_ready(self, seconds: float, num_requests: int) -> None:
        """Note that new ranks are ready.

        Args:
            seconds: time that the restart took.
            num_requests: requests that go on or wait.
        """
        self.num_done += 1
        self.total_s += seconds
        self.last_s = seconds
        log.warning("longspan: new ranks are ready after %.2f s; %d requests go on", seconds, num_requests)


def fail_poison(scheduler: Scheduler, cause: BaseException) -> list[Request]:
    """End and return the requests during which the ranks were lost too often. Call it after `Scheduler.restart`."""
    poison = [request for request in scheduler.waiting if request.num_crashes >= POISON_CRASHES]
    for request in poison:
        request.fail(
            f"the ranks were lost {request.num_crashes} times in a row while they computed this request, the last time "
            f"because: {cause}; it is not tried again"
        )
        scheduler.finish(request, FinishReason.ERROR)
        log.warning("longspan: request %d: %s", request.request_id, request.error)
    return poison


def fewer_ranks(config: EngineConfig) -> EngineConfig | None:
    """Return the options with one rank less; None if that would be too few, or an option describes all ranks."""
    size = config.context_parallel_size - 1
    if not config.may_lose_ranks or size < (config.min_ranks or 1):
        return None
    log.warning("longspan: the ranks cannot be started again; the next try is with %d of %d", size, size + 1)
    nodes = config.nodes
    if nodes is not None:
        names = sorted(set(nodes[:size]))
        nodes = tuple(names.index(node) for node in nodes[:size])
    weights = config.rank_weights
    weights = weights[:size] if isinstance(weights, tuple) else weights
    binding = with_processes(config.cpu_binding, size * config.tensor_parallel_size)
    return structs.replace(config, context_parallel_size=size, nodes=nodes, rank_weights=weights, cpu_binding=binding)


def fail_unfit(scheduler: Scheduler) -> list[Request]:
    """End and return the requests that fewer ranks cannot hold. Call it after `Scheduler.take_over`."""
    unfit: list[Request] = []
    for request in list(scheduler.waiting):
        try:
            scheduler.memory.placer.check_fits(request.prompt_len, request.params.max_tokens)
        except CapacityError as error:
            request.fail(f"ranks were lost and cannot be started again, and the others cannot hold it: {error}")
            scheduler.finish(request, FinishReason.ERROR)
            unfit.append(request)
    return unfit


def add_totals(earlier: dict[int, RankResult], last: Iterable[RankResult]) -> dict[int, RankResult]:
    """Return the totals of every rank: those of lost ranks plus those of the ranks that run."""
    found = dict(earlier)
    for result in last:
        before = found.get(result.rank)
        found[result.rank] = result if before is None else _sum(before, result)
    return found


def _sum(before: RankResult, last: RankResult) -> RankResult:
    names = {*before.strategy_bytes, *last.strategy_bytes}
    return structs.replace(
        last,
        tokens_computed=before.tokens_computed + last.tokens_computed,
        bytes_sent=before.bytes_sent + last.bytes_sent,
        busy_s=before.busy_s + last.busy_s,
        strategy_bytes={name: before.strategy_bytes.get(name, 0) + last.strategy_bytes.get(name, 0) for name in names},
    )
