"""A small dose of `chaos.py`, whose full one takes minutes."""

import chaos
import pytest

pytestmark = pytest.mark.processes


def test_lost_ranks_lose_no_token_and_leave_nothing(cache_home):
    found = chaos.run(kills=6, streams=12, ranks=2, seed=53)
    assert not found["problems"]
    assert not found["leaks"]
    assert found["streams"] > 12
    assert {"kill", "kill again", "kill parent"} <= {kind for kind, count in found["of_which"].items() if count}
