"""Proves that the next lead is found among touched lanes as if all turns were made and sorted every time."""

import random

from longspan.scheduler.lanes import Lanes
from longspan.scheduler.load import DECODE_COST, RankLoad
from longspan.scheduler.request import Request
from longspan.scheduler.turns import PATIENCE, Turn, Turns
from longspan.types import Phase, SamplingParams


class Ranks:
    """Requests that are ready, their ranks, and what the scheduler notes of plans."""

    def __init__(self, rng: random.Random, num_ranks: int) -> None:
        self.rng, self.num_ranks = rng, num_ranks
        self.turns = Turns(num_ranks)
        self.lanes = Lanes(self.turns, num_ranks)
        self.ready: dict[int, tuple[Request, frozenset[int]]] = {}
        self.busy: set[int] = set()
        self.next_plan_id = self.next_request_id = 0
        self.num_running = 8

    def add(self) -> None:
        num_known, request_id = self.rng.choice([1, 1, 5]), self.next_request_id
        self.next_request_id += 1
        request = Request(request_id, SamplingParams(), 0, [5] * num_known, num_known, ())
        request.delivery.wait_from(self.rng.randrange(-1, max(1, self.next_plan_id)))
        count = self.rng.choice([1, 1, 1, 2, self.num_ranks])
        ranks = frozenset(self.rng.sample(range(self.num_ranks), min(count, self.num_ranks)))
        self.ready[request_id] = (request, ranks)
        self.lanes.put([(request, ranks)])

    def sorted_turns(self) -> list[Turn]:
        return sorted(self.turns.of(*entry, self.next_plan_id, self.num_running) for entry in self.ready.values())

    def expected_lead(self) -> Turn | None:
        taken = set(self.busy)
        for turn in self.sorted_turns():
            if not turn.ranks & taken:
                return turn
            taken |= turn.ranks
        return None

    def plan(self, lead: Turn) -> None:
        """Take the lead and some of its members out, as a plan would."""
        members = self.lanes.members(lead, self.next_plan_id, self.num_running)
        assert members == [turn for turn in self.sorted_turns() if turn.ranks <= lead.ranks]
        assert any(turn is lead for turn in members)
        prefills = lead.request.phase is Phase.PREFILL
        if prefills:
            for rank in lead.ranks:
                self.turns._last_prefill[rank] = self.next_plan_id
            self.lanes.note_prefill(lead.ranks)
        for turn in list(members):
            if turn is lead or self.rng.random() < 0.5:
                self.lanes.discard([turn.request])
                del self.ready[turn.request_id]
        self.busy |= lead.ranks
        self.next_plan_id += self.rng.choice([1, 1, 30])


def test_the_lead_is_the_first_of_all_turns_whose_ranks_are_idle_and_unclaimed():
    num_leads = num_waits = 0
    for seed in range(150):
        rng = random.Random(seed)
        ranks = Ranks(rng, rng.choice([1, 2, 3, 8]))
        for _ in range(60):
            action = rng.random()
            if action < 0.4:
                ranks.add()
            elif action < 0.5 and ranks.ready:
                request, _ = ranks.ready.pop(rng.choice(list(ranks.ready)))
                ranks.lanes.discard([request])
            elif action < 0.7:
                ranks.busy -= set(rng.sample(range(ranks.num_ranks), rng.randint(1, ranks.num_ranks)))
            elif action < 0.75:
                ranks.num_running = rng.choice([0, 2, 8])
            lead = ranks.lanes.lead(ranks.busy, ranks.next_plan_id, ranks.num_running)
            expected = ranks.expected_lead()
            assert lead == expected
            num_waits += lead is None and bool(ranks.ready)
            assert len(ranks.lanes) == len(ranks.ready)
            assert {request.request_id for request in ranks.lanes} == set(ranks.ready)
            if lead is not None and rng.random() < 0.7:
                num_leads += 1
                ranks.plan(lead)
    assert num_leads > 1000
    assert num_waits > 100


def test_a_prompt_that_has_waited_too_long_goes_first_though_nothing_has_touched_its_lane():
    ranks = Ranks(random.Random(0), 2)
    ranks.num_running = 2
    for last_plan_id, ranks_of in ((3, {0}), (1, {0})):
        request = Request(last_plan_id, SamplingParams(), 0, [5] * 9, 9, ())
        request.delivery.wait_from(last_plan_id)
        ranks.lanes.put([(request, frozenset(ranks_of))])
    ranks.turns._last_prefill[0] = 5
    assert ranks.lanes.lead(set(), 6, 2).turn == 5
    patience = PATIENCE * 2 * (1 + 2)
    assert ranks.lanes.lead(set(), 1 + patience, 2).turn == 5
    assert ranks.lanes.lead(set(), 2 + patience, 2).turn == 1
    assert ranks.lanes.lead(set(), 2 + patience, 3).turn == 5, "with more requests it may wait longer"
    ranks.lanes.clear()
    assert ranks.lanes.lead(set(), 2 + patience, 2) is None


# -- load --------------------------------------------------------------------------------------------------------------


EQUAL = (1, 1, 1)
"""Shares of ranks."""


class Pages:
    """Of an allocation, the ranks."""

    def __init__(self, *ranks: int) -> None:
        self.ranks = frozenset(ranks)


def running(request_id: int, prompt_len: int, num_computed: int, *ranks: int) -> Request:
    request = Request(request_id, SamplingParams(), 0, [5] * prompt_len, prompt_len, ())
    request.num_computed, request.allocation = num_computed, Pages(*ranks)  # type: ignore[assignment]
    return request


def test_the_load_of_a_rank_is_what_its_running_requests_still_compute():
    load = RankLoad(3)
    packed, striped = running(0, 100, 0, 1), running(1, 90, 30, 0, 2)
    load.note(packed)
    load.note(striped)
    assert load.per_rank(EQUAL) == [DECODE_COST + 30.0, DECODE_COST + 100.0, DECODE_COST + 30.0]
    assert load.per_rank((3, 1, 1)) == [DECODE_COST + 45.0, DECODE_COST + 100.0, DECODE_COST + 15.0]
    packed.num_computed, striped.num_computed = 100, 60
    load.note(packed)
    load.note(striped)
    assert load.per_rank(EQUAL) == [DECODE_COST + 15.0, DECODE_COST, DECODE_COST + 15.0]
    packed.allocation = Pages(1, 2)  # type: ignore[assignment]
    load.note(packed)
    assert load.per_rank(EQUAL) == [DECODE_COST + 15.0, DECODE_COST, 2 * DECODE_COST + 15.0]
    load.remove(packed)
    load.remove(packed)
    load.remove(striped)
    assert load.per_rank(EQUAL) == [0.0, 0.0, 0.0]
    load.note(packed)
    load.clear()
    assert load.per_rank(EQUAL) == [0.0, 0.0, 0.0]
