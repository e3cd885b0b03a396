"""One line per request on standard error, and the id by which client, proxy and log name it.

Holds the middleware, and the record that handlers fill. Must not know routes, nor how requests run.
Read next: `longspan.server.app`, which installs it; `longspan.server.generation`, which fills records;
`longspan.server.tracing`, which tells them too.
"""

import re
import sys
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longspan.server.config import ServerConfig
from longspan.types import SamplingParams

REQUEST_ID = "x-request-id"
_LEGAL_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,200}")
_RECORD = "longspan.record"
MAX_PATH = 200
"""Characters of a path that a line has."""


@dataclass(slots=True)
class RequestRecord:
    """What is told of one HTTP request."""

    request_id: str
    prompt_tokens: int | None = None
    """Tokens of the prompts; None if the request was refused before they were counted."""
    cached_tokens: int | None = None
    generated_tokens: int | None = None
    first_token_s: float | None = None
    """Seconds from the submission to the first token."""
    prefill_s: float | None = None
    """Seconds from the first step of the choice with the first token to that token."""
    ended_s: float | None = None
    """Seconds from the submission to the end of the last choice."""
    reasons: tuple[str, ...] = ()
    """Finish reasons of the choices, each once."""
    params: SamplingParams | None = None
    """Sampling parameters of the first choice; None if the request was refused before they were known."""
    num_choices: int = 0
    """Answers per prompt."""
    num_sequences: int = 0
    """Answers to all prompts."""


def record_of_scope(scope: Scope) -> RequestRecord:
    """Return the record of the request that an ASGI scope describes."""
    found: RequestRecord = scope.get(_RECORD) or RequestRecord("")
    return found


def record_of(request: Request) -> RequestRecord:
    """Return the record of a request."""
    return record_of_scope(request.scope)


class AccessLog:
    """Middleware that names requests, and writes their lines if the option says so."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app, self._config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        record = RequestRecord(given if _LEGAL_ID.fullmatch(given) else uuid.uuid4().hex)
        scope[_RECORD] = record
        started, status = time.perf_counter(), 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        finally:
            if self._config.access_log:
                self._write(scope, record, status, time.perf_counter() - started)

    def _write(self, scope: Scope, record: RequestRecord, status: int, took_s: float) -> None:
        client = scope.get("client") or ("-",)
        facts: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": record.request_id,
            "client": client[0] or "-",
            "method": scope["method"],
            "path": scope["path"][:MAX_PATH],
            "status": status or None,
            "ms": round(took_s * 1000, 1),
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "generated_tokens": record.generated_tokens,
            "first_token_ms": None if record.first_token_s is None else round(record.first_token_s * 1000, 1),
            "reason": "+".join(record.reasons) or None,
        }
        if self._config.log_format == "json":
            line = msgspec.json.encode(facts).decode()
        else:
            shown = " ".join(f"{name}={_shown(value)}" for name, value in facts.items() if value is not None)
            line = f"longspan: {shown}"
        print(line, file=sys.stderr, flush=True)


def _shown(value: object) -> str:
    """Return a value as one word: what a client sends must not look like another line."""
    text = str(value)
    return text if re.fullmatch(r"[!-~]+", text) and '"' not in text else msgspec.json.encode(text).decode()
