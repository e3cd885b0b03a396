"""Visibility of keys to a run of queries: none, full, causal or band.

Holds the pure integer rule. Must not know tensors, pages or ranks.
Read next: `longspan.plan.segments`, which applies the rule to page tables.

All positions are global token indices of one request. A query at position `t` sees the keys at positions
`s` with `s <= t` and, under a sliding window of `w` tokens, `s > t - w`.

    window = None, queries 4..6            window = 3, queries 4..6
    key  0 1 2 3 4 5 6                     key  0 1 2 3 4 5 6
    q4   x x x x x . .                     q4   . . x x x . .
    q5   x x x x x x .                     q5   . . . x x x .
    q6   x x x x x x x                     q6   . . . . x x x
         `-full--' `causal'                     `--- band ---'

With chunks of `c` tokens it sees the causal keys of its own chunk. Runs of queries are cut where chunks end, and then
see full and causal ranges, from their chunk's first position on (`longspan.plan.segments.cut_runs`).
"""

from enum import StrEnum


class Visibility(StrEnum):
    """Visibility of a run of key positions to a run of query positions."""

    NONE = "none"
    """No query sees any key."""
    FULL = "full"
    """Every query sees every key; positions do not matter to the kernel."""
    CAUSAL = "causal"
    """A key is seen if its position is at most the query's."""
    BAND = "band"
    """Causal, and the key is one of the `window` newest positions that the query may see."""


def visibility(query_start: int, query_end: int, key_start: int, key_end: int, window: int | None) -> Visibility:
    """Visibility of keys `[key_start, key_end)` to queries `[query_start, query_end)`.

    Args:
        query_start: first query position.
        query_end: one past the last query position.
        key_start: first key position.
        key_end: one past the last key position.
        window: sliding window in tokens (the query's own position counts), or None for no window.

    Returns:
        The cheapest visibility that is exact; `NONE` when either run is empty.
    """
    if query_start >= query_end or key_start >= key_end:
        return Visibility.NONE
    last_query, last_key = query_end - 1, key_end - 1
    if key_start > last_query:
        return Visibility.NONE
    if window is not None:
        if last_key <= query_start - window:
            return Visibility.NONE
        if key_start <= last_query - window:
            return Visibility.BAND
    return Visibility.FULL if last_key <= query_start else Visibility.CAUSAL


def visible_keys(query_start: int, query_end: int, window: int | None, first: int = 0) -> tuple[int, int]:
    """The smallest range `[start, end)` of key positions that holds every key that some query sees.

    No query sees a key before `first`.
    """
    if query_start >= query_end:
        return (query_start, query_start)
    start = first if window is None else max(first, query_start - window + 1)
    return (start, query_end)


def split_visible_keys(
    query_start: int, query_end: int, window: int | None, first: int = 0
) -> list[tuple[int, int, Visibility]]:
    """Cut the keys that queries `[query_start, query_end)` see into ranges of one visibility each.

    The ranges are disjoint, ascending, and hold every visible key. Every key that can be in a `FULL` range is, since
    full ranges need no positions and no mask: with a window of 3, queries 4..5 see

        key  2     3      4 5
             band  full   causal  (key 2 only by query 4, key 5 only by query 5)

    No query sees a key before `first`.

    Returns:
        Ranges `(key_start, key_end, visibility)`, none of them empty.
    """
    if window is None:
        if query_end - query_start == 1:
            return [(first, query_end, Visibility.FULL)]
        if first < query_start < query_end:
            return [(first, query_start, Visibility.FULL), (query_start, query_end, Visibility.CAUSAL)]
    start, end = visible_keys(query_start, query_end, window, first)
    if start >= end:
        return []
    # Keys before the run are in no query's future. (Neither is the first query's own key, but leaving it to the causal
    # part keeps that part square.) A lone query needs no causal part at all.
    past_end = query_start if query_end - query_start > 1 else query_end
    # A key at or after the last query's oldest visible position is in every query's window.
    inside_start = start if window is None else max(start, query_end - window)
    if inside_start > past_end:  # the run is longer than the window: no key is seen by all
        cuts = [(start, end)]
    else:
        cuts = [(start, inside_start), (inside_start, past_end), (past_end, end)]
    return [(a, b, visibility(query_start, query_end, a, b, window)) for a, b in cuts if a < b]
