"""Admission and pages: which ranks a request gets, which cached pages it goes on from, and which slots.

Holds the allocators of all ranks and KV groups, and what running requests have been promised. Must not know steps,
torch or processes.
Read next: `longspan.scheduler.scheduler`.

Note: promises
    At admission the pages of all tokens that are known (the prompt; after a preemption also what was generated) are
    *placed* on ranks and *promised*; they are *allocated* when a step first writes them. So a prefill never runs out of
    pages. Pages for tokens yet to be generated are placed one at a time (`extend`), on any rank with room; when there
    is none, the scheduler preempts somebody.

        room of a rank  =  pages free or idle  -  pages promised to running requests and not yet allocated

    In a group with a window, a request that gives a page back because its window has left it may count on another one.
    If somebody else still uses the page, that is one page more than before; so every further user of such a page counts
    as a promise.

Note: what to do with a hit
    A short request belongs on one rank. For every rank, compare the tokens it would compute there with the work that
    already waits there; pages that only another rank has are copied, at `COPY_COST` of computing them. So short chats
    with a common system prompt stay packed, and the prompt ends up on every rank that serves them. A long request uses
    cached pages wherever they lie and stripes the rest: attention over several ranks is what it does anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from longspan.config import EngineConfig
from longspan.errors import CapacityError
from longspan.kv.prefix import CachingAllocator, extend_hashes
from longspan.plan.types import PageCopy
from longspan.scheduler.prefix_lookup import PrefixLookup
from longspan.scheduler.request import Request
from longspan.sharding.capacity import pool_bytes, window_pages
from longspan.sharding.geometry import StepGeometry
from longspan.sharding.pages import PageRun, PageTable
from longspan.sharding.placement import place, snake_rank
from longspan.types import ModelSpec, Placement

COPY_COST = 0.1
"""Cost of copying a token's KV from another rank, in tokens computed."""

DECODE_COST = 16
"""Cost of a decoding request to its rank's next prefill, in tokens computed: it takes part in every step."""


@dataclass(slots=True)
class _Hit:
    """Cached pages that a request goes on from."""

    ranks: list[int] = field(default_factory=list)
    """Rank per page, from the first page of the request on."""

    def use(self, memory: "KVMemory", request: Request) -> list[list[PageRun]]:
        """Add references; returns the pages per KV group, those that windows no longer reach left out."""
        found: list[list[PageRun]] = []
        for group_idx in range(len(memory.model.kv_groups)):
            runs: list[PageRun] = []
            first = last = memory.lookup.first_needed_page(group_idx, len(self.ranks))  # of the run that grows
            run_slot = 0
            for page_idx in range(first, len(self.ranks)):
                rank = self.ranks[page_idx]
                slot = memory.allocators[rank][group_idx].find(request.page_hashes[page_idx])
                assert slot is not None
                memory.use_page(rank, group_idx, slot)
                if page_idx > first and (rank != self.ranks[first] or slot != run_slot + page_idx - first):
                    runs.append(PageRun(first, self.ranks[first], run_slot, page_idx - first))
                    first = page_idx
                if page_idx == first:
                    run_slot = slot
                last = page_idx + 1
            if last > first:
                runs.append(PageRun(first, self.ranks[first], run_slot, last - first))
            found.append(runs)
        return found


class KVMemory:
    """Pages of all ranks."""

    def __init__(self, model: ModelSpec, config: EngineConfig, num_pages: Sequence[int]) -> None:
        """Args: `num_pages` per KV group, the same on every rank."""
        self.model, self.config = model, config
        self.num_ranks = config.context_parallel_size
        self.geometry = StepGeometry.of_rank_budget(
            self.num_ranks, config.page_size, config.stripe_size, config.max_num_batched_tokens
        )
        self.allocators = [[CachingAllocator(pages) for pages in num_pages] for _ in range(self.num_ranks)]
        """[rank][KV group]"""
        self.promised = [[0] * len(num_pages) for _ in range(self.num_ranks)]
        """[rank][KV group]: pages that running requests may still need; see Note: promises."""
        self._num_pages = tuple(num_pages)
        # The group that limits a request's length: one without a window, if there is one.
        full = [i for i, group in enumerate(model.kv_groups) if group.spec.window is None]
        self._limiting_group = full[0] if full else None
        self.lookup = PrefixLookup(model, config.page_size, self.allocators)
        self._has_window = [group.spec.window is not None for group in model.kv_groups]
        # Whom `admit` refused last, while no room was made and no more of it was cached. The head of the queue asks
        # before every step; to look for a long prompt's pages each time would take longer than the step.
        self._refused: Request | None = None
        self.striped_from = config.striped_from
        """Tokens of a prompt from which on `auto` stripes it."""
        self.num_queried_tokens = 0
        """Tokens of admitted requests that might have been cached."""
        self.num_hit_tokens = 0

    def stripe_from(self, num_tokens: int) -> None:
        """Let `auto` stripe prompts of this length and longer."""
        self.striped_from = num_tokens

    # -- placement ---------------------------------------------------------------------------------------------------

    def _need(self, group_idx: int, num_pages: int) -> int:
        """Pages that a request with `num_pages` new pages on a rank ever holds there at once."""
        window = self.model.kv_groups[group_idx].spec.window
        if window is None:
            return num_pages
        return min(num_pages, window_pages(window, self.config.page_size, self.config.max_num_batched_tokens))

    def _fits(self, counts: Sequence[int], room: Sequence[Sequence[int]]) -> bool:
        """Whether so many new pages per rank fit the room of every rank and group."""
        return all(
            self._need(group_idx, pages) <= free
            for rank, pages in enumerate(counts)
            if pages
            for group_idx, free in enumerate(room[rank])
        )

    def _place(
        self, prompt_pages: int, tail_pages: int, placement: Placement, room: Sequence[Sequence[int]]
    ) -> list[tuple[int, int]] | None:
        """Ranks of new pages under a placement, or None when they do not fit."""
        num_ranks = self.num_ranks
        total = prompt_pages + tail_pages
        if self._limiting_group is None:
            free = [rooms[0] for rooms in room]
            # Windows only: a rank with room for one window and one step holds any length, as pages get freed.
            by_rank = [total if self._need(0, total) <= pages else pages for pages in free]
        else:
            by_rank = free = [rooms[self._limiting_group] for rooms in room]
        home = max(range(num_ranks), key=lambda rank: (free[rank], -rank))
        runs = place(placement, self.geometry.stripes(prompt_pages, tail_pages), by_rank, home)
        return runs if runs is not None and self._fits(_count(runs, num_ranks), room) else None

    def _placement(self, num_tokens: int) -> Placement:
        """By the user's policy, or by ours: packed when short (and when one rank can hold it), else striped."""
        forced = self.config.forced_placement
        if forced is not None:
            return forced
        is_short = num_tokens < self.striped_from
        if self.num_ranks == 1 or is_short:
            counts = [_pages(num_tokens, self.config.page_size)] + [0] * (self.num_ranks - 1)
            if self._fits(counts, self._empty):
                return Placement.PACKED
        return Placement.STRIPED

    @property
    def _empty(self) -> list[tuple[int, ...]]:
        """The room of ranks that hold nothing."""
        return [self._num_pages] * self.num_ranks

    @property
    def _may_leave_home(self) -> bool:
        """Whether a request may have pages on several ranks."""
        return self.config.forced_placement is not Placement.PACKED

    def check_fits(self, prompt_len: int, max_tokens: int) -> None:
        """Refuse a request that would not fit even on empty ranks.

        Raises:
            CapacityError: with what was asked, what fits, and what would make it fit.
        """
        size, config = self.config.page_size, self.config
        end = prompt_len + max_tokens - 1
        placement = self._placement(prompt_len)
        if placement is Placement.PACKED and self._may_leave_home:
            placement = Placement.SPILL  # what is generated may go on to other ranks
        prompt_pages = _pages(prompt_len, size)
        if self._place(prompt_pages, _pages(end, size) - prompt_pages, placement, self._empty) is not None:
            return
        budget = config.max_num_batched_tokens
        is_packed = config.forced_placement is Placement.PACKED
        used_ranks = 1 if is_packed else self.num_ranks
        limit = self._num_pages[self._limiting_group or 0]
        pages = _pages(end, size)
        others = " and placement striped or spill" if is_packed else ""
        ways = [f"context_parallel_size of at least {_pages(pages, limit)}{others}"]
        if is_packed and pages <= limit * self.num_ranks:
            ways = ["placement striped or spill" + (", and another strategy than local") * (config.placement == "auto")]
        needed = pool_bytes(self.model, _pages(pages, used_ranks), size, budget)
        ways.append(f"kv_cache_memory of at least {needed} bytes per rank")
        memory = config.kv_cache_memory or pool_bytes(self.model, limit, size, budget)
        for smaller in (size >> shift for shift in range(1, size.bit_length())):
            if config.stripe_size % smaller:
                continue
            if pool_bytes(self.model, _pages(_pages(end, smaller), used_ranks), smaller, budget) <= memory:
                ways.append(f"page_size {smaller}")
                break
        room = f"{used_ranks} rank{'s' * (used_ranks > 1)} x {limit} page{'s' * (limit > 1)} x {size} tokens"
        raise CapacityError(
            f"prompt + max_tokens: got {prompt_len} + {max_tokens} = {prompt_len + max_tokens} tokens, "
            f"legal is at most {self.max_request_len} ({room}, and one that needs no page); "
            f"what would fit it: {'; or '.join(ways)}"
        )

    @property
    def max_request_len(self) -> int:
        """Most tokens of one request, prompt and output together; windows may admit more than this."""
        used_ranks = self.num_ranks if self._may_leave_home else 1
        return used_ranks * self._num_pages[self._limiting_group or 0] * self.config.page_size + 1

    # -- admission ---------------------------------------------------------------------------------------------------

    def admit(self, request: Request, load: Sequence[float]) -> bool:
        """Find what is cached, place the pages of all known tokens, and promise them.

        Args:
            request: one without pages.
            load: work that waits per rank, in tokens to compute.

        Returns:
            False when they do not fit now; nothing has changed then.
        """
        if request is self._refused:
            return False
        size = self.config.page_size
        num_tokens = len(request.token_ids)
        num_pages = _pages(num_tokens, size)
        copies_on: list[frozenset[int]] = []
        may_hit = self.config.enable_prefix_caching and request.params.prompt_logprobs is None
        if may_hit:
            extend_hashes(request.page_hashes, request.token_ids, size)
            copies_on = self.lookup.find(
                request.page_hashes[: (num_tokens - 1) // size]
            )  # the last token's logits are not cached
        placement = self._placement(num_tokens)
        if placement is Placement.PACKED:
            chosen = self._admit_packed(request, num_pages, copies_on, load)
        else:
            chosen = self._admit_spread(request, num_pages, copies_on, placement)
        if not chosen:
            self._refused = request
            return False
        self._refused = None
        self.num_queried_tokens += num_tokens if may_hit else 0
        self.num_hit_tokens += request.num_computed
        if request.num_preemptions == 0:
            request.num_cached = request.num_computed
        return True

    def _admit_packed(
        self,
        request: Request,
        num_pages: int,
        copies_on: list[frozenset[int]],
        load: Sequence[float],
    ) -> bool:
        """All pages on one rank: the one where the request is done first. See Note: what to do with a hit."""
        size = self.config.page_size
        options: list[tuple[float, int, int, _Hit]] = []
        for rank in range(self.num_ranks):
            here = next((i for i, ranks in enumerate(copies_on) if rank not in ranks), len(copies_on))
            for length in sorted({0, here, len(copies_on)}):
                hit = _Hit([rank if rank in ranks else min(ranks) for ranks in copies_on[:length]])
                room = self._room_after(request, hit, rank)
                counts = [0] * self.num_ranks
                counts[rank] = num_pages - length
                if room is None or not self._fits(counts, room):
                    continue
                copied = sum(source != rank for source in hit.ranks)
                cost = load[rank] + (num_pages - length + COPY_COST * copied) * size
                options.append((cost, rank, copied, hit))
        if not options:
            return False
        _, home, _, hit = min(options, key=lambda option: (*option[:3], len(option[3].ranks)))
        num_new = num_pages - len(hit.ranks)  # at least the last token's page
        self._start(request, hit, [(home, num_new)], home)
        return True

    def _room_after(self, request: Request, hit: _Hit, home: int | None) -> list[list[int]] | None:
        """Room of every rank and group once a hit is used, or None when there is not enough, or a page is missing.

        Args:
            home: where pages of the hit that lie elsewhere are copied to, or None to use them where they lie.
        """
        room = self._rooms()
        for group_idx in range(len(self._num_pages)):
            for page_idx in range(self.lookup.first_needed_page(group_idx, len(hit.ranks)), len(hit.ranks)):
                rank = hit.ranks[page_idx]
                slot = self.allocators[rank][group_idx].find(request.page_hashes[page_idx])
                if slot is None:
                    return None  # a shorter prefix than was found ends in another window
                room[rank][group_idx] -= self._has_window[group_idx] or self.allocators[rank][group_idx].is_idle(slot)
                if home is not None:
                    room[home][group_idx] -= rank != home
        return None if any(free < 0 for rooms in room for free in rooms) else room

    def _admit_spread(
        self,
        request: Request,
        num_pages: int,
        copies_on: list[frozenset[int]],
        placement: Placement,
    ) -> bool:
        """Cached pages where they are, the rest striped or spilled."""
        ranks: list[int] = []
        for found in copies_on:  # stay on a rank as long as it has the pages: longer runs, fewer exchanges
            ranks.append(ranks[-1] if ranks and ranks[-1] in found else min(found))
        hit = _Hit(ranks)
        room = self._room_after(request, hit, None)
        runs = None if room is None else self._place(num_pages - len(ranks), 0, placement, room)
        if runs is None:
            # Nobody will make room: do without the hit, whose idle pages may be the room that it needs.
            if ranks and not self._holds_others():
                return self._admit_spread(request, num_pages, [], placement)
            return False
        self._start(request, hit, runs, None)
        return True

    def _holds_others(self) -> bool:
        """Whether any request has pages or promises."""
        return any(any(promised) for promised in self.promised) or any(
            allocator.num_used for allocators in self.allocators for allocator in allocators
        )

    def _start(self, request: Request, hit: _Hit, runs: list[tuple[int, int]], home: int | None) -> None:
        """Give an admitted request its cached pages and its promises.

        Args:
            request: has no pages yet.
            hit: the cached pages.
            runs: (rank, pages) of the new pages.
            home: where pages of the hit that lie elsewhere are copied to, or None to use them where they lie.
        """
        size = self.config.page_size
        num_groups = len(self._num_pages)
        request.tables = [PageTable(size) for _ in range(num_groups)]
        used = hit.use(self, request)
        for table, group_idx, runs_found in zip(request.tables, range(num_groups), used, strict=True):
            for run in runs_found:
                if home is None or run.rank == home:
                    table.apply([run])
                    continue
                near = table.runs[-1].slot + table.runs[-1].num_pages if table.runs else None
                first = run.page_idx
                for slot, num_pages in self.allocators[home][group_idx].allocate(run.num_pages, near):
                    source = PageRun(first, run.rank, run.slot + first - run.page_idx, num_pages)
                    target = PageRun(first, home, slot, num_pages)
                    request.copies.append(PageCopy(group_idx, source, target))
                    table.apply([target])
                    first += num_pages
        request.num_hit_pages = request.num_published = len(hit.ranks)
        if request.copies:  # the copies are not published yet
            request.num_published = min(copy.source.page_idx for copy in request.copies)
        request.num_computed = request.num_planned = len(hit.ranks) * size
        for rank, pages in groupby(hit.ranks):
            request.place(home if home is not None else rank, sum(1 for _ in pages))
        request.claims = [dict[int, int]() for _ in range(num_groups)]
        request.held = [dict[int, int]() for _ in range(num_groups)]
        for rank, num_pages in runs:
            request.place(rank, num_pages)
            request.num_new[rank] = request.num_new.get(rank, 0) + num_pages
        for rank, num_pages in request.num_new.items():
            for group_idx in range(num_groups):
                self._claim(request, group_idx, rank, self._need(group_idx, num_pages))

    def use_page(self, rank: int, group_idx: int, slot: int) -> None:
        """Add a reference to a cached page."""
        is_shared = self.allocators[rank][group_idx].use(slot)
        self.promised[rank][group_idx] += is_shared and self._has_window[group_idx]

    def _release_pages(self, group_idx: int, run: PageRun) -> None:
        """Drop a reference to consecutive pages."""
        num_shared = self.allocators[run.rank][group_idx].release(run.slot, run.num_pages)
        self.promised[run.rank][group_idx] -= num_shared if self._has_window[group_idx] else 0

    def _room(self, rank: int, group_idx: int) -> int:
        """Pages that nobody holds or has been promised."""
        return self.allocators[rank][group_idx].num_available - self.promised[rank][group_idx]

    def _rooms(self) -> list[list[int]]:
        """The room of every rank and group."""
        return [[self._room(rank, group) for group in range(len(self._num_pages))] for rank in range(self.num_ranks)]

    def _claim(self, request: Request, group_idx: int, rank: int, num_pages: int) -> None:
        """Promise a request so many new pages on a rank, those it holds included."""
        held = request.held[group_idx].get(rank, 0)
        before = request.claims[group_idx].get(rank, 0)
        request.claims[group_idx][rank] = num_pages
        self.promised[rank][group_idx] += max(0, num_pages - held) - max(0, before - held)

    def _hold(self, request: Request, group_idx: int, rank: int, change: int) -> None:
        """Note that a request holds more or fewer of its new pages on a rank."""
        held = request.held[group_idx].get(rank, 0)
        claim = request.claims[group_idx].get(rank, 0)
        request.held[group_idx][rank] = held + change
        self.promised[rank][group_idx] += max(0, claim - held - change) - max(0, claim - held)

    # -- pages of a running request ----------------------------------------------------------------------------------

    def extend(self, request: Request) -> bool:
        """Place one more page, for tokens that are generated; False when no rank has room now.

        A packed request's next page goes to the rank of its last one, a striped one's follows snake order; where that
        rank is full, any rank with room will do.
        """
        preferred = self._next_rank(request)
        others = [rank for rank in range(self.num_ranks) if rank != preferred] if self._may_leave_home else []
        limiting = self._limiting_group or 0
        others.sort(key=lambda rank: (-self._room(rank, limiting), rank))
        for rank in (preferred, *others):
            pages = request.num_new.get(rank, 0) + 1
            needs = [self._need(group_idx, pages) for group_idx in range(len(self._num_pages))]
            if all(
                need - max(request.claims[g].get(rank, 0), request.held[g].get(rank, 0)) <= self._room(rank, g)
                for g, need in enumerate(needs)
            ):
                request.place(rank, 1)
                request.num_new[rank] = pages
                for group_idx, need in enumerate(needs):
                    self._claim(request, group_idx, rank, need)
                return True
        return False

    def _next_rank(self, request: Request) -> int:
        """Where the next page of generated tokens should go."""
        last = request.page_ranks[-1][0]
        forced = self.config.forced_placement
        if forced in (Placement.PACKED, Placement.SPILL) or (forced is None and len(request.page_ranks) == 1):
            return last
        tail_pages = request.num_pages - _pages(request.prompt_len, self.config.page_size)
        home = request.page_ranks[0][0]
        return snake_rank(max(0, tail_pages) // self.geometry.stripe_pages, home, self.num_ranks)

    def grow(self, request: Request, end: int) -> list[list[PageRun]]:
        """Allocate the pages that positions up to `end` need; they have been promised.

        Returns:
            Per KV group the runs added to the page table.
        """
        size = self.config.page_size
        added: list[list[PageRun]] = []
        for group_idx, table in enumerate(request.tables):
            new: list[PageRun] = []
            if table.num_pages * size < end:
                for rank, first, last in request.ranks_of(table.num_pages * size, -(-end // size) * size, size):
                    allocator = self.allocators[rank][group_idx]
                    near = next((run.slot + run.num_pages for run in reversed(table.runs) if run.rank == rank), None)
                    for slot, num_pages in allocator.allocate((last - first) // size, near):
                        new.append(table.append(rank, slot, num_pages))
                    self._hold(request, group_idx, rank, (last - first) // size)
            added.append(new)
        return added

    def publish(self, request: Request) -> None:
        """Let others find the pages that are full and computed."""
        if not self.config.enable_prefix_caching:
            return
        full = request.num_computed // self.config.page_size
        if full <= request.num_published:
            return
        extend_hashes(request.page_hashes, request.token_ids, self.config.page_size)
        refused = [] if self._refused is None else self._refused.page_hashes
        for page_idx in range(request.num_published, full):
            if page_idx < len(refused) and refused[page_idx] == request.page_hashes[page_idx]:
                self._refused = None
            for group_idx, table in enumerate(request.tables):
                page = table.page(page_idx)
                if page is not None:
                    self.allocators[page[0]][group_idx].publish(request.page_hashes[page_idx], page[1])
        request.num_published = full

    def withdraw(self, request: Request) -> None:
        """Let nobody find this request's pages any more, nor those that it was given: what they hold is in doubt."""
        self._refused = None
        for page_hash in request.page_hashes:
            for allocators in self.allocators:
                for allocator in allocators:
                    allocator.withdraw(page_hash)

    def copied(self, request: Request) -> None:
        """The sources of a request's copies are no longer needed."""
        if request.copies:
            self._refused = None
        for copy in request.copies:
            self._release_pages(copy.group_idx, copy.source)
        request.copies = []

    def slide(self, request: Request) -> None:
        """Free the pages that no later token's window reaches."""
        if not any(self._has_window):
            return
        for group_idx, (group, table) in enumerate(zip(self.model.kv_groups, request.tables, strict=True)):
            if group.spec.window is not None:
                oldest = max(0, request.num_computed - group.spec.window + 1)
                self._release(request, group_idx, table.free_before(oldest // self.config.page_size))

    def free(self, request: Request) -> None:
        """Give back everything that a request holds and has been promised."""
        self._refused = None
        self.copied(request)
        for group_idx, table in enumerate(request.tables):
            self._release(request, group_idx, table.free_before(table.num_pages))
            for rank in list(request.claims[group_idx]):
                self._claim(request, group_idx, rank, 0)
            assert not any(request.held[group_idx].values())

    def _release(self, request: Request, group_idx: int, runs: Sequence[PageRun]) -> None:
        if runs and runs[0].page_idx < request.num_hit_pages:
            self._refused = None  # nobody has been promised a page in its place
        for run in reversed(runs):  # the last page becomes idle first, and is evicted first
            self._release_pages(group_idx, run)
            new = run.page_idx + run.num_pages - max(run.page_idx, request.num_hit_pages)
            if new > 0:
                self._hold(request, group_idx, run.rank, -new)

    def forget_all(self) -> None:
        """The pools of all ranks are new ones: nothing is held, promised or cached."""
        self._refused = None
        self.promised = [[0] * len(self._num_pages) for _ in range(self.num_ranks)]
        for allocators in self.allocators:
            for allocator in allocators:
                allocator.forget_all()

    def check_integrity(self) -> None:
        """Assert that the allocators are sound, and that every promise can be kept."""
        for allocators, promised in zip(self.allocators, self.promised, strict=True):
            for allocator, pages in zip(allocators, promised, strict=True):
                allocator.check_integrity()
                assert 0 <= pages <= allocator.num_available, "more pages are promised than there are"


def _pages(num_tokens: int, page_size: int) -> int:
    """Pages that hold so many tokens: division, rounded up."""
    return -(-num_tokens // page_size)


def _count(page_ranks: Sequence[tuple[int, int]], num_ranks: int) -> list[int]:
    """Pages per rank of a placement."""
    counts = [0] * num_ranks
    for rank, num_pages in page_ranks:
        counts[rank] += num_pages
    return counts
