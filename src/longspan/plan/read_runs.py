"""Rows of a step's output that are read, to sample from them or to score them.

Holds one pure function. Must not know tensors, or how rows are sampled.
Read next: `longspan.plan.types`, `Plan.last_layer`; `longspan.cp.eager`, which skips the other rows.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from longspan.plan.types import QueryRun, SampleRow, ScoreRun


def read_runs(
    query_runs: Sequence[QueryRun], samples: Iterable[SampleRow], scores: Iterable[ScoreRun]
) -> list[QueryRun]:
    """Parts of query runs that need logits, in plan order: the rows for which the last layer needs attention.

    A chunk in the middle of a prompt has no such row, its last chunk has one. The parts name no tokens.
    """
    read: dict[int, set[int]] = {}
    for row in samples:
        read.setdefault(row.request_id, set()).add(row.position)
    for score in scores:
        read.setdefault(score.request_id, set()).update(range(score.position, score.position + len(score.targets)))
    positions_of = {request_id: sorted(positions) for request_id, positions in read.items()}
    parts: list[QueryRun] = []
    for run in query_runs:
        positions = positions_of.get(run.request_id, [])
        index, last = bisect_left(positions, run.position), bisect_left(positions, run.end)
        while index < last:
            start = end = positions[index]
            while index < last and positions[index] == end:
                index, end = index + 1, end + 1
            parts.append(QueryRun(run.request_id, start, end - start, run.compute_rank, None))
    return parts
