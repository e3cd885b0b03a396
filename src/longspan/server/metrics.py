"""Metrics for Prometheus, under vLLM's names where they mean the same.

Holds counters, histograms, and the reading of the engine's snapshot. Must not know HTTP.
Read next: `longspan.engine.stats`.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from longspan.engine.stats import EngineStats, TierStats
from longspan.types import FinishReason

_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)
_REQUEST_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120)
_MODEL = "model_name"


class Metrics:
    """All metrics of one server."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        """Register all metrics.

        Args:
            model_name: label of every metric.
            stats: takes a snapshot of the engine; called for every scrape.
        """
        self._registry = CollectorRegistry()
        self._model_name = model_name

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, [_MODEL], registry=self._registry).labels(model_name)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            found = Histogram(name, text, [_MODEL], buckets=buckets, registry=self._registry)
            return found.labels(model_name)

        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests that came to their first token.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self.num_generated = 0
        """Tokens generated, as in `generation_tokens`, which cannot be read back."""
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason; abort: the client had gone.",
            [_MODEL, "finished_reason"],
            registry=self._registry,
        )
        for reason in FinishReason:
            self._success.labels(model_name, reason.value)  # a series that is absent looks like a broken scrape
        self.first_token_s = histogram(
            "vllm:time_to_first_token_seconds", "From the submission of a request to its first token.", _FIRST_S
        )
        self.token_s = histogram("vllm:inter_token_latency_seconds", "From one token to the next.", _TOKEN_S)
        self.request_s = histogram(
            "vllm:e2e_request_latency_seconds", "From the submission of a request to its last token.", _REQUEST_S
        )
        self._registry.register(_EngineCollector(model_name, stats))

    def count_tokens(self, num_tokens: int) -> None:
        """Count generated tokens."""
        self.generation_tokens.inc(num_tokens)
        self.num_generated += num_tokens

    def count_end(self, reason: FinishReason) -> None:
        """Count a request that has ended."""
        self._success.labels(self._model_name, reason.value).inc()

    def text(self) -> bytes:
        """Return the answer to a scrape."""
        return generate_latest(self._registry)


class RequestMetrics:
    """Times of one HTTP request's choices."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started_s = time.perf_counter()
        self._last_token_s: dict[int, float] = {}

    def advanced(self, choice_idx: int, prompt_len: int, num_tokens: int) -> None:
        """Count new tokens of a choice; several that come together divide the time equally."""
        if not num_tokens:
            return
        now, metrics = time.perf_counter(), self._metrics
        before = self._last_token_s.get(choice_idx)
        if before is None:
            metrics.first_token_s.observe(now - self._started_s)
            metrics.prompt_tokens.inc(prompt_len)
        num_intervals = num_tokens - (before is None)
        for _ in range(num_intervals):
            metrics.token_s.observe(0.0 if before is None else (now - before) / num_intervals)
        self._last_token_s[choice_idx] = now
        metrics.count_tokens(num_tokens)

    def ended(self, reason: FinishReason) -> None:
        """Count a choice that has ended."""
        self._metrics.count_end(reason)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._metrics.request_s.observe(time.perf_counter() - self._started_s)


class _EngineCollector(Collector):
    """Reads the engine's snapshot when it is scraped."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._model_name, self._stats = model_name, stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        total = sum(stats.kv_pages_total)
        yield self._gauge("vllm:num_requests_running", "Requests that hold pages.", stats.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for admission.", stats.num_waiting)
        yield self._gauge(
            "vllm:kv_cache_usage_perc",
            "KV pages in use, as a share of all: 1 is full.",
            sum(stats.kv_pages_used) / total if total else 0.0,
        )
        yield self._counter("vllm:num_preemptions", "Requests that gave up their pages.", stats.num_preemptions)
        yield self._counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries_tokens
        )
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found there.", stats.prefix_hit_tokens)
        num_drafts = stats.num_accepted_drafts + stats.num_rejected_drafts
        yield self._counter("vllm:spec_decode_num_drafts", "Times that drafts were checked.", stats.num_drafted)
        yield self._counter("vllm:spec_decode_num_draft_tokens", "Drafts that were checked.", num_drafts)
        yield self._counter(
            "vllm:spec_decode_num_accepted_tokens", "Drafts that became tokens.", stats.num_accepted_drafts
        )
        yield self._counter("longspan:restarts", "Times that ranks were lost and replaced.", stats.num_restarts)
        yield self._counter(
            "longspan:recovery_seconds",
            "From the notice that ranks were lost until new ones were ready, all times together.",
            stats.recovery_s,
        )
        yield self._gauge(
            "longspan:last_recovery_seconds", "The same, the last time; 0: never.", stats.last_recovery_s or 0.0
        )
        yield self._per("rank", GaugeMetricFamily, "longspan:kv_pages_used", "KV pages in use.", stats.kv_pages_used)
        yield self._per("rank", GaugeMetricFamily, "longspan:kv_pages_total", "KV pages.", stats.kv_pages_total)
        yield self._per(
            "rank",
            GaugeMetricFamily,
            "longspan:rank_share",
            "Part of a striped prompt that a rank holds and computes.",
            stats.rank_shares,
        )
        used, total_slots = stats.state_slots_used, stats.state_slots_total
        yield self._per("rank", GaugeMetricFamily, "longspan:state_slots_used", "States in use.", used)
        yield self._per("rank", GaugeMetricFamily, "longspan:state_slots_total", "Slots for states.", total_slots)
        yield self._per("rank", CounterMetricFamily, "longspan:busy_seconds", "Time spent on plans.", stats.busy_s)
        yield self._per(
            "rank", CounterMetricFamily, "longspan:tokens_computed", "Tokens computed.", stats.tokens_computed
        )
        yield self._per(
            "strategy",
            CounterMetricFamily,
            "longspan:steps",
            "(plan, KV group) pairs that used a strategy.",
            stats.steps_per_strategy,
        )
        yield self._per(
            "strategy",
            CounterMetricFamily,
            "longspan:sent_bytes",
            "Bytes that ranks sent each other.",
            stats.bytes_per_strategy,
        )

        yield from self._of_tiers(stats.tiers)

    def _of_tiers(self, tiers: Mapping[str, TierStats]) -> Iterable[Metric]:
        """What lies behind the pools; no series where nothing does."""
        kinds: tuple[tuple[type[Any], str, str, str], ...] = (
            (GaugeMetricFamily, "pages", "pages", "Pages of this model that a tier has."),
            (GaugeMetricFamily, "bytes", "num_bytes", "Bytes of these pages."),
            (CounterMetricFamily, "hits", "num_loads", "Requests that went on from a tier's pages."),
            (CounterMetricFamily, "hit_tokens", "hit_tokens", "Tokens that these did not compute."),
            (CounterMetricFamily, "loaded_pages", "loaded_pages", "Pages that ranks loaded."),
            (CounterMetricFamily, "loaded_bytes", "loaded_bytes", "Bytes that ranks loaded."),
            (CounterMetricFamily, "load_seconds", "load_s", "Time that ranks took to load, summed over ranks."),
            (CounterMetricFamily, "stored_pages", "stored_pages", "Pages that ranks stored."),
            (CounterMetricFamily, "stored_bytes", "stored_bytes", "Bytes that ranks stored."),
            (CounterMetricFamily, "store_seconds", "store_s", "Time that ranks took to store, summed over ranks."),
            (CounterMetricFamily, "failed_pages", "failed_pages", "Pages that could not be stored or loaded."),
            (CounterMetricFamily, "damaged_pages", "damaged_pages", "Pages that were found damaged."),
            (CounterMetricFamily, "dropped_pages", "dropped_pages", "Pages evicted before they were stored."),
        )
        for kind, name, field, text in kinds if tiers else ():
            values = {tier: getattr(stats, field) for tier, stats in tiers.items()}
            yield self._per("tier", kind, f"longspan:kv_tier_{name}", text, values)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=[_MODEL])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=[_MODEL])
        family.add_metric([self._model_name], value)
        return family

    def _per(
        self, label: str, kind: type[Any], name: str, text: str, values: Sequence[float] | Mapping[str, float]
    ) -> Metric:
        family: Metric = kind(name, text, labels=[_MODEL, label])
        pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
        for key, value in pairs:
            family.add_metric([self._model_name, str(key)], value)  # type: ignore[attr-defined]
        return family
