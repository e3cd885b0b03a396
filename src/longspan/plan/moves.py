"""Moves of pages between a rank's pools and its tiers: what the driver orders, and what a rank answers.

Holds messages of integers and hashes. Must not know where tiers keep pages, nor plans.
Read next: `longspan.scheduler.tiers`, which orders moves; `longspan.worker.page_mover`, which carries them out.

Note [Order of moves and plans]
    A rank takes moves and plans in the order in which they were sent. Pages to store are copied when the rank comes to
    the move, before any later plan: so the driver may give their slots away at once. Pages to load are written by
    another thread, at any time until the answer: their slots are those of a request that waits for them, so no plan
    reads or writes them before, and those sent earlier have ended.
"""

import msgspec

from longspan.kv.page_directory import PageKey


class PagePlace(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A page, and the slot of a rank's pool where it lies or belongs."""

    pool_idx: int
    slot: int
    page_hash: bytes
    on_host: bool = False
    """Whether the rank's host memory is to keep it, or has it."""
    on_disk: bool = True
    """Whether the disk is to keep it, or has it."""


class Move(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Driver to one rank: copy pages out of its pools, or into them."""

    move_id: int
    rank: int
    stores: tuple[PagePlace, ...] = ()
    """Pages to keep: they are copied before the rank's next plan."""
    loads: tuple[PagePlace, ...] = ()
    """Pages to fetch, while the rank's plans go on; all from one tier."""
    drops: tuple[PageKey, ...] = ()
    """Pages that the rank's host memory is to drop first."""


class Moved(msgspec.Struct, frozen=True, gc=False, tag=True):
    """A rank's answer to a move, when it is done: in part, if something is missing, damaged or full."""

    move_id: int
    rank: int
    failed: tuple[int, ...] = ()
    """Indices of the pages that were not stored, or not loaded."""
    num_damaged: int = 0
    """Pages among these whose files were damaged."""
    num_bytes: int = 0
    """Bytes of the pages that were loaded, or written to the disk."""
    copy_s: float = 0.0
    """Seconds in which pages to store were copied."""
    move_s: float = 0.0
    """Seconds from the rank's first work on the move to its end."""
    error: str | None = None
    """What went wrong first, for the user."""
