"""What must hold of the books at any time between two calls of the scheduler.

Holds checks that raise `AssertionError`; they read all pages, and change nothing. Must not know torch or processes.
Read next: `longspan.scheduler.memory`; the option `check_invariants` in `longspan.config`.
"""

from collections import Counter

from longspan.scheduler.request import Request
from longspan.scheduler.scheduler import Scheduler


def check_books(scheduler: Scheduler) -> None:
    """Assert that pages, requests and promises tell the same story, and that nothing is held when nobody is left."""
    scheduler.memory.check_integrity()
    _check_owners(scheduler)
    for request in scheduler.waiting:
        assert request.allocation is None, "a request that waits has pages"
        assert not request.in_flight, "a request that waits is being computed"
        assert not request.drafts, "drafts of a request that waits are being checked"
    for request in scheduler.running:
        _check_progress(request)
        _check_copies(request)


def _check_copies(request: Request) -> None:
    """What is copied for a request in its next step goes to pages that it holds."""
    allocation = request.allocation
    assert allocation is not None, "a request that runs has no pages"
    for copy in allocation.copies:
        table, target = allocation.tables[copy.group_idx], copy.target
        places = [(target.rank, target.slot + i) for i in range(target.num_pages)]
        assert [table.page(target.page_idx + i) for i in range(target.num_pages)] == places, "a copy to another's page"


def _check_progress(request: Request) -> None:
    """A plan in flight goes as far as the known tokens and the drafts that it checks, or one token further behind
    another plan; without one, nothing is planned."""
    assert 0 <= request.num_computed < len(request.token_ids), "keys of tokens that are not known count"
    num_ahead = request.num_planned - len(request.token_ids)
    if request.drafts:
        assert num_ahead == len(request.drafts), "not the drafts that the plan in flight checks"
    else:
        assert num_ahead <= 1, "more is planned than is known or sampled"
    assert request.num_planned >= request.num_computed, "less is planned than is computed"


def _check_owners(scheduler: Scheduler) -> None:
    """Every page has as many references as owners, none without an owner is in use, and promises add up."""
    memory, running = scheduler.memory, scheduler.running
    holders = [*running, *scheduler.loading.left]
    allocations = [request.allocation for request in holders if request.allocation is not None]
    assert len(allocations) == len(holders), "a request that runs has no pages"
    owners = Counter(
        (run.rank, group_idx, run.slot + i)
        for allocation in allocations
        for group_idx, table in enumerate(allocation.tables)
        for run in (*table.runs, *(copy.source for copy in allocation.copies if copy.group_idx == group_idx))
        for i in range(run.num_pages)
    )
    for allocation in allocations:
        places = [*allocation.left_states, *(kept.place for kept in allocation.kept_states)]
        places += [place for place in (allocation.state, allocation.state_source) if place is not None]
        owners.update((place.rank, len(memory.model.kv_groups), place.slot) for place in places)
    promised = [[0] * len(allocators) for allocators in memory.allocators]
    for (rank, group_idx, slot), count in owners.items():
        allocator = memory.allocators[rank][group_idx]
        assert 0 <= slot < allocator.num_pages
        assert not allocator.is_idle(slot), "a page with an owner is idle"
        assert allocator.references(slot) == count, "owners and references differ"
        is_state = group_idx == len(memory.model.kv_groups)
        if not is_state and memory.model.kv_groups[group_idx].spec.reach is not None:
            promised[rank][group_idx] += count - 1
    for allocation in allocations:
        for group_idx, table in enumerate(allocation.tables):
            new = Counter(
                run.rank
                for run in table.runs
                for i in range(run.num_pages)
                if run.page_idx + i >= allocation.num_hit_pages
            )
            for rank, claim in allocation.claims.promised[group_idx].items():
                promised[rank][group_idx] += max(0, claim - new[rank])
        if memory.states is not None:
            held = Counter(place.rank for place in (*allocation.left_states, allocation.state) if place is not None)
            for rank, claim in allocation.claims.promised[memory.states.pool_idx].items():
                promised[rank][memory.states.pool_idx] += max(0, claim - held[rank])
    assert promised == memory.reservations.promised, "not what running requests may still need"
    used = Counter((rank, group_idx) for rank, group_idx, _ in owners)
    for rank, allocators in enumerate(memory.allocators):
        for group_idx, allocator in enumerate(allocators):
            assert allocator.num_used == used[rank, group_idx], "a page without an owner is not free"
