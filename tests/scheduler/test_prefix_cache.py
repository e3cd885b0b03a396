"""Proves that the prefix cache offers what it says, evicts what is missed least, and that hits are used well.

First the allocator of one rank against a naive model, then the choices of the scheduler's memory by small examples.
"""

import random
from collections import Counter

import pytest
from fake_ranks import FakeRanks, assert_all_free, check_finished, make_config, make_model, make_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longspan.kv.allocator import OutOfPagesError
from longspan.kv.prefix import CachingAllocator, PageHolders, extend_hashes
from longspan.plan.types import FailedRow, PlanResult, RankResult
from longspan.scheduler.invariants import check_books
from longspan.scheduler.memory import KVMemory
from longspan.scheduler.request import Request
from longspan.scheduler.scheduler import Scheduler
from longspan.types import FinishReason, SamplingParams

NUM_PAGES = 20
TEXT = tuple(random.Random(0).choices(range(50), k=400))


def hashes_of(tokens: list[int], page_size: int) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, page_size)
    return hashes


# -- hashes ----------------------------------------------------------------------------------------------------------


def test_a_hash_is_the_same_in_every_process_and_release():
    """Literal digests: whoever changes them invalidates every cache that outlives a process."""
    assert [page_hash.hex() for page_hash in hashes_of([1, 2, 3, 4, 5, 6, 7, 8, 9], 4)] == [
        "5c3887ef44b86da26265cb5c108a056b",
        "d6b1a373e57df1a716df839ea51526d9",
    ]


@given(st.lists(st.integers(0, 2**31), max_size=40), st.sampled_from([1, 2, 3, 16]), st.data())
def test_hashes_made_bit_by_bit_equal_hashes_made_at_once(tokens, page_size, data):
    hashes: list[bytes] = []
    for end in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4))):
        extend_hashes(hashes, tokens[:end], page_size)
        assert len(hashes) == end // page_size, "only full pages have a hash"
    extend_hashes(hashes, tokens, page_size)
    assert hashes == hashes_of(tokens, page_size)


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_equal_hashes_mean_equal_tokens_from_the_start(a, b):
    for i, (x, y) in enumerate(zip(hashes_of(a, 4), hashes_of(b, 4), strict=True)):
        assert (x == y) == (a[: 4 * i + 4] == b[: 4 * i + 4])


def test_the_same_page_behind_another_page_has_another_hash():
    assert hashes_of([1, 2, 7, 8], 2)[1] != hashes_of([3, 4, 7, 8], 2)[1]
    assert len(set(hashes_of([5] * 64, 2))) == 32
    assert hashes_of([1, 2], 2)[0] != hashes_of([2, 1], 2)[0]


# -- the allocator of one rank ---------------------------------------------------------------------------------------


class CacheMachine(RuleBasedStateMachine):
    """Against lists: references per slot, hash per slot, and idle slots in the order they became idle."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = CachingAllocator(NUM_PAGES)
        self.references = [0] * NUM_PAGES
        self.hashes: dict[int, bytes] = {}
        self.idle: list[int] = []
        self.held: list[tuple[int, int]] = []
        self.peak = self.num_evicted = self.num_hashes = 0

    def note_peak(self) -> None:
        self.peak = max(self.peak, sum(count > 0 for count in self.references))

    @rule(num_pages=st.integers(0, NUM_PAGES + 1), near=st.none() | st.integers(0, NUM_PAGES))
    def allocate(self, num_pages: int, near: int | None) -> None:
        free = [i for i in range(NUM_PAGES) if not self.references[i] and i not in self.idle]
        if num_pages > len(free) + len(self.idle):
            with pytest.raises(OutOfPagesError):
                self.allocator.allocate(num_pages, near)
            return
        runs = self.allocator.allocate(num_pages, near)
        slots = [slot + i for slot, count in runs for i in range(count)]
        assert len(slots) == len(set(slots)) == num_pages
        assert all(self.references[slot] == 0 for slot in slots), "a page in use was handed out"
        evicted = [slot for slot in self.idle if self.allocator.find(self.hashes[slot]) is None]
        assert evicted == self.idle[: len(evicted)], "longest idle first"
        missing = max(0, num_pages - len(free))
        assert missing <= len(evicted) <= (missing + NUM_PAGES // 16 if missing else 0), "no more than there is use for"
        for slot in evicted:
            del self.hashes[slot]
        self.idle = self.idle[len(evicted) :]
        self.num_evicted += len(evicted)
        assert not set(slots) & set(self.idle)
        for slot in slots:
            self.references[slot] = 1
        self.held += runs
        self.note_peak()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), is_known=st.booleans())
    def publish(self, data: st.DataObject, is_known: bool) -> None:
        slot, _ = data.draw(st.sampled_from(self.held))
        page_hash = str(self.num_hashes).encode()
        if is_known and self.hashes:
            page_hash = data.draw(st.sampled_from(sorted(self.hashes.values())))
        self.num_hashes += 1
        self.allocator.publish(page_hash, slot)
        if slot not in self.hashes and page_hash not in self.hashes.values():
            self.hashes[slot] = page_hash

    @precondition(lambda self: self.hashes)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.hashes)))
        assert self.allocator.find(self.hashes[slot]) == slot
        assert self.allocator.is_idle(slot) == (slot in self.idle)
        assert self.allocator.use(slot) == (self.references[slot] > 0)
        self.references[slot] += 1
        if slot in self.idle:
            self.idle.remove(slot)
        self.held.append((slot, 1))
        self.note_peak()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        slot, count = self.held.pop(index)
        first = data.draw(st.integers(0, count - 1))
        if first:
            self.held.append((slot, first))
        num_shared = self.allocator.release(slot + first, count - first)
        assert num_shared == sum(self.references[i] > 1 for i in range(slot + first, slot + count))
        for i in reversed(range(slot + first, slot + count)):
            self.references[i] -= 1
            if not self.references[i] and i in self.hashes:
                self.idle.append(i)

    @invariant()
    def tells_the_same_story(self) -> None:
        allocator = self.allocator
        allocator.check_integrity()
        assert allocator.num_used == sum(count > 0 for count in self.references)
        assert allocator.num_available == NUM_PAGES - allocator.num_used
        assert allocator.peak_used == self.peak
        assert allocator.num_evicted == self.num_evicted
        assert allocator._hash_of == self.hashes
        assert list(allocator._idle) == self.idle


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_pages_in_use_are_never_evicted_and_the_refusal_says_the_numbers():
    allocator = CachingAllocator(6)
    ((slot, _),) = allocator.allocate(4)
    for i in range(4):
        allocator.publish(bytes([i]), slot + i)
    allocator.release(slot + 3, 1)
    with pytest.raises(OutOfPagesError, match="4 pages asked, 3 of 6 available"):
        allocator.allocate(4)
    assert allocator.find(bytes([3])) == slot + 3, "a refusal evicts nothing"
    allocator.allocate(3)
    assert [allocator.find(bytes([i])) is None for i in range(4)] == [False, False, False, True]


def test_rejects_publishing_or_releasing_an_idle_page_and_using_an_unknown_one():
    allocator = CachingAllocator(2)
    ((slot, _),) = allocator.allocate(1)
    with pytest.raises(AssertionError, match="is not published"):
        allocator.use(slot)
    allocator.publish(b"a", slot)
    allocator.release(slot, 1)
    with pytest.raises(AssertionError, match="is not in use"):
        allocator.publish(b"b", slot)
    with pytest.raises(AssertionError, match="is not in use"):
        allocator.release(slot, 1)


def test_holders_of_a_page_are_the_ranks_that_have_published_it_and_not_lost_it():
    holders = PageHolders()
    pools = [CachingAllocator(2, holders, rank) for rank in range(3)]
    for pool in pools:
        ((slot, _),) = pool.allocate(1)
        pool.publish(b"a", slot)
    assert holders.of(b"a") == {0, 1, 2}
    pools[1].withdraw(b"a")
    assert holders.of(b"a") == {0, 2}
    pools[2].release(pools[2].find(b"a"), 1)
    pools[2].allocate(2)  # evicts it
    assert holders.of(b"a") == {0}
    pools[0].forget_all()
    assert holders.of(b"a") == holders.of(b"unknown") == frozenset()
    for pool in pools:
        pool.check_integrity()


def test_eviction_makes_room_for_a_run_of_slots_in_large_pools():
    allocator = CachingAllocator(640)
    for i in range(640):
        ((slot, _),) = allocator.allocate(1)
        allocator.publish(i.to_bytes(2, "big"), slot)
        allocator.release(slot, 1)
    assert allocator.num_evicted == 0
    allocator.allocate(1)
    assert allocator.num_evicted == 41


# -- one rank of a scheduler -----------------------------------------------------------------------------------------


def run_one(ranks: FakeRanks, prompt: tuple[int, ...] | list[int], max_tokens: int = 1, **params) -> Request:
    """Run a request to its end, with nothing beside it."""
    options = {"ignore_eos": True, "seed": 0, **params}
    request = ranks.scheduler.add_request(prompt, SamplingParams(max_tokens=max_tokens, **options))
    ranks.run_to_the_end()
    check_finished(request)
    ranks.check_cached()
    return request


def make_ranks(num_ranks: int = 1, windows=(None,), memory_tokens: int = 400, **options) -> FakeRanks:
    config = make_config(num_ranks, **{"max_num_batched_tokens": 64, "stripe_size": 64, **options})
    return FakeRanks(make_scheduler(make_model(*windows), config, memory_tokens), random.Random(0))


def cached_pages(ranks: FakeRanks, tokens, rank: int = 0, group_idx: int = 0) -> list[int]:
    """Indices of a prompt's pages that a rank can offer."""
    allocator = ranks.scheduler.memory.allocators[rank][group_idx]
    hashes = hashes_of(list(tokens), ranks.scheduler.config.page_size)
    return [i for i, page_hash in enumerate(hashes) if allocator.find(page_hash) is not None]


def computed(ranks: FakeRanks, request: Request) -> int:
    return sum(
        run.num_tokens for plan in ranks.plans for run in plan.query_runs if run.request_id == request.request_id
    )


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 39, 40, 41])
@pytest.mark.parametrize("windows", [(None,), (None, 6), (6,), (4, 9), (1,)])
def test_a_repeated_prompt_computes_what_whole_pages_leave_and_always_its_last_token(windows, length):
    ranks = make_ranks(windows=windows)
    first = run_one(ranks, TEXT[:length])
    assert first.num_cached == 0
    second = run_one(ranks, TEXT[:length])
    assert second.num_cached == (length - 1) // 4 * 4
    assert computed(ranks, second) == length - second.num_cached
    assert second.output_token_ids == first.output_token_ids


def test_a_prompt_that_differs_in_one_token_shares_the_pages_before_it_only():
    ranks = make_ranks()
    run_one(ranks, TEXT[:40])
    for place in (0, 3, 4, 17, 39):
        prompt = list(TEXT[:40])
        prompt[place] = 49 - prompt[place]
        assert run_one(ranks, prompt).num_cached == place // 4 * 4


def test_answers_are_cached_too_so_that_a_chat_goes_on_where_it_stood():
    ranks = make_ranks()
    first = run_one(ranks, TEXT[:10], max_tokens=31)  # 40 tokens have keys; the last one has none
    assert len(first.token_ids) == 41
    second = run_one(ranks, [*first.token_ids, 7, 7, 7])
    assert second.num_cached == 40


def test_a_window_needs_only_the_pages_that_it_reaches():
    """Window 6 at token 32 sees 27..31: pages 6 and 7; the pages before them are a hole."""
    ranks = make_ranks(windows=(6,))
    run_one(ranks, TEXT[:33])
    assert cached_pages(ranks, TEXT[:33]) == list(range(8))
    for i in range(6):
        forget(ranks, TEXT[:33], i)
    scheduler = ranks.scheduler
    request = scheduler.add_request(TEXT[:33], SamplingParams(max_tokens=1, seed=0))
    ranks.submit_all()
    assert request.num_cached == 32
    assert [(run.page_idx, run.num_pages) for run in request.allocation.tables[0].runs] == [(6, 3)]
    ranks.run_to_the_end()


def forget(ranks: FakeRanks, tokens, page_idx: int, rank: int = 0, group_idx: int = 0) -> None:
    """Evict one idle page out of turn."""
    allocator = ranks.scheduler.memory.allocators[rank][group_idx]
    slot = allocator.find(hashes_of(list(tokens), ranks.scheduler.config.page_size)[page_idx])
    assert slot is not None
    idle = list(allocator._idle)
    allocator._idle = {slot: None, **dict.fromkeys(idle)}
    allocator._evict(1)
    assert allocator.find(hashes_of(list(tokens), ranks.scheduler.config.page_size)[page_idx]) is None


@pytest.mark.parametrize(
    ("windows", "group_idx", "lost", "num_cached"),
    [
        ((None,), 0, 3, 12),  # full attention: nothing behind a gap counts
        ((None,), 0, 0, 0),
        ((6,), 0, 7, 28),  # the last page of the window is gone: the prefix that ends before it is whole
        ((6,), 0, 6, 24),
        ((6,), 0, 5, 32),  # before the window
        ((None, 6), 1, 7, 28),
        ((None, 6), 1, 5, 32),
        ((None, 6), 0, 5, 20),  # the group with full attention lost it
        ((100,), 0, 3, 12),  # a window longer than the prompt
    ],
)
def test_a_gap_shortens_a_hit_to_what_later_tokens_still_find(windows, group_idx, lost, num_cached):
    ranks = make_ranks(windows=windows)
    run_one(ranks, TEXT[:33])
    forget(ranks, TEXT[:33], lost, group_idx=group_idx)
    assert run_one(ranks, TEXT[:33]).num_cached == num_cached


@settings(deadline=None, max_examples=60)
@given(
    windows=st.sampled_from([(None,), (6,), (None, 6), (None, 3, 9), (13, 2)]),
    num_ranks=st.integers(1, 3),
    lost=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 9)), max_size=25),
)
def test_a_hit_is_the_longest_prefix_of_which_every_page_is_where_it_is_needed(windows, num_ranks, lost):
    """Against all prefixes tried one by one."""
    ranks = make_ranks(num_ranks, windows, placement="packed")
    for rank in range(num_ranks):
        cache_on(ranks, rank)
    there = {(rank, g, i) for rank in range(num_ranks) for g in range(len(windows)) for i in range(10)}
    for rank, group_idx, page_idx in lost:
        if (rank, group_idx, page_idx) in there:
            there.remove((rank, group_idx, page_idx))
            forget(ranks, SYSTEM, page_idx, rank, group_idx)
    expected: list[set[int]] = []
    for length in range(1, 11):
        needed = [  # a window ends before the next token; at least the last page counts
            [g for g, w in enumerate(windows) if w is None or i == length - 1 or 4 * i + 3 > 4 * length - w]
            for i in range(length)
        ]
        homes_of = [
            {rank for rank in range(num_ranks) if all((rank, g, i) in there for g in groups)}
            for i, groups in enumerate(needed)
        ]
        expected = homes_of if all(homes_of) else expected
    memory = ranks.scheduler.memory
    assert memory.lookup.find(hashes_of([*SYSTEM, 7], 4)) == expected


@pytest.mark.timeout(60)
def test_a_long_prefix_whose_windows_are_gone_is_given_up_without_trying_every_length():
    """Another long prompt evicts the windows of all before it. Trying 20,000 lengths took a quarter of an hour."""
    ranks = make_ranks(1, (None, 8), memory_tokens=90_000)
    full, window = ranks.scheduler.memory.allocators[0]
    page_hashes = hashes_of([i * i % 50 for i in range(80_001)], 4)
    ((slot, _),) = full.allocate(20_000)
    for i, page_hash in enumerate(page_hashes):
        full.publish(page_hash, slot + i)
    assert ranks.scheduler.memory.lookup.find(page_hashes) == []
    ((slot, _),) = window.allocate(2)
    for i in (7, 8):
        window.publish(page_hashes[i], slot + i - 7)
    assert ranks.scheduler.memory.lookup.find(page_hashes) == [{0}] * 9


def test_leaves_are_evicted_before_roots_and_longest_idle_first():
    ranks = make_ranks(memory_tokens=100)  # 25 pages
    first, second = TEXT[:40], TEXT[200:240]
    run_one(ranks, first)
    run_one(ranks, second)
    assert cached_pages(ranks, first) == cached_pages(ranks, second) == list(range(10))
    run_one(ranks, TEXT[300:328])  # 7 pages, 5 are free: two must go, and one more for a run of slots
    assert cached_pages(ranks, first) == list(range(7))
    assert cached_pages(ranks, second) == list(range(10))
    run_one(ranks, first[:21])  # its root is used again, and is missed most from now on
    run_one(ranks, TEXT[340:380])
    assert cached_pages(ranks, first) == list(range(5))


def test_no_prefix_is_found_for_prompt_logprobs_but_its_pages_serve_others():
    ranks = make_ranks()
    run_one(ranks, TEXT[:40])
    asked = run_one(ranks, TEXT[:40], prompt_logprobs=0)
    assert (asked.num_cached, computed(ranks, asked)) == (0, 40)
    assert len(asked.prompt_logprobs) == 39
    ranks = make_ranks()
    run_one(ranks, TEXT[:40], prompt_logprobs=0)
    assert run_one(ranks, TEXT[:40]).num_cached == 36


def test_without_caching_everything_is_computed_again_and_nothing_is_hashed():
    ranks = make_ranks(enable_prefix_caching=False)
    for _ in range(2):
        request = run_one(ranks, TEXT[:40])
        assert (request.num_cached, computed(ranks, request)) == (0, 40)
        assert request.page_hashes == []
    assert cached_pages(ranks, TEXT[:40]) == []
    assert ranks.scheduler.memory.num_hit_tokens == 0


def test_pages_are_found_only_when_the_plan_that_wrote_them_has_ended():
    ranks = make_ranks(num_ranks=1, max_num_seqs=8)
    scheduler = ranks.scheduler
    scheduler.add_request(TEXT[:64], SamplingParams(max_tokens=1, seed=0))
    ranks.submit_all()
    assert cached_pages(ranks, TEXT[:64]) == []
    scheduler.add_request(TEXT[:64], SamplingParams(max_tokens=1, seed=0))
    (plan,) = ranks.in_flight.values()
    ranks.complete(plan)
    assert cached_pages(ranks, TEXT[:64]) == list(range(16))
    ranks.run_to_the_end()
    assert scheduler.memory.num_hit_tokens == 60


def test_a_step_of_a_cancelled_request_still_serves_others():
    ranks = make_ranks()
    request = ranks.scheduler.add_request(TEXT[:64], SamplingParams(max_tokens=9, seed=0))
    ranks.submit_all()
    ranks.scheduler.cancel(request)
    (plan,) = ranks.in_flight.values()
    assert ranks.complete(plan) == []
    assert cached_pages(ranks, TEXT[:64]) == list(range(16))
    assert_all_free(ranks.scheduler)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_pages_of_a_request_that_failed_serve_nobody(num_ranks):
    """Neither those of the step that failed, nor of the chunks before, nor what it was given of others."""
    ranks = make_ranks(num_ranks, max_num_batched_tokens=16)
    scheduler = ranks.scheduler
    run_one(ranks, TEXT[:16])
    run_one(ranks, TEXT[100:140])
    request = scheduler.add_request(TEXT[:64], SamplingParams(max_tokens=9, seed=0))
    while request.num_computed < 60:
        ranks.submit_all()
        (plan,) = ranks.in_flight.values()
        if not plan.samples:
            ranks.complete(plan)
            continue
        del ranks.in_flight[plan.plan_id]
        row = FailedRow(request.request_id, len(request.token_ids), "not a number")
        results = [
            RankResult(plan.plan_id, rank, (), (), 0, 0, failed=(row,) * (rank == plan.ranks[0])) for rank in plan.ranks
        ]
        assert scheduler.update(PlanResult(plan.plan_id, tuple(results))) == [request]
    assert (request.finish_reason, request.error) == (FinishReason.ERROR, "not a number")
    assert request.num_cached == 16
    assert all(cached_pages(ranks, TEXT[:64], rank) == [] for rank in range(num_ranks))
    assert any(cached_pages(ranks, TEXT[100:140], rank) == list(range(10)) for rank in range(num_ranks)), "of others"
    scheduler.memory.check_integrity()
    assert_all_free(scheduler)
    assert run_one(ranks, TEXT[:64]).num_cached == 0


def test_queried_and_hit_tokens_are_counted():
    ranks = make_ranks()
    for _ in range(3):
        run_one(ranks, TEXT[:40])
    run_one(ranks, TEXT[:40], prompt_logprobs=0)  # must not hit
    memory = ranks.scheduler.memory
    assert (memory.num_queried_tokens, memory.num_hit_tokens) == (120, 72)


# -- what to do with a hit on several ranks --------------------------------------------------------------------------

SYSTEM = TEXT[:40]
"""A common prompt of ten pages."""


def admit(ranks: FakeRanks, prompt, load: list[float]) -> Request:
    """A request that the memory has let in; it never runs."""
    request = Request(10**6, SamplingParams(max_tokens=1), 0, list(prompt), len(prompt), ())
    assert ranks.scheduler.memory.admit(request, load)
    ranks.scheduler.memory.check_integrity()
    return request


def homes(request: Request) -> set[int]:
    return request.allocation.ranks


def copied_pages(request: Request) -> list[tuple[int, int]]:
    """(from, to) per copied page."""
    copies = request.allocation.copies
    return [(copy.source.rank, copy.target.rank) for copy in copies for _ in range(copy.source.num_pages)]


def cache_on(ranks: FakeRanks, rank: int, tokens=SYSTEM) -> None:
    """Let one rank compute a prompt, whatever the others have cached."""
    scheduler, memory = ranks.scheduler, ranks.scheduler.memory
    others_are_busy = [1e6 * (i != rank) for i in range(len(memory.allocators))]
    memory.admit = lambda request, load: KVMemory.admit(memory, request, others_are_busy)
    request = scheduler.add_request(tokens, SamplingParams(max_tokens=1, seed=0, prompt_logprobs=0))
    ranks.run_to_the_end()
    del memory.admit
    assert homes(request) == {rank}
    assert cached_pages(ranks, tokens, rank) == list(range(len(tokens) // 4))


@pytest.mark.parametrize("windows", [(None,), (None, 6), (6,)])
@pytest.mark.parametrize("owner", [0, 1, 2])
def test_an_idle_owner_of_the_prefix_gets_the_request(owner, windows):
    """Elsewhere ten pages to copy would cost as much as one to compute."""
    ranks = make_ranks(3, windows)
    cache_on(ranks, owner)
    request = admit(ranks, SYSTEM + (7,) * 5, [0.0, 0.0, 0.0])
    assert homes(request) == {owner}
    assert request.allocation.copies == []
    assert request.num_computed == 40


def test_a_busy_owner_gets_the_request_while_copying_would_take_longer():
    """Ten pages of four tokens to copy cost as much as four tokens to compute."""
    for load, home in [(3.9, 0), (4.1, 1)]:
        ranks = make_ranks(2)
        cache_on(ranks, 0)
        request = admit(ranks, SYSTEM + (7,) * 5, [load, 0.0])
        assert homes(request) == {home}
        assert request.num_computed == 40
        assert copied_pages(request) == [(0, 1)] * (10 * home)


@pytest.mark.parametrize(("windows", "pages"), [((None,), [10]), ((None, 6), [10, 2]), ((6,), [2])])
def test_only_pages_that_later_tokens_see_are_copied(windows, pages):
    ranks = make_ranks(2, windows)
    cache_on(ranks, 0)
    request = admit(ranks, SYSTEM + (7,) * 5, [1000.0, 0.0])
    assert homes(request) == {1}
    copies = request.allocation.copies
    assert [sum(c.source.num_pages for c in copies if c.group_idx == i) for i in range(len(windows))] == pages


def test_pages_that_the_new_home_has_already_are_not_copied():
    ranks = make_ranks(2)
    cache_on(ranks, 0)
    cache_on(ranks, 1, SYSTEM[:24])
    request = admit(ranks, SYSTEM + (7,) * 5, [1000.0, 0.0])
    assert homes(request) == {1}
    assert copied_pages(request) == [(0, 1)] * 4
    assert [copy.source.page_idx for copy in request.allocation.copies] == [6]


def test_a_prefix_that_cannot_be_copied_is_computed_again():
    """Using idle pages of rank 0 takes room there, and somebody else has been promised all of it."""
    ranks = make_ranks(2, memory_tokens=80, placement="packed")
    cache_on(ranks, 0)
    memory = ranks.scheduler.memory
    admit(ranks, TEXT[200:280], [0.0, 1e6])
    assert [room for (room,) in memory.room] == [0, 20]
    request = admit(ranks, SYSTEM + (7,) * 5, [0.0, 1000.0])
    assert homes(request) == {1}
    assert (request.num_computed, request.allocation.copies) == (0, [])


def test_part_of_a_prefix_is_used_where_all_of_it_does_not_fit():
    """Rank 1 has the first half, and rank 0 cannot give the rest."""
    ranks = make_ranks(2, memory_tokens=80, placement="packed")
    cache_on(ranks, 1, SYSTEM[:20])
    cache_on(ranks, 0)
    admit(ranks, TEXT[200:280], [0.0, 1e6])
    request = admit(ranks, SYSTEM + (7,) * 5, [0.0, 0.0])
    assert (homes(request), request.num_computed, request.allocation.copies) == ({1}, 20, [])


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_long_request_uses_cached_pages_where_they_are_and_stripes_the_rest(num_ranks):
    ranks = make_ranks(num_ranks, stripe_size=16)
    cache_on(ranks, 1)
    prompt = SYSTEM + TEXT[100:260]
    request = ranks.scheduler.add_request(prompt, SamplingParams(max_tokens=3, ignore_eos=True, seed=0))
    ranks.run_to_the_end()
    check_finished(request)
    assert request.num_cached == 40
    assert [rank for rank, _, _ in request.allocation.ranks_of(0, 40)] == [1]
    new = Counter(rank for rank, first, end in request.allocation.ranks_of(40, 200) for _ in range(first, end))
    assert set(new) == set(range(num_ranks))
    assert max(new.values()) - min(new.values()) <= 4
    assert all(not plan.page_copies for plan in ranks.plans)


def test_a_long_request_stays_on_a_rank_as_long_as_the_rank_has_its_pages():
    """Longer runs, fewer exchanges: not back and forth where both ranks have a page."""
    ranks = make_ranks(2, stripe_size=16)
    cache_on(ranks, 1)
    cache_on(ranks, 0, SYSTEM[:20])
    request = admit(ranks, SYSTEM + TEXT[100:260], [0.0, 0.0])
    assert request.allocation.page_ranks[:2] == [(0, 5), (1, 5)]


def test_a_popular_system_prompt_ends_up_on_every_rank_and_short_chats_stay_packed():
    ranks = make_ranks(4, memory_tokens=800)
    run_one(ranks, (*SYSTEM, 3))
    params = SamplingParams(max_tokens=9, ignore_eos=True, seed=0)
    for num_chats in (4, 12):
        before = len(ranks.plans)
        chats = [ranks.scheduler.add_request(SYSTEM + (num_chats + i,) * 6, params) for i in range(num_chats)]
        ranks.run_to_the_end()
        assert all(len(homes(chat)) == 1 and chat.num_cached == 40 for chat in chats)
        assert Counter(rank for chat in chats for rank in homes(chat)) == dict.fromkeys(range(4), num_chats // 4)
        assert all(cached_pages(ranks, SYSTEM, rank) == list(range(10)) for rank in range(4))
        assert sum(computed(ranks, chat) for chat in chats) == num_chats * (6 + 8), "the common prompt was there"
        copies = [copy for plan in ranks.plans[before:] for copy in plan.page_copies]
        expected = [1, 2, 3] if num_chats == 4 else []
        assert sorted(copy.target.rank for copy in copies) == expected, "one run of pages for each rank, once"
    assert all(len(plan.ranks) == 1 + bool(plan.page_copies) for plan in ranks.plans)


def test_a_copy_waits_for_the_rank_that_it_comes_from_and_stops_nobody_else():
    """The source is in the middle of a long chunk; once it is done, the copy has its turn before the next chunk."""
    ranks = make_ranks(2, placement="packed", memory_tokens=800)
    cache_on(ranks, 0)
    scheduler = ranks.scheduler
    options = {"ignore_eos": True, "seed": 0}
    scheduler.add_request(TEXT[100:400], SamplingParams(max_tokens=2, **options))
    ranks.submit_all()
    (busy,) = [plan for plan in ranks.in_flight.values() if plan.ranks == (0,)]
    other = scheduler.add_request((9, 9), SamplingParams(max_tokens=20, **options))
    chat = scheduler.add_request((*SYSTEM, 7), SamplingParams(max_tokens=2, **options))
    ranks.submit_all()
    assert copied_pages(chat) == [(0, 1)] * 10
    first = len(ranks.plans)
    ranks.complete(busy)
    while chat.phase is not None and chat.num_generated == 0:
        ranks.step()
    (plan,) = [plan for plan in ranks.plans if plan.page_copies]
    assert plan.ranks == (0, 1)
    assert plan.plan_id <= first + 2
    assert other.finish_reason is None
    ranks.run_to_the_end()


def test_a_cancelled_copy_gives_source_and_target_back():
    ranks = make_ranks(2, placement="packed")
    cache_on(ranks, 0)
    cancelled = [admit(ranks, SYSTEM + (7,) * 5, [1000.0, 0.0]) for _ in range(2)]
    ranks.scheduler.running += cancelled
    check_books(ranks.scheduler)
    for request in cancelled:
        ranks.scheduler.running.remove(request)
        ranks.scheduler.memory.free(request)
        check_books(ranks.scheduler)
    assert cached_pages(ranks, SYSTEM, 1) == [], "what was never copied is never offered"
    assert cached_pages(ranks, SYSTEM, 0) == list(range(10))


def test_a_request_that_is_cancelled_while_it_waits_for_its_copies_gives_them_back():
    """The rank that has the pages is busy."""
    ranks = make_ranks(2, placement="packed", memory_tokens=800)
    cache_on(ranks, 0)
    ranks.scheduler.add_request(TEXT[100:400], SamplingParams(max_tokens=1, seed=0))
    ranks.submit_all()
    chat = ranks.scheduler.add_request((*SYSTEM, 7), SamplingParams(max_tokens=2, seed=0))
    ranks.submit_all()
    assert copied_pages(chat) == [(0, 1)] * 10
    assert not chat.in_flight
    ranks.scheduler.cancel(chat)
    check_books(ranks.scheduler)
    assert cached_pages(ranks, SYSTEM, 1) == []
    ranks.run_to_the_end()
    assert_all_free(ranks.scheduler)


@pytest.mark.parametrize("placement", ["packed", "striped", "spill"])
def test_what_one_placement_wrote_another_finds(placement):
    """A short prompt is packed, a long one that begins with it striped, and a short one that begins the long one."""
    ranks = make_ranks(3, stripe_size=8, placement="auto" if placement == "packed" else placement)
    run_one(ranks, TEXT[:40])
    long = run_one(ranks, TEXT[:200])
    assert long.num_cached == 40
    assert len(homes(long)) > 1 or placement == "spill"
    again = run_one(ranks, TEXT[:44])
    assert again.num_cached == 40
    assert run_one(ranks, TEXT[:201]).num_cached == 200


def test_a_request_that_must_wait_leaves_the_order_of_eviction_alone():
    """It is asked again before every step; its pages are not used by that, and roots still go last."""
    ranks = make_ranks(2, placement="striped", memory_tokens=180)
    run_one(ranks, SYSTEM)
    params = SamplingParams(max_tokens=30, ignore_eos=True, seed=0)
    ranks.scheduler.add_request(TEXT[100:400], params)
    ranks.submit_all()
    idle = [list(rank[0]._idle) for rank in ranks.scheduler.memory.allocators]
    assert sum(map(len, idle)) == 10
    waiting = ranks.scheduler.add_request(SYSTEM + TEXT[200:260], params)
    for _ in range(3):
        ranks.step()
    assert list(ranks.scheduler.waiting) == [waiting]
    assert [list(rank[0]._idle) for rank in ranks.scheduler.memory.allocators] == idle
    ranks.run_to_the_end()


@pytest.mark.cover
@pytest.mark.parametrize("placement", ["auto", "striped"])
def test_a_request_that_must_wait_costs_no_look_at_its_pages_with_every_step(placement, monkeypatch):
    ranks = make_ranks(2, placement=placement, memory_tokens=800)
    run_one(ranks, TEXT)
    params = SamplingParams(max_tokens=60, ignore_eos=True, seed=0)
    blocker = ranks.scheduler.add_request([9] * 1100, params)
    waiting = ranks.scheduler.add_request(TEXT * 2, SamplingParams(max_tokens=1, seed=0))
    while not blocker.num_generated:
        ranks.step()
    lookups = 0
    find = CachingAllocator.find

    def count_and_find(self: CachingAllocator, page_hash: bytes) -> int | None:
        nonlocal lookups
        lookups += 1
        return find(self, page_hash)

    monkeypatch.setattr(CachingAllocator, "find", count_and_find)
    for _ in range(40):
        ranks.step()
    assert list(ranks.scheduler.waiting) == [waiting]
    assert lookups == 0
    ranks.run_to_the_end()
    assert waiting.num_cached > 0


def test_a_request_that_must_wait_is_let_in_once_somebody_caches_what_it_lacked():
    """Its own pages would not fit, but most of what it needs is now in use anyway."""
    ranks = make_ranks(1, memory_tokens=120, max_num_batched_tokens=16)  # 30 pages
    params = SamplingParams(max_tokens=30, ignore_eos=True, seed=0)
    first = ranks.scheduler.add_request(TEXT[:80], params)
    second = ranks.scheduler.add_request((*TEXT[:80], 7), params)
    ranks.step()
    assert list(ranks.scheduler.waiting) == [second]
    while first.num_generated < 2:
        ranks.step()
    assert second in ranks.scheduler.running
    assert second.num_cached >= 44
    ranks.run_to_the_end()


def test_a_request_that_must_wait_is_let_in_when_a_window_leaves_the_pages_of_a_hit():
    """Nobody ends and nothing new is cached: a request slides past cached pages, whose place nobody was promised."""
    config = make_config(1, page_size=4, max_num_batched_tokens=8)
    ranks = FakeRanks(Scheduler(make_model(40), config, [(28,)]), random.Random(0))
    run_one(ranks, TEXT[:60])
    params = SamplingParams(max_tokens=1, seed=0)
    first = ranks.scheduler.add_request(TEXT[:60] + TEXT[100:300], params)  # 10 pages of a hit, 14 new ones at once
    second = ranks.scheduler.add_request(TEXT[340:364], params)
    ranks.step()
    assert list(ranks.scheduler.waiting) == [second]
    while second.finish_reason is None:
        ranks.step()
    assert first.finish_reason is None
    ranks.run_to_the_end()


def test_a_hit_that_does_not_fit_beside_what_is_new_is_given_up_when_nobody_will_make_room():
    """Window only: the pages of a hit and those of one step together are more than the pool has."""
    config = make_config(1, max_num_batched_tokens=16)
    ranks = FakeRanks(Scheduler(make_model(8), config, [(8,)]), random.Random(0))
    run_one(ranks, TEXT[:41])
    request = run_one(ranks, TEXT[:200])
    assert request.num_computed == 200
    assert_all_free(ranks.scheduler)
