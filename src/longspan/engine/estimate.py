"""Estimate of the time that a prefill still takes.

Holds one function of numbers. Must not know displays, requests or ranks.
Read next: `longspan.cli.progress` and `longspan.server.generation`, which show it.

Note [Why not the rate so far]
    A token attends to all tokens before it, so the n-th costs a + 2 b n seconds and n tokens take a n + b n^2. At
    100,000 tokens most of the time may lie in b, and half of the tokens are then done after a quarter of the time.
"""

from collections.abc import Sequence


def time_left_s(samples: Sequence[tuple[int, float]], total: int) -> float | None:
    """Estimate the seconds until `total` tokens are done, by a least-squares fit of a n + b n^2 with a, b >= 0.

    Args:
        samples: (tokens done, seconds since the start), both growing.
        total: tokens in all.

    Returns:
        Seconds after the last sample; None while no sample has both tokens and time.
    """
    points = [(num_tokens / total, seconds) for num_tokens, seconds in samples if num_tokens > 0 and seconds > 0]
    if not points:
        return None
    s2, s3, s4 = (sum(x**power for x, _ in points) for power in (2, 3, 4))
    y1, y2 = (sum(seconds * x**power for x, seconds in points) for power in (1, 2))
    determinant = s2 * s4 - s3 * s3
    linear, square = y1 / s2, 0.0
    if len(points) > 1 and determinant > 1e-12 * s2 * s4:
        a, b = (y1 * s4 - y2 * s3) / determinant, (s2 * y2 - s3 * y1) / determinant
        if a < 0:
            linear, square = 0.0, y2 / s4
        elif b > 0:
            linear, square = a, b
    done = points[-1][0]
    return max(0.0, linear * (1 - done) + square * (1 - done * done))
