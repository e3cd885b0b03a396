"""Promises: how many pages running requests may still need.

Holds counts per rank and KV group. Must not know which pages they are, tokens, or how ranks were chosen.
Read next: `longspan.scheduler.memory`, which makes promises and keeps them.

Note [Promises]
    At admission the pages of all tokens that are known (the prompt; after a preemption also what was generated) are
    *placed* on ranks and *promised*; they are *allocated* when a step first writes them. So a prefill never runs out of
    pages. Pages for tokens yet to be generated are placed one at a time (`KVMemory.extend`), on any rank with room;
    when there is none, the scheduler preempts a younger request.

        room of a rank  =  pages free or idle  -  pages promised to running requests and not yet allocated

    In a group with a window (or chunks, which are alike here), a request that gives a page back because its window has
    left it may count on another one.
    If another request still uses the page, that is one page more than before; so every further user of such a page
    counts as a promise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from longspan.config import EngineConfig
from longspan.sharding.capacity import window_pages
from longspan.types import ModelSpec

Room: TypeAlias = list[list[int]]
"""[rank][pool]: pages that no request holds or has been promised. A rank has a pool per KV group, and behind them one
of slots for states, if the model has recurrent layers; here a slot is a page, of which a request holds one at most."""


@dataclass(frozen=True, slots=True)
class RankPools:
    """The pools of all ranks, in pages."""

    num_pages: tuple[tuple[int, ...], ...]
    """[rank][KV group]; behind a rank's groups slots of states, if the model has recurrent layers."""
    most_held: tuple[int | None, ...]
    """Per pool, most pages that a request of any length holds at once on a rank; None in a group without a window,
    where it holds all of them."""

    @classmethod
    def of(cls, model: ModelSpec, config: EngineConfig, num_pages: Sequence[Sequence[int]]) -> "RankPools":
        """The pools of an engine.

        Args:
            model: its KV groups.
            config: of the engine.
            num_pages: [rank][KV group]; behind a rank's groups slots of states, if the model has recurrent layers.
        """
        reaches = [group.spec.reach for group in model.kv_groups]
        size, budget = config.page_size, config.max_num_batched_tokens
        most_held = [None if r is None else window_pages(r, size, budget) for r in reaches]
        most_held += [1] * bool(model.state_groups)  # one state, however many pages
        return cls(tuple([tuple(of_rank) for of_rank in num_pages]), tuple(most_held))

    @property
    def limiting_group(self) -> int | None:
        """The group that limits a request's length: one without a window, if there is one."""
        return self.most_held.index(None) if None in self.most_held else None

    @property
    def limits(self) -> tuple[int, ...]:
        """Per rank, most pages of a request that fit it if it is empty; the first group's where any number does."""
        most = [self.most_pages(of_rank) for of_rank in self.num_pages]
        return tuple([of_rank[0] if n is None else n for n, of_rank in zip(most, self.num_pages, strict=True)])

    def most_pages(self, room: Sequence[int]) -> int | None:
        """Most new pages of a request that fit the room of one rank; None where any number does.

        A group with a window limits them only where the room is less than a request of any length holds at once.
        """
        limits = [free for free, most in zip(room, self.most_held, strict=True) if most is None or free < most]
        return min(limits, default=None)

    def needed(self, group_idx: int, num_pages: int) -> int:
        """Pages that a request with `num_pages` new pages on a rank ever holds there at once."""
        most = self.most_held[group_idx]
        return num_pages if most is None else min(num_pages, most)

    def fit(self, num_pages: int, room: Sequence[int]) -> bool:
        """Whether so many new pages of a request fit the room of one rank."""
        most = self.most_pages(room)
        return most is None or num_pages <= most

    def fit_some_rank(self, num_pages: int) -> bool:
        """Whether some rank, if it is empty, has room for so many pages of a request."""
        return any(self.fit(num_pages, of_rank) for of_rank in self.num_pages)


class Claims:
    """What one request has been promised. `Reservations` changes it."""

    __slots__ = ("held", "placed", "promised")

    def __init__(self, num_groups: int) -> None:
        """Hold nothing, in so many KV groups."""
        self.placed: dict[int, int] = {}
        """Rank to new pages placed there; cached ones that the request goes on from are not among them."""
        self.promised: list[dict[int, int]] = [{} for _ in range(num_groups)]
        """Per KV group: rank to new pages promised there, those held included."""
        self.held: list[dict[int, int]] = [{} for _ in range(num_groups)]
        """Per KV group: rank to new pages held there."""


class Reservations:
    """Promises to all running requests."""

    def __init__(self, pools: RankPools) -> None:
        """Promise nothing yet.

        Args:
            pools: of all ranks.
        """
        self._pools = pools
        self.promised: Room = [[0] * len(of_rank) for of_rank in pools.num_pages]
        """[rank][KV group]: pages that running requests may still need."""

    def room(self, available: Sequence[Sequence[int]]) -> Room:
        """What is left of pages that are free or idle, [rank][KV group]."""
        return [
            [free - promised for free, promised in zip(of_rank, promises, strict=True)]
            for of_rank, promises in zip(available, self.promised, strict=True)
        ]

    def fits_one_more(self, claims: Claims, rank: int, available: Sequence[int]) -> bool:
        """Whether a request may be promised one more page on a rank.

        Args:
            claims: of the request.
            rank: where its next page would go.
            available: per KV group, pages of the rank that are free or idle.
        """
        num_pages = claims.placed.get(rank, 0) + 1
        for group_idx, free in enumerate(available):
            known = max(claims.promised[group_idx].get(rank, 0), claims.held[group_idx].get(rank, 0))
            if self._pools.needed(group_idx, num_pages) - known > free - self.promised[rank][group_idx]:
                return False
        return True

    def promise(self, claims: Claims, rank: int, num_pages: int) -> None:
        """Promise a request so many more new pages on a rank; in a group with a window, as many as it will hold."""
        claims.placed[rank] = claims.placed.get(rank, 0) + num_pages
        for group_idx in range(len(claims.promised)):
            self._set(claims, group_idx, rank, self._pools.needed(group_idx, claims.placed[rank]))

    def hold(self, claims: Claims, group_idx: int, rank: int, change: int) -> None:
        """Note that a request holds more or fewer of its new pages on a rank."""
        held = claims.held[group_idx].get(rank, 0)
        promised = claims.promised[group_idx].get(rank, 0)
        claims.held[group_idx][rank] = held + change
        self.promised[rank][group_idx] += max(0, promised - held - change) - max(0, promised - held)

    def share(self, group_idx: int, rank: int, change: int) -> None:
        """Note that pages in use have got further users (`change` above 0), or have lost some (below 0)."""
        if self._pools.most_held[group_idx] is not None:
            self.promised[rank][group_idx] += change

    def release(self, claims: Claims) -> None:
        """Take all promises to a request back; it holds no new page any more."""
        for group_idx, promised in enumerate(claims.promised):
            assert not any(claims.held[group_idx].values()), "a request without promises holds pages"
            for rank in promised:
                self._set(claims, group_idx, rank, 0)

    def forget_all(self) -> None:
        """Take all promises back: no request holds anything."""
        self.promised = [[0] * len(promised) for promised in self.promised]

    def _set(self, claims: Claims, group_idx: int, rank: int, num_pages: int) -> None:
        """Promise a request so many new pages on a rank, those it holds included."""
        held = claims.held[group_idx].get(rank, 0)
        before = claims.promised[group_idx].get(rank, 0)
        claims.promised[group_idx][rank] = num_pages
        self.promised[rank][group_idx] += max(0, num_pages - held) - max(0, before - held)
