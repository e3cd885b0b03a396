"""Some of the histories of `simulate.py`, and that they can find something."""

import pytest
import simulate

from longspan.kv.prefix import CachingAllocator
from longspan.scheduler.delivery import Delivery
from longspan.scheduler.memory import KVMemory
from longspan.scheduler.request import Request

pytestmark = pytest.mark.cover


@pytest.mark.parametrize("first", range(0, 100, 10))
def test_histories_of_lost_ranks_keep_every_promise(first):
    for seed in range(first, first + 10):
        _, _, trace = simulate.run_seed(seed)
        assert not trace, f"{trace}\npython tests/endurance/simulate.py --seeds 1 --first {seed}"


def test_a_seed_says_all():
    assert simulate.run_seed(5)[1] == simulate.run_seed(5)[1]


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (KVMemory, "forget_all", lambda self: None),
        (CachingAllocator, "forget_all", lambda self: None),
        (Request, "lose_ranks", lambda self, *, was_in_flight: self.preempt()),
        (Request, "preempt", lambda self: None),
        (Delivery, "forget_tables", lambda self: None),
    ],
    ids=[
        "pages_stay_held",
        "the_cache_stays_full",
        "losses_are_not_counted",
        "requests_keep_lost_pages",
        "lost_ranks_count_as_informed",
    ],
)
def test_what_is_not_forgotten_after_a_loss_is_noticed(owner, name, broken, monkeypatch):
    monkeypatch.setattr(owner, name, broken)
    assert any(simulate.run_seed(seed)[2] for seed in range(60))
