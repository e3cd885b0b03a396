"""Requests that wait for pages of a tier: whom they hold up, what they hold, and how they end."""

import random

import pytest
from fake_ranks import FakeRanks, assert_all_free, check_finished, make_config, make_model, make_scheduler, tokens_alone

from longspan.kv.page_directory import PageKey
from longspan.plan.moves import Moved
from longspan.plan.types import FailedRow
from longspan.scheduler import tiers
from longspan.scheduler.host_pages import HostPages
from longspan.scheduler.invariants import check_books
from longspan.scheduler.request import Request
from longspan.types import FinishReason, SamplingParams

TEXT = [random.Random(i).randrange(50) for i in range(200)]
PARAMS = SamplingParams(max_tokens=5, seed=0, ignore_eos=True)


@pytest.fixture(autouse=True)
def loading_is_sooner(monkeypatch):
    monkeypatch.setattr(tiers, "FIRST_BYTES_PER_S", {"host": 1e30, "disk": 1e30})


def make_ranks(*windows: int | None, num_ranks: int = 2, memory_tokens: int = 400, **options: object) -> FakeRanks:
    config = make_config(num_ranks, **{"kv_disk": "fake", **options})
    return FakeRanks(make_scheduler(make_model(*windows), config, memory_tokens), random.Random(0))


def serve(ranks: FakeRanks, prompt: list[int], params: SamplingParams = PARAMS) -> Request:
    request = ranks.scheduler.add_request(prompt, params)
    ranks.run_to_the_end()
    check_finished(request)
    assert request.output_token_ids == tokens_alone(request)
    return request


def computed(ranks: FakeRanks, request: Request) -> int:
    """Tokens of a request that plans computed."""
    return sum(
        run.num_tokens for plan in ranks.plans for run in plan.query_runs if run.request_id == request.request_id
    )


def waiting_for_pages(*windows: int | None, num_ranks: int = 2, **options: object) -> tuple[FakeRanks, Request]:
    """Ranks that have lost everything, and a request that waits for what the disk has."""
    ranks = make_ranks(*(windows or (None,)), num_ranks=num_ranks, **options)
    serve(ranks, TEXT[:100])
    ranks.crash()
    request = ranks.scheduler.add_request(TEXT[:100], PARAMS)
    ranks.submit_all()
    assert request in ranks.scheduler.loading
    return ranks, request


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("windows", [(None,), (None, 5), (None, 20, 3), (7,)])
@pytest.mark.parametrize("placement", ["striped", "packed", "spill"])
def test_lost_pages_come_back_from_the_disk(windows, num_ranks, placement):
    ranks = make_ranks(*windows, num_ranks=num_ranks, placement=placement)
    first = serve(ranks, TEXT[:100])
    assert computed(ranks, first) == 104
    ranks.crash()
    again = serve(ranks, TEXT[:100])
    assert again.num_cached == 96
    assert computed(ranks, again) == 8
    longer = serve(ranks, TEXT[:150])
    assert longer.num_cached >= 100 // 4 * 4 - 4
    assert_all_free(ranks.scheduler)


def test_others_run_while_a_request_waits():
    ranks, request = waiting_for_pages()
    other = ranks.scheduler.add_request([7] * 20, PARAMS)
    while other.finish_reason is None:
        ranks.submit_all()
        ranks.complete(ranks.first_plans()[0])
    assert request.in_flight
    assert computed(ranks, request) == 0
    ranks.run_to_the_end()
    assert request.output_token_ids == tokens_alone(request)


@pytest.mark.parametrize("how", ["cancel", "finish"])
def test_pages_that_arrive_stay_taken_until_they_have(how):
    ranks, request = waiting_for_pages()
    scheduler = ranks.scheduler
    if how == "cancel":
        scheduler.cancel(request)
    else:
        scheduler.finish(request, FinishReason.STOP)
        assert request.finish_reason is FinishReason.STOP
    others = [scheduler.add_request([i] * 30, PARAMS) for i in range(6)]
    while any(other.finish_reason is None for other in others):
        ranks.submit_all()
        ranks.complete(ranks.first_plans()[0])  # checks that nobody writes where pages arrive
    assert ranks.tiers.arriving
    while ranks.tiers.moves:
        assert ranks.end_move() == []
    assert request.finish_reason is (FinishReason.ABORT if how == "cancel" else FinishReason.STOP)
    ranks.run_to_the_end()
    assert_all_free(scheduler)


@pytest.mark.parametrize("windows", [(None, 5), (None, 20, 3), (7,)])
def test_pages_to_copy_that_loaded_ones_leave_behind_their_windows_are_not_copied(windows):
    """Else the copies would go to pages that are others' by then."""
    ranks = make_ranks(*windows, placement="packed")
    scheduler = ranks.scheduler
    serve(ranks, TEXT[:100])
    ranks.crash()
    serve(ranks, TEXT[:40])
    (home,) = {rank for plan in ranks.plans[-1:] for rank in plan.ranks}
    busy = [scheduler.add_request([7] * 90, PARAMS) for _ in range(2)]  # one of them beside the copied pages
    ranks.submit_all()
    other = next(request for request in busy if request.allocation.ranks == {home})
    scheduler.cancel(next(request for request in busy if request is not other))
    ranks.complete(next(plan for plan in ranks.first_plans() if plan.ranks != (home,)))
    request = scheduler.add_request(TEXT[:100], PARAMS)
    assert request.allocation is None
    ranks.submit_all()
    assert request in scheduler.loading
    assert request.allocation.copies
    while request in scheduler.loading:
        ranks.end_move()
        check_books(scheduler)
    others = [scheduler.add_request([i] * 40, PARAMS) for i in range(4)]
    ranks.run_to_the_end()
    for each in (request, other, *others):
        assert each.output_token_ids == tokens_alone(each)
    assert_all_free(scheduler)


@pytest.mark.parametrize("windows", [(None,), (None, 20)])
@pytest.mark.parametrize("lost", [0, 7, 23])
def test_a_page_that_does_not_come_is_computed_and_those_before_it_are_not(windows, lost):
    ranks, request = waiting_for_pages(*windows)
    ranks.tiers.files.pop(PageKey(0, request.page_hashes[lost]))
    ranks.run_to_the_end()
    assert request.output_token_ids == tokens_alone(request)
    assert request.num_cached <= 4 * lost
    if windows == (None,):
        assert request.num_cached == 4 * lost
        assert computed(ranks, request) == 104 - 4 * lost
    assert ranks.scheduler.memory.tiers.counts["disk"].failed_pages == 1
    assert PageKey(0, request.page_hashes[lost]) in ranks.tiers.files, "it was stored again"
    assert_all_free(ranks.scheduler)


def test_what_is_sooner_computed_is_not_loaded(monkeypatch):
    monkeypatch.setattr(tiers, "FIRST_BYTES_PER_S", {"host": 1e-9, "disk": 1e-9})
    ranks = make_ranks(None)
    serve(ranks, TEXT[:100])
    ranks.crash()
    assert serve(ranks, TEXT[:100]).num_cached == 0
    assert ranks.tiers.counts["loaded"] == 0


def test_the_rate_of_loading_is_learnt():
    ranks = make_ranks(None)
    memory = ranks.scheduler.memory
    serve(ranks, TEXT[:100])
    ranks.crash()
    request = ranks.scheduler.add_request(TEXT[:100], PARAMS)
    ranks.submit_all()
    for move_id, (move, _) in list(ranks.tiers.moves.items()):
        if move.loads:
            ranks.tiers.moves.pop(move_id)
            ranks.tiers.arriving.clear()
            failed = tuple(range(len(move.loads)))
            ranks.scheduler.take_moved(Moved(move_id, move.rank, failed, num_bytes=100, move_s=1e30))
    serve(ranks, TEXT[100:])
    assert request.num_cached == 0
    assert memory.tiers.load_s([memory.tiers.place(0, 0, 0, b"")]) < 1.0, "one slow load is not the whole story"


def test_ranks_that_are_lost_while_pages_arrive_leave_nothing_behind():
    ranks, request = waiting_for_pages()
    ranks.crash()
    assert not ranks.scheduler.loading
    ranks.run_to_the_end()
    assert request.num_cached in (0, 96)
    assert request.output_token_ids == tokens_alone(request)
    assert_all_free(ranks.scheduler)


def test_host_memory_that_does_not_answer_is_asked_once():
    ranks = make_ranks(None, num_ranks=1, memory_tokens=120, kv_disk=None, kv_host_memory=100_000)
    scheduler = ranks.scheduler
    serve(ranks, TEXT[:100])
    serve(ranks, [7] * 100)  # the pool forgets the first one
    request = scheduler.add_request(TEXT[:100], PARAMS)
    ranks.submit_all()
    assert request in scheduler.loading
    (move_id, (move, _)) = next((i, m) for i, m in ranks.tiers.moves.items() if m[0].loads)
    del ranks.tiers.moves[move_id]
    ranks.tiers.arriving.clear()
    scheduler.take_moved(Moved(move_id, 0, tuple(range(len(move.loads)))))
    ranks.run_to_the_end()
    assert request.output_token_ids == tokens_alone(request)
    assert request.num_cached < len(move.loads) * 4
    assert computed(ranks, request) == 104 - request.num_cached
    assert_all_free(scheduler)


def test_pages_that_come_to_be_in_doubt_while_they_are_loaded_are_not_used():
    ranks, request = waiting_for_pages(num_ranks=1)
    tiers_, loads = ranks.scheduler.memory.tiers, ranks.tiers.moves
    tiers_.note_withdrawn(request.page_hashes[3:5])
    tiers_.note_found(ranks.tiers.files)  # a look at the disk that comes before they are removed there
    while any(move.loads for move, _ in loads.values()):
        ranks.end_move()
    allocator = ranks.scheduler.memory.allocators[0][0]
    assert [allocator.find(page_hash) is None for page_hash in request.page_hashes[2:6]] == [False, True, True, False]
    ranks.run_to_the_end()
    assert request.num_cached == 12
    assert request.output_token_ids == tokens_alone(request)
    assert_all_free(ranks.scheduler)


def test_pages_in_doubt_leave_the_disk():
    ranks = make_ranks(None, num_ranks=1)
    request = ranks.scheduler.add_request(TEXT[:40], PARAMS)
    while request.num_computed < 32:
        ranks.step()
    ranks.submit_all()
    (plan,) = ranks.in_flight.values()
    del ranks.in_flight[plan.plan_id]
    (result,) = (answer := ranks.answer(plan)).ranks
    bad = type(result)(plan.plan_id, 0, (), (), 0, 0, failed=(FailedRow(request.request_id, 40, "NaN"),))
    ranks.scheduler.update(type(answer)(plan.plan_id, (bad,)))
    assert request.finish_reason is FinishReason.ERROR
    ranks.end_the_rest()
    doubted = ranks.scheduler.memory.tiers.take_doubted()
    assert {key.page_hash for key in doubted} >= {key.page_hash for key in ranks.tiers.files}
    assert ranks.scheduler.memory.tiers.num_pages("disk") == 0
    assert_all_free(ranks.scheduler)


def test_a_slow_disk_gets_no_more_than_a_little_at_once(monkeypatch):
    monkeypatch.setattr(tiers, "STORE_BYTES", 64)
    monkeypatch.setattr(tiers, "MOST_STORING_BYTES", 128)
    ranks = make_ranks(None, num_ranks=1, memory_tokens=160)
    for i in range(4):
        request = ranks.scheduler.add_request([i] * 100, PARAMS)
        while request.finish_reason is None:
            ranks.submit_all()
            assert sum(len(move.stores) for move, _ in ranks.tiers.moves.values()) <= 4
            ranks.complete(ranks.first_plans()[0])
    counts = ranks.scheduler.memory.tiers.counts["disk"]
    assert counts.stored_pages == 0
    assert counts.dropped_pages == 0, "as nobody has looked since"
    ranks.end_the_rest()
    assert counts.dropped_pages > 0
    assert counts.stored_pages > 0


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("placement", ["striped", "packed", "auto"])
def test_host_memory_gives_back_what_pools_have_forgotten(num_ranks, placement):
    ranks = make_ranks(
        None, num_ranks=num_ranks, memory_tokens=160, placement=placement, kv_disk=None, kv_host_memory=100_000
    )
    for i in range(3 * num_ranks):
        serve(ranks, [i, *TEXT[:100]])
    again = serve(ranks, [0, *TEXT[:100]])
    assert again.num_cached == 100
    assert ranks.tiers.counts["loaded from memory"] >= 20
    assert ranks.scheduler.memory.tiers.counts["host"].hit_tokens >= 80
    assert_all_free(ranks.scheduler)


def test_host_memory_drops_what_was_used_longest_ago():
    pages = HostPages(30, (10, 20))
    first, second, third, wide = (*(PageKey(0, name) for name in (b"a", b"b", b"c")), PageKey(1, b"w"))
    assert pages.put(first) == pages.put(second) == pages.put(third) == []
    pages.touch(first)
    assert pages.put(PageKey(0, b"d")) == [second]
    assert pages.put(wide) == [third, first]
    assert len(pages) == 2
    assert pages.num_bytes == 30
    assert pages.drop(wide)
    assert not pages.drop(wide)
