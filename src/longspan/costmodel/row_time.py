"""Predicted time of one more row in a decode step, and how many drafts pay for theirs.

Holds a fit to finished steps, and arithmetic. Must not know clocks: ranks report how long a step took.
Read next: `longspan.scheduler.drafting`, which asks for every step.

Note [Rows of a decode step]
    A step takes `fixed + rows * row_s`: where it is latency (few rows, many messages, weights to read) the first part
    is nearly all of it, and in a full batch the second. Both are fitted to the latest steps (least squares, weights
    halved every 13 steps), whatever strategy, links and kernels they had. Steps that all have the same number of rows
    say nothing of a row's time, so the slope is drawn towards `FIRST_SHARE` of a step.

Note [Which drafts pay]
    A step of so many decodes brings as many tokens. The j-th draft of a request whose drafts are right with probability
    p brings `p ** j` more, and takes the time of a row. It pays where that is a larger share of the step's tokens than
    the row is of the step's time. A step with drafts is not run ahead of: together they must pay for that wait as well.

        1 decode, p = 0.7, a row is 0.1 of a step     0.7  0.49  0.34  0.24  0.17  0.12  0.08    six pay
        16 decodes, a row is 0.05 of a step           all must exceed 0.8                        none pays
"""

from collections.abc import Sequence

WAIT_SHARE = 0.2
"""Share of a step that ranks wait for the next one where none is run ahead: 0.2 of a step of 3.4 ms, 0.07 of one of
9 ms (decision 0017)."""

FIRST_SHARE = 0.06
"""Share of a step of one row that one more is assumed to take while nothing is known."""

LEAST_SHARE = 0.01
"""Least share of a step of one row that one more takes: noise must not make rows free."""

MEMORY = 0.95
"""Factor on the weights of earlier steps when a new one is learnt."""

PRIOR_ROWS = 1.0
"""Spread of rows, in rows squared, at which what was seen counts as much as `FIRST_SHARE`."""


class RowTime:
    """Prediction of what a row more takes."""

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # weighted sums of 1, rows, seconds, rows^2, rows * seconds

    def learn(self, num_rows: int, step_s: float) -> None:
        """Learn from a decode step of so many rows."""
        if step_s <= 0:
            return
        new = (1.0, num_rows, step_s, num_rows * num_rows, num_rows * step_s)
        self._sums = tuple(MEMORY * old + one for old, one in zip(self._sums, new, strict=True))  # type: ignore[assignment]

    def share(self, num_rows: int) -> float:
        """Time of one row more, as a share of a step of so many rows."""
        found = self._predicted(num_rows)
        return FIRST_SHARE if found is None else found[0] / found[1] if found[1] > 0 else 0.0

    def step_s(self, num_rows: int) -> float | None:
        """Seconds of a step of so many rows; None while nothing is known."""
        found = self._predicted(num_rows)
        return None if found is None else found[1]

    def _predicted(self, num_rows: int) -> tuple[float, float] | None:
        """Seconds of one row more, and of a step of so many rows; None while nothing is known."""
        weight, rows_sum, seconds_sum, squares, products = self._sums
        if not weight:
            return None
        mean_rows, mean_s = rows_sum / weight, seconds_sum / weight
        spread = max(0.0, squares / weight - mean_rows**2)
        assumed_s = mean_s * FIRST_SHARE / (1 + FIRST_SHARE * max(0.0, mean_rows - 1))
        row_s = (products / weight - mean_rows * mean_s + PRIOR_ROWS * assumed_s) / (spread + PRIOR_ROWS)
        row_s = min(max(mean_s * LEAST_SHARE, row_s), mean_s / mean_rows)  # without rows it takes no less than nothing
        return row_s, mean_s + (num_rows - mean_rows) * row_s


def count_drafts(
    offers: Sequence[tuple[float, int]], num_decodes: int, row_share: float, wait_share: float
) -> list[int]:
    """Drafts of each request that pay. See Note [Which drafts pay].

    Args:
        offers: per request, the probability that a draft is right, and how many there are.
        num_decodes: requests of the step that get a token.
        row_share: time of one row more, as a share of the step.
        wait_share: time that is lost where a step has drafts, as a share of the step.
    """
    counts: list[int] = []
    gain = 0.0
    for hit_rate, most in offers:
        count, chance = 0, hit_rate
        while count < most and chance > num_decodes * row_share:
            gain += chance
            count, chance = count + 1, chance * hit_rate
        counts.append(count)
    cost = num_decodes * (row_share * sum(counts) + wait_share)
    return counts if gain > cost else [0] * len(counts)
