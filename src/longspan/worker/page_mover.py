"""Moves of pages between a rank's pools, host memory and files, in threads beside the one that runs plans.

Holds the threads, and the pages that are on their way. Must not know plans, requests, or why pages are moved.
Read next: `longspan.plan.moves`, orders and answers; `longspan.kv.page_bytes` and `longspan.kv.page_directory`.

One thread stores, and one loads with the help of a third that reads, so that no request waits for what others leave
behind. They give way to threads that compute: where all cores are busy, a step takes longer by the little that the
system's scheduler gives to a low priority.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from longspan.kv.page_bytes import PageBytes
from longspan.kv.page_directory import ModelPages, PageKey
from longspan.kv.page_file import DamagedPageError
from longspan.plan.moves import Move, Moved, PagePlace

BATCH_BYTES = 4 * 2**20
"""Bytes of pages that are loaded before they are written to the pool together, about."""
READ_S = 30.0
"""Seconds that a batch of pages may take to be read; then they are taken for lost, and computed."""
NICENESS = 10
"""Of the threads: where all cores are busy, they get a tenth of what a thread that computes gets."""


class PageMover:
    """Carries out the moves of one rank."""

    def __init__(self, pools: Sequence[PageBytes], files: ModelPages | None, answer: Callable[[Moved], None]) -> None:
        """Start the threads.

        Args:
            pools: the rank's pools.
            files: pages on the disk; None without one.
            answer: called with every answer, from any thread.
        """
        self._pools, self._files, self._answer = pools, files, answer
        self._reader = _Reader()
        self._host: dict[PageKey, Tensor] = {}  # for the thread that runs plans alone
        self._stores: queue.SimpleQueue[tuple[Move, list[Tensor], float] | None] = queue.SimpleQueue()
        self._loads: queue.SimpleQueue[tuple[Move, list[Tensor | None]] | None] = queue.SimpleQueue()
        for work, name in ((self._store_all, "longspan-store"), (self._load_all, "longspan-load")):
            threading.Thread(target=work, name=name, daemon=True).start()

    def take(self, move: Move) -> None:
        """Begin a move: pages to store are copied before this returns. The thread that runs plans calls it."""
        for key in move.drops:
            self._host.pop(key, None)
        if move.loads:  # pages of host memory are this move's now, whatever is dropped while it waits
            self._loads.put((move, [self._host.get(_key(p)) if p.on_host else None for p in move.loads]))
            return
        started = time.perf_counter()
        pages: list[Tensor] = [torch.empty(0)] * len(move.stores)
        for pool_idx, indices in _by_pool(move.stores).items():
            copies = self._pools[pool_idx].gather([move.stores[i].slot for i in indices])
            for i, page in zip(indices, copies, strict=True):
                # One by one in host memory: a view would keep its whole batch there.
                pages[i] = page.clone() if move.stores[i].on_host else page
                if move.stores[i].on_host:
                    self._host[_key(move.stores[i])] = pages[i]
        self._stores.put((move, pages, time.perf_counter() - started))

    def close(self) -> None:
        """End the threads when they have done what they were told."""
        self._stores.put(None)
        self._loads.put(None)

    # -- the threads -------------------------------------------------------------------------------------------------

    def _store_all(self) -> None:
        _give_way()
        while (job := self._stores.get()) is not None:
            self._answer(_whatever_happens(job[0], partial(self._store, *job)))
            del job  # the copies, while the next one is awaited

    def _store(self, move: Move, pages: Sequence[Tensor], copy_s: float) -> Moved:
        started, num_bytes, error = time.perf_counter(), 0, None
        failed: list[int] = []
        for i, (place, page) in enumerate(zip(move.stores, pages, strict=True)):
            if not place.on_disk:
                continue
            assert self._files is not None, "there is no disk"
            if error is None:
                try:
                    num_bytes += self._files.write(_key(place), page.numpy().data)
                    continue
                except OSError as raised:  # a full disk will not take the others either
                    error = f"cannot write to {self._where}: {raised.strerror or raised}"
            failed.append(i)
        taken_s = time.perf_counter() - started
        return Moved(
            move.move_id,
            move.rank,
            failed=tuple(failed),
            num_bytes=num_bytes,
            move_s=taken_s,
            copy_s=copy_s,
            error=error,
        )

    def _load_all(self) -> None:
        _give_way()
        while (job := self._loads.get()) is not None:
            self._answer(_whatever_happens(job[0], partial(self._load, *job)))
            del job
        self._reader.close()

    def _load(self, move: Move, held: Sequence[Tensor | None]) -> Moved:
        started, num_bytes, faults = time.perf_counter(), 0, _Faults()
        for pool_idx, indices in _by_pool(move.loads).items():
            pool = self._pools[pool_idx]
            count = max(1, BATCH_BYTES // pool.page_bytes)
            for first in range(0, len(indices), count):
                batch = indices[first : first + count]
                pages = torch.empty(len(batch), pool.page_bytes, dtype=torch.uint8)
                places, copies = [move.loads[i] for i in batch], [held[i] for i in batch]
                fetch = partial(self._fetch, places, copies, pages)
                # Memory answers, also while a disk does not.
                found = fetch() if all(place.on_host for place in places) else self._reader.run(fetch)
                if found is None:  # whatever still comes goes to memory that nobody reads
                    found = _Faults([*range(len(batch))], error=f"{self._where} did not answer for {READ_S:g} s")
                faults.add(found, batch)
                bad = set(found.failed)
                came = [row for row in range(len(batch)) if row not in bad]
                if came:
                    pool.scatter([places[row].slot for row in came], pages[came] if bad else pages)
                    num_bytes += len(came) * pool.page_bytes
        return Moved(
            move.move_id,
            move.rank,
            failed=tuple(sorted(faults.failed)),
            num_damaged=faults.num_damaged,
            num_bytes=num_bytes,
            move_s=time.perf_counter() - started,
            error=faults.error,
        )

    def _fetch(self, places: Sequence[PagePlace], copies: Sequence[Tensor | None], pages: Tensor) -> "_Faults":
        """Bring pages [N, page_bytes] from their tier; return what went wrong."""
        faults = _Faults()
        for row, (place, held) in enumerate(zip(places, copies, strict=True)):
            if held is not None:
                pages[row].copy_(held)
            elif self._files is None or place.on_host:
                faults.failed.append(row)
            else:
                try:
                    self._files.read(_key(place), pages[row].numpy().data)
                except FileNotFoundError:  # another engine may have needed room
                    faults.failed.append(row)
                except (OSError, DamagedPageError) as raised:
                    faults.failed.append(row)
                    if isinstance(raised, DamagedPageError):
                        faults.num_damaged += 1
                        self._files.remove([_key(place)])
                    reason = (raised.strerror if isinstance(raised, OSError) else None) or str(raised)
                    faults.error = faults.error or f"cannot read from {self._where}: {reason}"
        return faults

    @property
    def _where(self) -> str:
        """The directory in words."""
        return "host memory" if self._files is None else str(self._files.root.parent)


@dataclass(slots=True)
class _Faults:
    """What went wrong."""

    failed: list[int] = field(default_factory=list)
    """Indices of pages."""
    num_damaged: int = 0
    error: str | None = None

    def add(self, other: "_Faults", indices: Sequence[int]) -> None:
        """Add the faults of a batch; `indices` are those of its pages."""
        self.failed += [indices[row] for row in other.failed]
        self.num_damaged += other.num_damaged
        self.error = self.error or other.error


class _Reader:
    """Thread that reads for another one, which does not wait for ever: a disk may never answer."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], _Faults], Future[_Faults]] | None] = queue.SimpleQueue()
        self._late: Future[_Faults] | None = None  # the job for which nobody waits any more
        threading.Thread(target=self._run, name="longspan-read", daemon=True).start()

    def run(self, job: Callable[[], _Faults]) -> _Faults | None:
        """Return what a job returns; None if it takes too long, or an earlier one still does."""
        if self._late is not None and not self._late.done():
            return None
        result: Future[_Faults] = Future()
        self._late = None
        self._jobs.put((job, result))
        try:
            return result.result(timeout=READ_S)
        except TimeoutError:
            self._late = result
            return None

    def close(self) -> None:
        """End the thread, when it has done what it was told."""
        self._jobs.put(None)

    def _run(self) -> None:
        _give_way()
        while (given := self._jobs.get()) is not None:
            job, result = given
            try:
                result.set_result(job())
            except BaseException as error:  # for whoever waits
                result.set_exception(error)


class MovesDone:
    """Answers on their way from the threads of a mover to the thread that sends them."""

    def __init__(self) -> None:
        self._answers: queue.SimpleQueue[Moved] = queue.SimpleQueue()
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """File descriptor that is readable when there is an answer."""

    def put(self, moved: Moved) -> None:
        """Add an answer. Any thread may call it."""
        self._answers.put(moved)
        os.eventfd_write(self.bell, 1)

    def take(self) -> list[Moved]:
        """All answers that have come since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.bell)
        found: list[Moved] = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._answers.get_nowait())
        return found


def _whatever_happens(move: Move, carry_out: Callable[[], Moved]) -> Moved:
    """Carry out a move; if even that fails, nothing was moved: a request must not wait for ever."""
    try:
        return carry_out()
    except Exception as error:
        everything = tuple(range(len(move.stores or move.loads)))
        return Moved(move.move_id, move.rank, everything, error=f"{type(error).__name__}: {error}")


def _by_pool(places: Sequence[PagePlace]) -> dict[int, list[int]]:
    """Indices of pages, per pool."""
    found: dict[int, list[int]] = {}
    for i, place in enumerate(places):
        found.setdefault(place.pool_idx, []).append(i)
    return found


def _key(place: PagePlace) -> PageKey:
    return PageKey(place.pool_idx, place.page_hash)


def _give_way() -> None:
    """Give this thread a low priority, where that is possible."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
