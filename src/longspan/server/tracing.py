"""OpenTelemetry traces: one span per request, with the attributes that vLLM's spans have.

Holds the middleware that makes spans, and what sends them. Must not know routes, nor how requests run.
Read next: `longspan.server.access_log`, whose records are told; `longspan.server.app`, which installs the middleware.

Spans are sent by a thread of the OpenTelemetry library, in batches. Where the collector is gone or slow, up to 2,048 of
them wait, further ones are dropped, and requests notice nothing.
"""

import logging
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longspan.server.access_log import RequestRecord, record_of_scope

GENERATING = frozenset(("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"))
"""Addresses whose spans are called as vLLM calls them; those of others are called by method and address."""

END_S = 2.0
"""Seconds that the last spans may take to be sent when the server ends."""


class Traces:
    """Spans of one server, and the thread that sends them."""

    def __init__(self, endpoint: str, model: str) -> None:
        """Send nothing yet.

        Args:
            endpoint: address of the collector, for OTLP over HTTP, with its path.
            model: served name of the model.
        """
        said = _LastMessage()
        for name in ("opentelemetry.exporter", "opentelemetry.sdk"):
            logger = logging.getLogger(name)
            logger.addHandler(said)
            logger.propagate = False  # once per change is told below, in place of every attempt
        self._exporter = _Telling(OTLPSpanExporter(endpoint), endpoint, said)
        resource = Resource.create()
        if str(resource.attributes.get(SERVICE_NAME)).startswith("unknown_service"):  # OTEL_SERVICE_NAME is not set
            resource = resource.merge(Resource({SERVICE_NAME: "longspan"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("longspan.server")
        self._model, self._parent = model, TraceContextTextMapPropagator()

    def begin(self, headers: Headers) -> Span:
        """Begin the span of a request, below that of its client if its headers name one."""
        parent = self._parent.extract(dict(headers.items()))
        return self._tracer.start_span("llm_request", context=parent, kind=SpanKind.SERVER)

    def end(self, span: Span, scope: Scope, record: RequestRecord, status: int, took_s: float) -> None:
        """End the span of a request, with all that is known of it."""
        if span.is_recording():
            route = getattr(scope.get("route"), "path", None)  # None if a check in front of the routes refused it
            if route not in GENERATING:
                span.update_name(f"{scope['method']} {route}" if route else scope["method"])
            span.set_attributes(_attributes(scope, record, status, took_s, self._model))
            if status >= 500 or not status:
                span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send what is left, for at most `END_S` seconds."""
        last = threading.Thread(target=self._provider.shutdown, name="longspan-traces", daemon=True)
        last.start()
        last.join(END_S)
        self._exporter.is_quiet = True


class Tracing:
    """Middleware that makes a span of every POST."""

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        self._app, self._traces = app, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":  # probes and scrapes would bury all else
            await self._app(scope, receive, send)
            return
        status, started, record = 0, time.perf_counter(), record_of_scope(scope)
        span = self._traces.begin(Headers(scope=scope))

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            self._traces.end(span, scope, record, status, time.perf_counter() - started)


def _attributes(scope: Scope, record: RequestRecord, status: int, took_s: float, model: str) -> dict[str, Any]:
    """Return a span's attributes, in vLLM's names where it has one; times are in seconds."""
    first_s, prefill_s = record.first_token_s, record.prefill_s
    found: dict[str, Any] = {
        "http.request.method": scope["method"],
        "url.path": get_route_path(scope)[:200],
        "http.response.status_code": status or None,
        "gen_ai.request.id": record.request_id,
        "gen_ai.response.model": model,
        "gen_ai.latency.e2e": took_s,
        "gen_ai.usage.prompt_tokens": record.prompt_tokens,
        "gen_ai.usage.completion_tokens": record.generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.response.finish_reasons": record.reasons or None,
        "gen_ai.latency.time_to_first_token": first_s,
    }
    if record.params is not None:
        found |= {
            "gen_ai.request.max_tokens": record.params.max_tokens,
            "gen_ai.request.temperature": record.params.temperature,
            "gen_ai.request.top_p": record.params.top_p,
            "gen_ai.request.n": record.num_choices,
            "gen_ai.usage.num_sequences": record.num_sequences,
        }
    if first_s is not None and prefill_s is not None:
        decode_s = max(0.0, (record.ended_s or first_s) - first_s)
        found |= {
            "gen_ai.latency.time_in_queue": max(0.0, first_s - prefill_s),
            "gen_ai.latency.time_in_model_prefill": prefill_s,
            "gen_ai.latency.time_in_model_decode": decode_s,
            "gen_ai.latency.time_in_model_inference": prefill_s + decode_s,
        }
    return {name: value for name, value in found.items() if value is not None}


class _LastMessage(logging.Handler):
    """What the OpenTelemetry library said last."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


class _Telling(SpanExporter):
    """Exporter that says on standard error when the collector goes, and when it comes back."""

    def __init__(self, inner: SpanExporter, endpoint: str, said: _LastMessage) -> None:
        self._inner, self._endpoint, self._said = inner, endpoint, said
        self._is_lost = False
        self.is_quiet = False
        """Whether nothing is said any more."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        is_lost = result is not SpanExportResult.SUCCESS
        if is_lost != self._is_lost and not self.is_quiet:
            self._is_lost = is_lost
            if is_lost:
                why = " ".join(self._said.text.split())[:300]
                text = f"traces do not reach {self._endpoint}, and are dropped: {why}"
            else:
                text = f"traces reach {self._endpoint} again"
            print(f"longspan: {text}", file=sys.stderr, flush=True)
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._inner.force_flush(timeout_millis)
