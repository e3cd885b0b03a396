"""Python's garbage collector in a server: it must not stop all streams while many requests are open.

Holds when it collects. Must not know requests.
Read next: `longspan.server.run`, which sets it up.

Note [When the collector runs]
    Nearly all objects of a request end by their counts; the collector is for those that refer to each other. By itself
    it would go through everything that lives, again and again while requests become more: with 10,000 of them 25 times,
    for up to three seconds, in which nothing else runs. So it looks by itself at new objects alone, and at all of them
    when no request is open, or when `LATEST_S` seconds have passed.
"""

import asyncio
import gc
import time

from longspan.server.state import ServerState

NEW_OBJECTS, ROUNDS = 5_000, 5
"""New objects at which the collector looks, and how often before it looks again at those that were left."""

NEVER = 2**31 - 1

IDLE_S = 1.0
"""Seconds without an open request after which everything is looked at."""

LATEST_S = 600.0
"""Seconds after which everything is looked at, idle or not."""


def collect_new_objects_only() -> None:
    """Keep the collector from looking at everything by itself."""
    gc.set_threshold(NEW_OBJECTS, ROUNDS, NEVER)


async def collect_when_idle(state: ServerState) -> None:
    """Look at everything when no request is open, or seldom; goes on until it is cancelled."""
    last, is_due = time.monotonic(), False
    while True:
        await asyncio.sleep(IDLE_S)
        is_due = is_due or state.num_open > 0
        if is_due and (not state.num_open or time.monotonic() - last > LATEST_S):
            gc.collect()
            last, is_due = time.monotonic(), False
