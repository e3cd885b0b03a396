"""Events of `GET /live`: what the server is doing, twice a second, for the page at `/` and other watchers.

Holds the shape of the events, and snapshots that all watchers share. Nothing runs while nobody watches. Must not know
how a page looks.
Read next: `longspan.engine.live`, the snapshot; `longspan.server.page_map`, its map; docs/server.md, all fields.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from importlib.metadata import version
from typing import Any

from longspan.costmodel.explain import StrategyChoice
from longspan.engine.estimate import time_left_s
from longspan.engine.live import LiveRequest, LiveSnapshot
from longspan.server.page_map import make_map
from longspan.server.sse import event
from longspan.server.state import ServerState

INTERVAL_S = 0.5
"""Seconds between two events, at least."""

SHARE = 0.1
"""Most of a core's time that snapshots may take: after one that took long, the next waits the longer."""

LOOK_S = 2.0
"""Seconds that the engine's thread may take to come between two steps; then an event says only how the server is."""

MAX_ROWS = 200
"""Most requests that an event describes one by one."""


class LiveFeed:
    """Events for all watchers of one server. Only its event loop may use it."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._lock = asyncio.Lock()
        self._event = b""
        self._next_s = 0.0  # on the monotonic clock, when a new event is worth making
        self._samples: dict[int, list[tuple[int, float]]] = {}  # (prompt tokens computed, seconds) by request id

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield what does not change, and then the state again and again, until the server ends."""
        yield event(self._server())
        while not self._state.is_draining:
            yield await self._latest()
            await asyncio.sleep(max(INTERVAL_S / 2, self._next_s - time.monotonic()))

    async def _latest(self) -> bytes:
        """Return an event that is not much older than the interval; one watcher makes it for all."""
        async with self._lock:
            started = time.monotonic()
            if started >= self._next_s:
                snapshot = None if self._state.engine.is_recovering else await self._state.engine.look(LOOK_S)
                looked = time.monotonic()
                if snapshot is None:
                    found = self._status()
                else:
                    left = self._times_left(snapshot)
                    found = self._status() | await asyncio.to_thread(state_of, snapshot, left)
                self._event = event(found)
                self._next_s = max(started + INTERVAL_S, looked + (time.monotonic() - looked) / SHARE)
            return self._event

    def _server(self) -> dict[str, Any]:
        state = self._state
        return {
            "type": "server",
            "version": version("longspan"),
            "model": state.model_name,
            "page_size": state.engine.config.page_size,
            "longest_request": state.lengths.longest_request,
            "has_chat_template": state.tokenizers.tokenizer.chat_template is not None,
        }

    def _status(self) -> dict[str, Any]:
        engine = self._state.engine
        status: str
        reason: str | None
        if engine.failure is not None:
            status, reason = "failed", str(engine.failure)
        elif engine.is_recovering:
            status, reason = "recovering", str(engine.engine.failure or "ranks were lost")
        else:
            status, reason = "ok", None
        return {
            "type": "state",
            "time_s": round(time.monotonic(), 3),
            "status": status,
            "reason": reason,
            "generated_tokens": self._state.metrics.num_generated,
        }

    def _times_left(self, snapshot: LiveSnapshot) -> dict[int, float]:
        """Estimate the seconds until each prompt is computed, from what earlier snapshots have shown."""
        samples: dict[int, list[tuple[int, float]]] = {}
        left: dict[int, float] = {}
        for request in snapshot.running:
            if request.num_generated or request.since_start_s is None:
                continue
            done = (request.num_computed - request.num_cached, request.since_start_s)
            known = self._samples.get(request.request_id, [])
            if not known or known[-1][0] != done[0]:
                known = [*known, done] if not known or done[0] > known[-1][0] else [done]
            samples[request.request_id] = known
            estimate = time_left_s(known, max(1, request.prompt_len - request.num_cached))
            if estimate is not None:
                left[request.request_id] = max(0.0, estimate - (request.since_start_s - known[-1][1]))
        self._samples = samples
        return left


def state_of(snapshot: LiveSnapshot, left_s: dict[int, float]) -> dict[str, Any]:
    """Return the fields of an event that a snapshot fills.

    Args:
        snapshot: state of the engine.
        left_s: seconds until prompts are computed, by request id, where there is an estimate.
    """
    stats, page_map = snapshot.stats, make_map(snapshot)
    free = [sum(end - first for first, end in runs) for runs in snapshot.free_slots]
    ranks = [
        {
            "pages": pages,
            "free": free[rank],
            "cached": pages - free[rank] - snapshot.num_used[rank],
            "busy_s": round(stats.busy_s[rank], 3),
            "tokens": stats.tokens_computed[rank],
            "share": round(stats.rank_shares[rank], 4),
            "cells": page_map.cells[rank],
        }
        for rank, pages in enumerate(snapshot.num_pages)
    ]
    rows = _rows(snapshot, left_s)
    return {
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "requests": rows,
        "slots_per_cell": page_map.slots_per_cell,
        "ranks": ranks,
        "strategies": [_choice(choice) for choice in snapshot.choices],
        "steps_per_strategy": stats.steps_per_strategy,
        "bytes_per_strategy": stats.bytes_per_strategy,
        "prefix_queries_tokens": stats.prefix_queries_tokens,
        "prefix_hit_tokens": stats.prefix_hit_tokens,
        "preemptions": stats.num_preemptions,
        "restarts": stats.num_restarts,
        "last_recovery_s": stats.last_recovery_s,
    }


def _rows(snapshot: LiveSnapshot, left_s: dict[int, float]) -> list[dict[str, Any]]:
    """Return the requests that are described: those that run, and then those that wait, as far as there is room."""
    running = [_row(request, "prefill" if request.num_generated == 0 else "decode") for request in snapshot.running]
    for row in running:
        row["left_s"] = None if row["id"] not in left_s else round(left_s[row["id"]], 1)
    num_waiting = max(0, MAX_ROWS - len(running))
    waiting: Sequence[LiveRequest] = snapshot.waiting[:num_waiting]
    return running[:MAX_ROWS] + [_row(request, "waiting") for request in waiting]


def _row(request: LiveRequest, phase: str) -> dict[str, Any]:
    return {
        "id": request.request_id,
        "phase": phase,
        "prompt": request.prompt_len,
        "computed": request.num_computed,
        "cached": request.num_cached,
        "generated": request.num_generated,
        "max_tokens": request.max_tokens,
        "preemptions": request.num_preemptions,
        "left_s": None,
        "stripes": request.stripes,
        "num_stripes": request.num_stripes,
    }


def _choice(choice: StrategyChoice) -> dict[str, Any]:
    return {
        "phase": choice.phase.value,
        "group": choice.group_idx,
        "strategy": choice.strategy.value,
        "forced": choice.is_forced,
        "steps": choice.num_steps,
        "queries": choice.num_queries,
        "keys": choice.num_keys,
        "ranks": choice.num_ranks,
        "candidates": [
            {
                "strategy": candidate.strategy.value,
                "predicted_ms": round(candidate.predicted_s * 1e3, 4),
                "compute_ms": round(candidate.compute_s * 1e3, 4),
                "wait_ms": round(candidate.wait_s * 1e3, 4),
                "copy_ms": round(candidate.copy_s * 1e3, 4),
                "sent_bytes": candidate.sent_bytes,
            }
            for candidate in choice.candidates
        ],
    }
