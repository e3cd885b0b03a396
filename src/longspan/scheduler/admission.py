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
    room: Room,
) -> Admission | None:
    """Put all pages on one rank: the one where the request is done first. See Note [What to do with a hit].

    Args:
        pools: of every rank.
        page_size: tokens per page.
        num_pages: pages of all known tokens; at least the last token's is new.
        copies_on: per cached page, the ranks that have it.
        taken: what a hit takes from the room.
        load: work that waits per rank, in tokens to compute.
        room: of every rank and KV group.

    Returns:
        None when they do not fit now.
    """
    options: list[tuple[float, int, int, list[int]]] = []
    for rank in range(len(room)):
        here = next((i for i, ranks in enumerate(copies_on) if rank not in ranks), len(copies_on))
        for length in sorted({0, here, len(copies_on)}):
            hit = [rank if rank in ranks else min(ranks) for ranks in copies_on[:length]]
            left = _room_after(room, taken(hit, rank)) if hit else room
            if left is None or not pools.fit(num_pages - length, left[rank]):
                continue
            copied = sum(source != rank for source in hit)
            cost = load[rank] + (num_pages - length + COPY_COST * copied) * page_size
            options.append((cost, rank, copied, hit))
    if not options:
        return None
    _, home, _, hit = min(options, key=lambda option: (*option[:3], len(option[3])))
    return Admission(hit, [(home, num_pages - len(hit))], home)


def choose_spread(
    placer: PagePlacer,
    placement: Placement,
    num_pages: int,
    copies_on: Sequence[frozenset[int]],
    taken: Taken,
    room: Room,
) -> Admission | None:
    """Use cached pages where they are, and stripe or spill the rest.

    Args:
        placer: lays new pages on ranks.
        placement: how.
        num_pages: pages of all known tokens.
        copies_on: per cached page, the ranks that have it.
        taken: what a hit takes from the room.
        room: of every rank and KV group.

    Returns:
        None when they do not fit now.
    """
    hit: list[int] = []
    for found in copies_on:  # stay on a rank as long as it has the pages: longer runs, fewer exchanges
        hit.append(hit[-1] if hit and hit[-1] in found else min(found))
    left = _room_after(room, taken(hit, None)) if hit else room
    runs = None if left is None else placer.place(num_pages - len(hit), 0, placement, left)
    return None if runs is None else Admission(hit, runs, None)


def _room_after(room: Room, taken: Room | None) -> Room | None:
    """The room that a hit leaves, or None when there is not enough."""
    if taken is None:
        return None
    left = [[free - pages for free, pages in zip(*of_rank, strict=True)] for of_rank in zip(room, taken, strict=True)]
    return None if any(free < 0 for of_rank in left for free in of_rank) else left
