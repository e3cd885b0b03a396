"""How long a prefill will still take, from what it took so far."""

import pytest

from longspan.engine.estimate import time_left_s


@pytest.mark.parametrize(("linear", "square"), [(1e-3, 0.0), (1e-3, 1e-7), (0.0, 1e-7)])
def test_time_left_is_exact_where_time_is_linear_and_quadratic_in_tokens(linear, square):
    def seconds(n):
        return linear * n + square * n * n

    samples = [(n, seconds(n)) for n in range(2048, 30_000, 2048)]
    left_s = time_left_s(samples, 100_000)
    assert left_s == pytest.approx(seconds(100_000) - samples[-1][1], rel=1e-6)


def test_time_left_with_little_to_go_by():
    assert time_left_s([], 100) is None
    assert time_left_s([(0, 1.0)], 100) is None
    assert time_left_s([(25, 1.0)], 100) == pytest.approx(3.0)
    assert time_left_s([(25, 1.0), (25, 1.0)], 100) == pytest.approx(3.0)
    assert time_left_s([(100, 5.0)], 100) == 0.0
    faster = time_left_s([(10, 5.0), (20, 6.0), (30, 7.0)], 100)  # a slow start must not make the rest free
    assert 0 < faster < 30
