"""What a request's metrics count. `tests/server/test_server.py` has what a scrape says of a real server."""

from types import SimpleNamespace

import pytest

from longspan.server.metrics import RequestMetrics


@pytest.mark.parametrize(("steps", "intervals"), [((1, 1, 1), 2), ((1, 2), 2), ((2, 1, 0, 3), 5)])
def test_tokens_that_come_together_are_several_intervals(steps, intervals):
    """Two plans may end before the first is looked at."""
    seen, firsts, counted = [], [], []
    counter = SimpleNamespace(inc=counted.append)
    request = RequestMetrics(
        SimpleNamespace(
            token_s=SimpleNamespace(observe=seen.append),
            first_token_s=SimpleNamespace(observe=firsts.append),
            prompt_tokens=counter,
            generation_tokens=counter,
        )
    )
    for num_tokens in steps:
        request.advanced(0, 100, num_tokens)
    assert (len(firsts), len(seen), sum(counted)) == (1, intervals, 100 + sum(steps))
    assert all(time_s >= 0 for time_s in seen)
