"""Pages between ranks and tiers, as the engine drives them: orders go out, answers come in, files are kept.

Holds the moves in flight. Must not know what is moved, or why: the scheduler decides, and ranks do it.
Read next: `longspan.scheduler.tiers`, the decisions; `longspan.worker.page_mover`, the work;
`longspan.engine.disk_keeper`, the files.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import msgspec

from longspan.config import REMOTE_EXECUTORS, EngineConfig
from longspan.engine.disk_keeper import DiskKeeper
from longspan.engine.executor import Executor
from longspan.engine.stats import TierStats
from longspan.errors import ConfigError
from longspan.group.host_memory import memory_bytes
from longspan.group.shape import GroupShape
from longspan.kv.page_directory import ModelNote, ModelPages, open_directory
from longspan.models.fingerprint import fingerprint, hub_directory, local_directory, tensor_fingerprint
from longspan.models.lora import check_lora
from longspan.plan.moves import Move, Moved
from longspan.scheduler.request import Request
from longspan.scheduler.scheduler import Scheduler
from longspan.scheduler.tiers import Tiers
from longspan.types import ModelSpec

FLUSH_S = 20.0
"""Seconds without any progress after which the end of an engine waits no longer for pages that are to be stored."""

log = logging.getLogger(__name__)


class PageTiers:
    """The tiers of one engine."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, wake: Callable[[], None]) -> None:
        """Open what there is.

        Args:
            config: options that name it.
            spec: the model's facts, options applied.
            wake: called from any thread when a move has ended.

        Raises:
            ConfigError: the directory cannot be used, or the model's KV cannot be kept.
        """
        if spec.state_groups:
            name = "kv_disk" if config.kv_disk is not None else "kv_host_memory"
            raise ConfigError(f"{name}: got one for a model with recurrent layers, legal there is none")
        if GroupShape.of(config).processes_per_rank > 1:  # which would write one page's parts to one file
            raise ConfigError("kv_disk, kv_host_memory: got one with ranks of several processes, legal there is none")
        _check_memory(config)
        self.fingerprint: bytes | None = None
        """All that KV depends on beside tokens, 16 bytes; None without a disk."""
        self._keeper: DiskKeeper | None = None
        if config.kv_disk is not None:
            self.fingerprint = kv_fingerprint(config, spec)
            self._keeper = _open_disk(config, spec, self.fingerprint)
        self._wake = wake
        self._in_flight: dict[Future[Moved], Move] = {}
        self._told: set[str] = set()  # errors that the user knows of

    def __len__(self) -> int:
        return len(self._in_flight)

    def tell(self, scheduler: Scheduler) -> None:
        """Tell the scheduler what has changed on the disk."""
        tiers = scheduler.memory.tiers
        assert tiers is not None
        for come, gone in () if self._keeper is None else self._keeper.news():
            tiers.note_found(come)
            tiers.note_gone(gone)

    def send(self, scheduler: Scheduler, executor: Executor) -> None:
        """Order all moves that can start now, and tell the disk what the scheduler knows."""
        tiers = scheduler.memory.tiers
        assert tiers is not None
        for move in scheduler.memory.take_moves():
            future = executor.move(move)
            self._in_flight[future] = move
            future.add_done_callback(lambda _: self._wake())
        if self._keeper is None:
            return
        for used in tiers.take_used():
            self._keeper.note_used(used)
        if doubted := tiers.take_doubted():
            self._keeper.remove(doubted)

    def take_in(self, scheduler: Scheduler) -> list[Request]:
        """Hand the answers that have come to the scheduler; return the requests that go on."""
        advanced: list[Request] = []
        for future in [future for future in self._in_flight if future.done()]:
            move = self._in_flight.pop(future)
            if future.exception() is None:  # else the ranks are lost, as the plans in flight show
                advanced += scheduler.take_moved(moved := future.result())
                self._note(move, moved)
        return advanced

    def _note(self, move: Move, moved: Moved) -> None:
        if move.stores and moved.num_bytes and self._keeper is not None:
            self._keeper.note_written(moved.num_bytes)
        if moved.error is not None and moved.error not in self._told:
            self._told.add(moved.error)
            log.warning("longspan: kv_disk: %s; what is missing is computed, and this is not said again", moved.error)

    def lose_ranks(self) -> None:
        """Forget the moves of ranks that are lost."""
        self._in_flight.clear()

    def flush(self, scheduler: Scheduler, executor: Executor) -> None:
        """Wait until pages that were computed are stored, but not for ever; nor at all if requests were broken off."""
        if scheduler.has_requests:
            return
        deadline = time.monotonic() + FLUSH_S
        self.send(scheduler, executor)
        while self._in_flight and time.monotonic() < deadline and executor.failure is None:
            time.sleep(0.005)
            num_moves = len(self._in_flight)
            self.take_in(scheduler)
            if len(self._in_flight) < num_moves:
                deadline = time.monotonic() + FLUSH_S
            self.send(scheduler, executor)

    def close(self) -> None:
        """End the keeper. May be called twice."""
        if self._keeper is not None:
            self._keeper.close()


def _check_memory(config: EngineConfig) -> None:
    """Refuse more host memory than this machine has, if the ranks are here.

    Raises:
        ConfigError: it is more.
    """
    total, size = memory_bytes()[0], config.context_parallel_size
    asked = config.kv_host_memory
    if asked is not None and config.executor not in REMOTE_EXECUTORS and asked * size > total:
        raise ConfigError(
            f"kv_host_memory: got {asked} bytes per rank, legal is at most {total // size}: {size} "
            f"rank{'s' * (size > 1)} share this machine's {total} bytes"
        )


def _open_disk(config: EngineConfig, spec: ModelSpec, fingerprint: bytes) -> DiskKeeper:
    """Open the directory that `kv_disk` names.

    Raises:
        ConfigError: it cannot be used.
    """
    assert config.kv_disk is not None
    assert config.disk_bytes is not None
    directory = Path(config.kv_disk).expanduser()
    open_directory(directory)
    pages = ModelPages(directory, fingerprint)
    page_bytes = tuple(group.page_bytes(config.page_size) for group in spec.kv_groups)
    dtype = ", ".join(dict.fromkeys(name for group in spec.kv_groups for name in group.spec.layout.dtypes))
    try:
        pages.note(ModelNote(config.model, dtype, config.page_size, page_bytes, len(page_bytes)))
    except OSError as error:
        legal = "a directory that can be written"
        raise ConfigError(f"kv_disk: got {config.kv_disk!r}, legal is {legal}: {error.strerror}") from error
    return DiskKeeper(directory, pages, config.disk_bytes)


def tier_stats(tiers: Tiers) -> dict[str, TierStats]:
    """Return what every tier has and did."""
    return {
        name: TierStats(pages=tiers.num_pages(name), num_bytes=tiers.num_bytes(name), **asdict(counts))
        for name, counts in tiers.counts.items()
    }


def kv_fingerprint(config: EngineConfig, spec: ModelSpec) -> bytes:
    """Return 16 bytes that differ where the same tokens may have another KV: weights, adapter, options that change
    what is computed, how it is stored, and the versions of what computes it. Ranks and placements are not in it."""
    adapter = None if config.merged_lora is None else check_lora(config.merged_lora)
    directory = local_directory(config.model)
    if directory is not None:
        weights = fingerprint(directory, adapter) + tensor_fingerprint(directory, adapter)
    else:
        snapshot = hub_directory(config.model)  # its name is that of a commit, which says all of the files
        if snapshot is None:
            raise ConfigError(f"kv_disk: got one with the model {config.model!r}, legal is one whose files are here")
        weights = snapshot.name + ("" if adapter is None else tensor_fingerprint(adapter))
    facts = (
        weights,
        config.quantization,
        config.hf_overrides,
        spec.kv_groups,
        spec.rope_lengths,
        config.page_size,
        version("longspan"),
        version("transformers"),
    )
    return hashlib.blake2b(msgspec.json.encode(facts), digest_size=16).digest()
