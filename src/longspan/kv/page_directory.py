"""Directory of pages on a disk: files of any number of models, which any number of engines may write and read.

Holds names, listing and removal of files. Must not know tensors, requests, or which pages are wanted.
Read next: `longspan.kv.page_file`, one file; `longspan.engine.disk_keeper`, which keeps a directory small;
`longspan.cli.cache`, which shows one.

    DIR/longspan-kv.json                       says that the directory is ours, and its version
    DIR/<fingerprint>/model.json               what the pages are of
    DIR/<fingerprint>/<pool>/<xx>/<hash>       one page; xx are the first two digits of its hash

A page's hash covers its tokens and all before them (`longspan.kv.prefix`), so equal names mean equal pages, whoever
wrote them. Ranks, placements and processes are nowhere. A file's time of modification is that of its last use.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from longspan.errors import ConfigError
from longspan.kv.page_file import DRAFT, read_page, write_page

MARK = "longspan-kv.json"
"""File that says that a directory is one of ours."""
MODEL = "model.json"
FORMAT = 1
"""Version of a directory's names."""
DRAFT_S = 600.0
"""Age in seconds from which a file that was never completed is removed."""


class PageKey(NamedTuple):
    """Name of a page of one model."""

    pool_idx: int
    """KV group; behind the groups the states of recurrent layers."""
    page_hash: bytes


class ModelNote(msgspec.Struct, frozen=True):
    """What the pages of one fingerprint are of."""

    model: str
    """As the user named it."""
    kv_dtype: str
    page_size: int
    """Tokens per page."""
    pool_page_bytes: tuple[int, ...]
    """Bytes of a page per pool."""
    num_groups: int
    """Pools that are KV groups."""


class _Mark(msgspec.Struct, frozen=True):
    format: int


class FoundPage(NamedTuple):
    """File of a page."""

    path: Path
    num_bytes: int
    used_ns: int
    """When it was used last, in nanoseconds since 1970."""


class ModelPages:
    """Pages of one model in a directory."""

    def __init__(self, directory: Path, fingerprint: bytes) -> None:
        """Name the pages; nothing is read or written.

        Args:
            directory: the whole directory.
            fingerprint: all that KV depends on beside tokens, 16 bytes.
        """
        self.root, self.fingerprint = directory / fingerprint.hex(), fingerprint
        self._made: set[Path] = set()

    def path(self, key: PageKey) -> Path:
        """File of a page."""
        name = key.page_hash.hex()
        return self.root / str(key.pool_idx) / name[:2] / name

    def key(self, path: Path) -> PageKey | None:
        """Page of a file; None for a file of another kind, or of another model."""
        parts = path.parts[len(self.root.parts) :]
        if path.parts[: len(self.root.parts)] != self.root.parts or len(parts) != 3 or not parts[0].isdecimal():
            return None
        try:
            page_hash = bytes.fromhex(parts[2])
        except ValueError:
            return None
        return PageKey(int(parts[0]), page_hash) if len(page_hash) == 16 else None

    def write(self, key: PageKey, page: memoryview) -> int:
        """Write a page; return the bytes of its file. Raises: as `write_page`."""
        path = self.path(key)
        if path.parent not in self._made:
            for directory in (self.root, path.parent.parent, path.parent):  # `parents=True` would ignore the mode
                directory.mkdir(mode=0o700, exist_ok=True)
            self._made.add(path.parent)
        return write_page(path, key.page_hash, key.pool_idx, self.fingerprint, page)

    def read(self, key: PageKey, page: memoryview) -> None:
        """Read a page into memory of its size. Raises: as `read_page`."""
        read_page(self.path(key), key.page_hash, key.pool_idx, self.fingerprint, page)

    def remove(self, keys: Iterable[PageKey]) -> None:
        """Remove pages, as far as they are there and can be removed."""
        for key in keys:
            with contextlib.suppress(OSError):
                self.path(key).unlink()

    def touch(self, keys: Iterable[PageKey]) -> None:
        """Take down that pages were used now, the last one first: the first one counts as used last."""
        keys = list(keys)
        now = time.time_ns()
        for i, key in enumerate(keys):
            with contextlib.suppress(OSError):
                os.utime(self.path(key), ns=(now - 1000 * i, now - 1000 * i))

    def note(self, note: ModelNote) -> None:
        """Write what the pages are of, once.

        Raises:
            OSError: the directory cannot be written.
        """
        path = self.root / MODEL
        if not path.exists():
            self.root.mkdir(mode=0o700, exist_ok=True)
            _write(path, msgspec.json.encode(note))


def open_directory(directory: Path, field: str = "kv_disk") -> None:
    """Make a directory ours, or see that it is.

    Args:
        directory: one that is ours, is empty, or does not exist.
        field: the option that names it.

    Raises:
        ConfigError: it is a file, cannot be written, or holds something else.
    """
    legal = "a directory that can be written, empty or from earlier runs"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_ours = (directory / MARK).exists()
        if not is_ours and any(True for _ in os.scandir(directory)):
            raise ConfigError(f"{field}: got {str(directory)!r}, which holds other files, legal is {legal}")
        if not is_ours:
            _write(directory / MARK, msgspec.json.encode(_Mark(FORMAT)))
        draft = directory / f"{os.getpid()}-{time.monotonic_ns()}{DRAFT}"
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        draft.unlink()
    except OSError as error:
        raise ConfigError(f"{field}: got {str(directory)!r}, legal is {legal}: {error.strerror}") from error
    check_ours(directory, field)


def check_ours(directory: Path, field: str) -> None:
    """Refuse a directory that is not ours, or of another format.

    Raises:
        ConfigError: it is none of ours.
    """
    try:
        mark = msgspec.json.decode((directory / MARK).read_bytes(), type=_Mark)
    except (OSError, msgspec.DecodeError) as error:
        legal = f"a directory that --kv-disk made, with a file {MARK}"
        raise ConfigError(f"{field}: got {str(directory)!r}, legal is {legal}") from error
    if mark.format != FORMAT:
        legal = f"one of format {FORMAT}"
        raise ConfigError(f"{field}: got {str(directory)!r} of format {mark.format}, legal is {legal}, or an empty one")


def all_pages(directory: Path) -> Iterator[FoundPage]:
    """Files of all models, in no order; files that were begun long ago and not completed are removed."""
    oldest = time.time() - DRAFT_S
    for root in _entries(directory):
        for pool in _entries(root.path):
            for part in _entries(pool.path):
                for file in _entries(part.path):
                    try:
                        stat = file.stat()
                        if file.name.endswith(DRAFT):
                            if stat.st_mtime < oldest:
                                os.unlink(file.path)
                            continue
                    except OSError:
                        continue  # somebody has removed it
                    yield FoundPage(Path(file.path), stat.st_size, stat.st_mtime_ns)


def model_notes(directory: Path) -> dict[str, ModelNote | None]:
    """What each fingerprint's pages are of, by its digits; None where the note cannot be read."""
    found: dict[str, ModelNote | None] = {}
    for root in _entries(directory):
        if not root.is_dir():
            continue
        try:
            found[root.name] = msgspec.json.decode((Path(root.path) / MODEL).read_bytes(), type=ModelNote)
        except (OSError, msgspec.DecodeError):
            found[root.name] = None
    return found


def _entries(directory: str | Path) -> list["os.DirEntry[str]"]:
    """Entries of a directory; none if it is a file, or gone."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError:
        return []


def _write(path: Path, data: bytes) -> None:
    """Write a small file for its owner alone, whole or not at all."""
    draft = path.with_name(f"{path.name}.{os.getpid()}{DRAFT}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
    os.replace(draft, path)
