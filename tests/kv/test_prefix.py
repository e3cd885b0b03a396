"""The record of who has which published page stays as small as what it says."""

import random

from longspan.kv.prefix import PageHolders


def test_sets_that_no_page_has_any_more_are_forgotten():
    rng, holders, has = random.Random(0), PageHolders(), {page: set() for page in (b"a", b"b", b"c")}
    for _ in range(20_000):
        page, rank = rng.choice(list(has)), rng.randrange(32)
        (holders.remove if rank in has[page] else holders.add)(page, rank)
        has[page] ^= {rank}
        assert holders.of(page) == has[page]
    assert holders.num_sets < 100
