"""Promises add up: against the rule, recomputed from what every request was promised and holds. No scheduler."""

import pytest
from fake_ranks import make_config, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.scheduler.reservations import Claims, RankPools, Reservations
from longspan.sharding.capacity import window_pages

NUM_RANKS = 3


def pools_of(num_ranks: int) -> RankPools:
    """A group without a window, and one where a request holds at most four pages on a rank."""
    return RankPools(num_pages=((40, 10),) * num_ranks, most_held=(None, 4))


POOLS = pools_of(NUM_RANKS)


def test_a_rank_holds_all_pages_of_a_request_or_those_of_a_window_and_a_step():
    pools = RankPools.of(make_model(None, 20), make_config(), [(40, 10)] * 2)
    assert pools.most_held == (None, window_pages(20, 4, 16))
    assert [pools.needed(0, n) for n in (0, 3, 4000)] == [0, 3, 4000]
    assert [POOLS.needed(1, n) for n in (0, 3, 4, 4000)] == [0, 3, 4, 4]


@pytest.mark.parametrize(
    ("most_held", "limiting", "limit"),
    [((None, 4), 0, 40), ((4, None), 1, 10), ((4, 5), None, 40), ((None, None), 0, 10)],
)
def test_the_least_room_of_groups_without_a_window_limits_lengths(most_held, limiting, limit):
    pools = RankPools(((40, 10),), most_held)
    assert (pools.limiting_group, pools.limits) == (limiting, (limit,))


def test_pages_fit_a_rank_if_every_group_has_room_for_what_is_held_at_once():
    assert POOLS.fit(40, [40, 4])
    assert not POOLS.fit(40, [39, 4])
    assert not POOLS.fit(40, [40, 3])
    assert POOLS.fit(3, [3, 3])


class Books:
    """Requests that place, hold and give back pages, in any order."""

    def __init__(self) -> None:
        self.reservations = Reservations(POOLS)
        self.claims: list[Claims] = []
        self.shared = [0] * NUM_RANKS

    def step(self, action: str, i: int, rank: int, group_idx: int) -> None:
        if action == "come" or not self.claims:
            self.claims.append(Claims(2))
            return
        claims = self.claims[i % len(self.claims)]
        held = claims.held[group_idx].get(rank, 0)
        if action == "place":
            self.reservations.promise(claims, rank, 1 + i % 3)
        elif action == "hold" and held < claims.promised[group_idx].get(rank, 0):
            self.reservations.hold(claims, group_idx, rank, 1)
        elif action == "drop" and held:
            self.reservations.hold(claims, group_idx, rank, -1)
        elif action == "share":
            self.reservations.share(group_idx, rank, 1)
            self.shared[rank] += group_idx == 1
        elif action == "end":
            for group, of_group in enumerate(claims.held):
                for held_on, num_pages in list(of_group.items()):
                    self.reservations.hold(claims, group, held_on, -num_pages)
            self.reservations.release(claims)
            self.claims.remove(claims)

    def promised(self) -> list[list[int]]:
        """By the rule: what is promised and not held; in groups with a window, further users of pages besides."""
        return [
            [
                sum(max(0, c.promised[g].get(rank, 0) - c.held[g].get(rank, 0)) for c in self.claims)
                + self.shared[rank] * (g == 1)
                for g in range(2)
            ]
            for rank in range(NUM_RANKS)
        ]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["come", "place", "place", "hold", "hold", "drop", "share", "end"]),
            st.integers(0, 5),
            st.integers(0, NUM_RANKS - 1),
            st.integers(0, 1),
        ),
        max_size=60,
    )
)
def test_promises_are_what_requests_may_still_need(actions):
    books = Books()
    for action in actions:
        books.step(*action)
        assert books.reservations.promised == books.promised()
        for claims in books.claims:
            for rank, num_pages in claims.placed.items():
                assert [promised[rank] for promised in claims.promised] == [num_pages, min(num_pages, 4)]


def test_room_is_what_is_available_and_not_promised():
    reservations, claims = Reservations(pools_of(2)), Claims(2)
    reservations.promise(claims, 1, 7)
    assert reservations.room([[10, 5], [10, 5]]) == [[10, 5], [3, 1]]
    reservations.hold(claims, 0, 1, 2)  # what is held was promised
    assert reservations.room([[10, 5], [8, 5]]) == [[10, 5], [3, 1]]


def test_one_more_page_fits_where_every_group_has_room_or_holds_all_it_ever_will():
    reservations, claims = Reservations(pools_of(2)), Claims(2)
    reservations.promise(claims, 0, 4)
    assert reservations.fits_one_more(claims, 0, [5, 4]), "a window's fourth page is its last"
    assert not reservations.fits_one_more(claims, 0, [4, 4])
    assert reservations.fits_one_more(claims, 1, [1, 1])
    assert not reservations.fits_one_more(claims, 1, [1, 0])


def test_a_page_given_back_behind_a_window_is_counted_on_again():
    reservations, claims = Reservations(pools_of(1)), Claims(2)
    reservations.promise(claims, 0, 9)
    for _ in range(4):
        reservations.hold(claims, 1, 0, 1)
    assert reservations.promised == [[9, 0]]
    reservations.hold(claims, 1, 0, -1)
    assert reservations.promised == [[9, 1]]


def test_rejects_an_end_of_a_request_that_holds_pages():
    reservations, claims = Reservations(pools_of(1)), Claims(2)
    reservations.promise(claims, 0, 1)
    reservations.hold(claims, 0, 0, 1)
    with pytest.raises(AssertionError, match="holds pages"):
        reservations.release(claims)


def test_nothing_is_promised_after_all_is_forgotten():
    reservations = Reservations(pools_of(2))
    reservations.promise(Claims(2), 1, 3)
    reservations.forget_all()
    assert reservations.promised == [[0, 0], [0, 0]]
