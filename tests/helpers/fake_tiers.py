"""Tiers of simulated ranks: pages move when a seed says so, and some are lost. No files, no torch."""

import random
from collections import Counter
from dataclasses import dataclass, field

from longspan.kv.page_directory import PageKey
from longspan.kv.prefix import extend_hashes
from longspan.plan.moves import Move, Moved, PagePlace

Keys = tuple[tuple[int, ...], ...]
"""What the rows of a page hold, in the simulator's terms: of each row the tokens that its key depends on."""
ARRIVING = ("arriving",)
"""What a row holds that is being loaded: no token's key."""


@dataclass
class FakeTiers:
    """Carries out moves. Whatever it has outlives ranks."""

    failures: float = 0.0
    """Share of pages that cannot be stored, or loaded."""
    files: dict[PageKey, Keys] = field(default_factory=dict)
    host: dict[tuple[int, PageKey], Keys] = field(default_factory=dict)
    """(rank, page) to what the rank's host memory holds."""
    moves: dict[int, tuple[Move, list[Keys | None]]] = field(default_factory=dict)
    """Begun, and not answered; with the pages that were copied when they began."""
    arriving: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """(pool, rank, slot) to the move that writes it."""
    counts: Counter[str] = field(default_factory=Counter)

    def begin(self, move: Move, written: dict, size: int) -> None:
        """Pages to store are copied now; slots of pages to load hold nothing from now on."""
        assert not (move.stores and move.loads)
        copies: list[Keys | None] = []
        for key in move.drops:
            del self.host[move.rank, key]
        for place in move.stores:
            self.check_free(place.pool_idx, move.rank, place.slot)
            rows = tuple(written[place.pool_idx, move.rank, place.slot * size + i] for i in range(size))
            hashes: list[bytes] = []
            extend_hashes(hashes, rows[-1], size)
            assert hashes[-1] == place.page_hash, "another page lies there"
            copies.append(rows)
            assert place.on_host or place.on_disk
            if place.on_host:
                assert (move.rank, _key(place)) not in self.host, "a page is kept twice"
                self.host[move.rank, _key(place)] = rows
        for place in move.loads:
            self.check_free(place.pool_idx, move.rank, place.slot)
            self.arriving[place.pool_idx, move.rank, place.slot] = move.move_id
            assert place.on_host != place.on_disk
            copies.append(self.host[move.rank, _key(place)] if place.on_host else None)
            for i in range(size):
                written[place.pool_idx, move.rank, place.slot * size + i] = ARRIVING
        self.moves[move.move_id] = (move, copies)

    def check_free(self, pool_idx: int, rank: int, slot: int) -> None:
        """Assert that no move writes a slot."""
        assert (pool_idx, rank, slot) not in self.arriving, "a slot is written by two"

    def end(self, rng: random.Random, written: dict, size: int) -> Moved:
        """Some move ends: each page came, or did not."""
        move, copies = self.moves.pop(rng.choice(list(self.moves)))
        failed: list[int] = []
        for i, (place, rows) in enumerate(zip(move.stores, copies, strict=False)):
            if place.on_disk and rng.random() < self.failures:
                failed.append(i)
            elif place.on_disk:
                assert rows is not None
                self.files[_key(place)] = rows
                self.counts["stored"] += 1
            else:
                self.counts["kept in memory"] += 1
        for i, (place, held) in enumerate(zip(move.loads, copies, strict=False)):
            del self.arriving[place.pool_idx, move.rank, place.slot]
            found = held if place.on_host else self.files.get(_key(place))
            self.counts["loaded from memory"] += place.on_host
            if found is None or rng.random() < self.failures:
                failed.append(i)
                self.counts["not loaded"] += 1
                continue
            self.counts["loaded"] += 1
            for row, key in enumerate(found):
                written[place.pool_idx, move.rank, place.slot * size + row] = key
        return Moved(move.move_id, move.rank, tuple(failed), num_bytes=10**9, move_s=1e-21)

    def lose_some(self, rng: random.Random, share: float) -> list[PageKey]:
        """Somebody removes files; returns which."""
        gone = [key for key in self.files if rng.random() < share]
        for key in gone:
            del self.files[key]
        self.counts["removed"] += len(gone)
        return gone

    def lose_ranks(self) -> None:
        """The ranks are gone, with what they moved and kept."""
        self.moves.clear()
        self.host.clear()
        self.arriving.clear()


def _key(place: PagePlace) -> PageKey:
    return PageKey(place.pool_idx, place.page_hash)
