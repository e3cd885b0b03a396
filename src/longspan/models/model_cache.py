"""Model directories that longspan makes itself, in the user's cache directory.

Holds where they lie, and the rule that a directory appears complete or not at all. Must not know what is in them.
Read next: `longspan.models.recall` and `longspan.models.gguf`, which make some.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from longspan.errors import ConfigError


def cache_path(name: str) -> Path:
    """Return the place of a directory of this name; on Linux, XDG_CACHE_HOME moves all of them."""
    return platformdirs.user_cache_path("longspan") / name


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Yield an empty directory whose files are at `path` afterwards, unless an exception ends it.

    Several processes may make the same directory at once. If it exists already, its files of the same names are
    replaced, one by one, and others stay.

    Args:
        path: the directory to make; its parents are created.

    Raises:
        ConfigError: the user's cache directory cannot be written.
        OSError: another parent cannot be written.
    """
    path = path.resolve()  # a link is followed, not replaced
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # beside it: a rename must not cross file systems
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    except OSError as error:
        if path.parent != cache_path(path.name).resolve().parent:
            raise
        raise ConfigError(
            f"model: its files are made on first use, in the cache directory {path.parent}, which cannot be written: "
            f"{error.strerror}; XDG_CACHE_HOME names another one"
        ) from error
    try:
        yield draft
        _publish(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _publish(draft: Path, path: Path) -> None:
    """Move a finished draft to its place. Readers of `path` never find half a file, nor miss a file."""
    try:
        draft.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        # Another process's directory is there: complete (it was faster), or with files deleted from it. Two makers of
        # one name write the same bytes, so replacing file by file is safe in both cases.
        for entry in draft.iterdir():
            os.replace(entry, path / entry.name)
