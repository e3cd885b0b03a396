"""Rows of a step's output that are read, to sample from them or to score them.

Holds one pure function. Must not know tensors, or how rows are sampled.
Read next: `longspan.plan.types`, `Plan.last_layer`; `longspan.cp.eager`, which skips the other rows.
"""

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
    parts: list[QueryRun] = []
    for run in query_runs:
        start: int | None = None
        wanted = read.get(run.request_id, set())
        for position in range(run.position, run.end + 1) if wanted else ():
            is_read = position in wanted and position < run.end
            if is_read and start is None:
                start = position
            elif not is_read and start is not None:
                parts.append(QueryRun(run.request_id, start, position - start, run.compute_rank, None))
                start = None
    return parts
