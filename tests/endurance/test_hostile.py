"""A small dose of `hostile.py`, whose full one takes minutes."""

import hostile
import pytest

pytestmark = pytest.mark.processes


def test_hostile_clients_hurt_nobody_and_leave_nothing(cache_home):
    found = hostile.run(requests=300, seed=7, clients=4, idle=50)
    assert not found["wrong"]
    assert not found["left"]
    assert found["asked"] > 1
    assert {"200", "400"} <= set(found["answers"])
