"""Keeper of a directory of pages: which files there are, and that they do not take too many bytes.

Holds one thread of the driver, so that no step waits for a listing. Must not know requests, or ranks.
Read next: `longspan.kv.page_directory`, the files; `longspan.engine.page_tiers`, which asks.

Other engines may write to the directory, and remove from it, at any time. Every engine keeps the whole directory below
its own limit; a file that another has removed already is no error.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from longspan.kv.page_directory import ModelPages, PageKey, all_pages

LOOK_EVERY_S = 10.0
"""Seconds between two looks at the directory, for files that others have written or removed."""
LOW = 0.95
"""Share of the limit that files may take after some were removed."""


class DiskKeeper:
    """Keeps one directory. One thread calls its methods."""

    def __init__(self, directory: Path, pages: ModelPages, capacity: int) -> None:
        """Look at the directory, and start the thread.

        Args:
            directory: the whole directory.
            pages: the pages of this engine's model in it.
            capacity: most bytes of all files.
        """
        self._directory, self._pages, self._capacity = directory, pages, capacity
        self._seen: set[PageKey] = set()
        self._total = 0
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[tuple[set[PageKey], set[PageKey]]] = queue.SimpleQueue()
        self._look()
        self._thread = threading.Thread(target=self._run, name="longspan-disk", daemon=True)
        self._thread.start()

    def news(self) -> list[tuple[set[PageKey], set[PageKey]]]:
        """Pages of the model that have come, and those that have gone, since the last call."""
        found = []
        while not self._news.empty():
            found.append(self._news.get_nowait())
        return found

    def note_used(self, keys: Sequence[PageKey]) -> None:
        """Take down that pages were used now; the first one counts as used last."""
        self._calls.put(lambda: self._pages.touch(keys))

    def note_written(self, num_bytes: int) -> None:
        """Take down that the directory has grown."""
        self._calls.put(lambda: self._grow(num_bytes))

    def remove(self, keys: Sequence[PageKey]) -> None:
        """Remove pages."""
        self._calls.put(lambda: self._pages.remove(keys))

    def close(self) -> None:
        """Do what was asked for, and end the thread."""
        self._calls.put(None)
        self._thread.join(timeout=LOOK_EVERY_S)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                call = self._calls.get(timeout=LOOK_EVERY_S)
            except queue.Empty:
                self._look()
                continue
            if call is None:
                return
            call()

    def _grow(self, num_bytes: int) -> None:
        self._total += num_bytes
        if self._total > self._capacity:
            self._look()

    def _look(self) -> None:
        """See what there is, remove what was used longest ago if it is too much, and tell of the difference."""
        files = list(all_pages(self._directory))
        self._total = sum(file.num_bytes for file in files)
        if self._total > self._capacity:
            files.sort(key=lambda file: -file.used_ns)
            while files and self._total > LOW * self._capacity:
                oldest = files.pop()
                try:
                    oldest.path.unlink(missing_ok=True)
                except OSError:
                    files.append(oldest)
                    break  # nobody may remove anything here
                self._total -= oldest.num_bytes
        seen = {key for file in files if (key := self._pages.key(file.path)) is not None}
        if seen != self._seen:
            self._news.put((seen - self._seen, self._seen - seen))
            self._seen = seen
