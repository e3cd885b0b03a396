"""Admission: which cached pages a request goes on from, and on which ranks its new pages go.

Holds pure functions of page counts. Must not know requests, hashes, slots or steps.
Read next: `longspan.scheduler.page_placer`; `longspan.scheduler.memory`, which gives an admitted request its pages.

Note [What to do with a hit]
    A short request belongs on one rank. For every rank, compare the tokens it would compute there with the work that
    already waits there; pages that only another rank has are copied, at `COPY_COST` of computing them. So short chats
    with a common system prompt stay packed, and the prompt ends up on every rank that serves them. A long request uses
    cached pages wherever they lie and stripes the rest: attention over several ranks is what it does anyway.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple, TypeAlias

from longspan.scheduler.page_placer import PagePlacer
from longspan.scheduler.reservations import RankPools, Room
from longspan.types import Placement

COPY_COST = 0.1
"""Cost of copying a token's KV from another rank, in tokens computed."""

Taken: TypeAlias = Callable[[Sequence[int], int | None], Room | None]
"""What a hit takes from the room of ranks (`PrefixLookup.taken`), given its rank per page, and the rank that pages of
other ranks are copied to (None: they are used where they lie). None where a page that later tokens need is missing."""


class Admission(NamedTuple):
    """Where the pages of an admitted request lie, or will lie."""

    hit: list[int]
    """Rank per cached page that the request goes on from, from its first page on."""
    runs: list[tuple[int, int]]
    """(rank, pages) of its new pages, in sequence order."""
    home: int | None
    """Where pages of the hit that lie elsewhere are copied to; None to use them where they lie."""


def choose_packed(
    pools: RankPools,
    page_size: int,
    num_pages: int,
    copies_on: Sequence[frozenset[int]],
    taken: Taken,
    load: Sequence[float],
    room_on: Callable[[int], Sequence[int]],
    slowness: Sequence[float],
) -> Admission | None:
    """Put all pages on one rank: the one where the request is done first. See Note [What to do with a hit].

    Ranks are looked at in the order of the least that they could take, and only while one could be better than the best
    so far.

    Args:
        pools: of all ranks.
        page_size: tokens per page.
        num_pages: pages of all known tokens; at least the last token's is new.
        copies_on: per cached page, the ranks that have it.
        taken: what a hit takes from the room.
        load: work that waits per rank, in tokens to compute.
        room_on: room of a rank, per KV group.
        slowness: time that each rank takes for a token, relative to the fastest one.

    Returns:
        None when they do not fit now.
    """
    best: tuple[float, int, int, int] | None = None  # cost, rank, copied pages, pages of the hit
    best_hit: list[int] = []
    have_any = frozenset[int]().union(*copies_on)
    num_new = num_pages - len(copies_on)
    at_least = [(work + num_new * page_size) * slow for work, slow in zip(load, slowness, strict=True)]
    for rank in sorted(range(len(load)), key=at_least.__getitem__):
        num_copied = 0.0 if rank in have_any else COPY_COST * len(copies_on)
        least = (load[rank] + (num_new + num_copied) * page_size) * slowness[rank]
        if best is not None and (least, rank) > best[:2]:
            if (at_least[rank], rank) > best[:2]:
                break  # nor can any rank behind it be better
            continue
        room = room_on(rank)
        here = next((i for i, ranks in enumerate(copies_on) if rank not in ranks), len(copies_on))
        for length in sorted({0, here, len(copies_on)}):
            hit = [rank if rank in ranks else min(ranks) for ranks in copies_on[:length]]
            copied = sum(source != rank for source in hit)
            cost = (load[rank] + (num_pages - length + COPY_COST * copied) * page_size) * slowness[rank]
            option = (cost, rank, copied, length)
            if best is not None and best <= option:
                continue
            left = room if not hit else _left_on(rank, room_on, taken(hit, rank))
            if left is not None and pools.fit(num_pages - length, left):
                best, best_hit = option, hit
    if best is None:
        return None
    return Admission(best_hit, [(best[1], num_pages - len(best_hit))], best[1])


def choose_spread(
    placer: PagePlacer,
    placement: Placement,
    num_pages: int,
    copies_on: Sequence[frozenset[int]],
    taken: Taken,
    room: Room,
    held: Sequence[int] = (),
) -> Admission | None:
    """Use cached pages where they are, and stripe or spill the rest.

    Args:
        placer: lays new pages on ranks.
        placement: how.
        num_pages: pages of all known tokens.
        copies_on: per cached page, the ranks that have it.
        taken: what a hit takes from the room.
        room: of every rank and KV group.
        held: ranks whose host memory has the pages behind those: they go there.

    Returns:
        None when they do not fit now.
    """
    hit: list[int] = []
    for found in copies_on:  # stay on a rank as long as it has the pages: longer runs, fewer exchanges
        hit.append(hit[-1] if hit and hit[-1] in found else min(found))
    left = _room_after(room, taken(hit, None)) if hit else room
    kept = [(rank, sum(1 for _ in same)) for rank, same in groupby(held)]
    for rank, count in kept if left is not None else ():
        left = placer.room_beside(rank, count, left) if left is not None else None
    runs = None if left is None else placer.place(num_pages - len(hit) - len(held), 0, placement, left)
    return None if runs is None else Admission(hit, kept + runs, None)


def _left_on(home: int, room_on: Callable[[int], Sequence[int]], taken: Room | None) -> Sequence[int] | None:
    """The room of one rank that a hit leaves, or None when there is not enough on some rank."""
    if taken is None:
        return None
    left: Sequence[int] = room_on(home)
    for rank, of_rank in enumerate(taken):
        if any(of_rank):
            here = [free - pages for free, pages in zip(room_on(rank), of_rank, strict=True)]
            if min(here) < 0:
                return None
            left = here if rank == home else left
    return left


def _room_after(room: Room, taken: Room | None) -> Room | None:
    """The room that a hit leaves, or None when there is not enough."""
    if taken is None:
        return None
    left = [[free - pages for free, pages in zip(*of_rank, strict=True)] for of_rank in zip(room, taken, strict=True)]
    return None if any(free < 0 for of_rank in left for free in of_rank) else left
