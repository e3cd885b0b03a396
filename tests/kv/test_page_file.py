"""Files of pages: whole or not at all, damage is noticed, and nobody else may read them."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longspan.errors import ConfigError
from longspan.kv.page_directory import (
    DRAFT_S,
    MARK,
    ModelNote,
    ModelPages,
    PageKey,
    all_pages,
    check_ours,
    model_notes,
    open_directory,
)
from longspan.kv.page_file import DRAFT, HEADER, DamagedPageError, read_page, write_page

PAGE = bytes(random.Random(0).randbytes(1000))
KEY, OTHER, MODEL = b"k" * 16, b"o" * 16, b"m" * 16


def write(path: Path, page: bytes = PAGE) -> bytes:
    """Write a page; returns the file's bytes."""
    write_page(path, KEY, 1, MODEL, memoryview(page))
    return path.read_bytes()


def read(path: Path, key: bytes = KEY, pool_idx: int = 1, model: bytes = MODEL, num_bytes: int = len(PAGE)) -> bytes:
    page = bytearray(num_bytes)
    read_page(path, key, pool_idx, model, memoryview(page))
    return bytes(page)


def test_a_page_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "page"
    assert len(write(path)) == HEADER.size + len(PAGE)
    assert read(path) == PAGE
    write(path, PAGE[::-1])
    assert read(path) == PAGE[::-1]
    assert [file.name for file in tmp_path.iterdir()] == ["page"], "no draft is left"


@pytest.mark.parametrize("asked", [{"key": OTHER}, {"pool_idx": 0}, {"model": OTHER}, {"num_bytes": len(PAGE) - 1}])
def test_a_file_of_another_page_is_refused(tmp_path, asked):
    write(tmp_path / "page")
    with pytest.raises(DamagedPageError):
        read(tmp_path / "page", **asked)


def test_every_cut_and_thousands_of_damages_are_noticed(tmp_path):
    path, rng = tmp_path / "page", random.Random(1)
    whole = write(path)
    damaged = [whole[:end] for end in range(len(whole))] + [whole + b"0", whole * 2]
    for _ in range(1500):
        bad = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 30))):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(bad))
    for _ in range(500):  # as a disk without power leaves it: blocks of zeros
        bad, start = bytearray(whole), rng.randrange(len(whole))
        bad[start : start + 100] = bytes(len(bad[start : start + 100]))
        damaged.append(bytes(bad))
    for bad in damaged:
        if bad != whole:
            path.write_bytes(bad)
            with pytest.raises(DamagedPageError):
                read(path)
    path.write_bytes(whole)
    assert read(path) == PAGE


def test_who_writes_owns_files_and_directories_alone(tmp_path):
    old = os.umask(0)
    try:
        directory = tmp_path / "kv"
        open_directory(directory)
        pages = ModelPages(directory, MODEL)
        pages.note(ModelNote("name", "float32", 4, (1000,), 1))
        pages.write(PageKey(0, KEY), memoryview(PAGE))
    finally:
        os.umask(old)
    for path in [directory, *directory.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_pages_are_listed_used_and_removed(tmp_path):
    open_directory(tmp_path)
    pages, others = ModelPages(tmp_path, MODEL), ModelPages(tmp_path, OTHER)
    keys = [PageKey(pool_idx, bytes([i] * 16)) for pool_idx in (0, 1) for i in range(3)]
    for key in keys:
        assert pages.write(key, memoryview(PAGE)) == HEADER.size + len(PAGE)
    others.write(keys[0], memoryview(PAGE))
    pages.note(ModelNote("name", "int8", 4, (1000, 1000), 2))
    found = list(all_pages(tmp_path))
    assert sorted(key for f in found if (key := pages.key(f.path)) is not None) == keys
    assert [key for f in found if (key := others.key(f.path)) is not None] == [keys[0]]
    assert {f.num_bytes for f in found} == {HEADER.size + len(PAGE)}
    pages.touch(keys)
    used = {pages.key(f.path): f.used_ns for f in all_pages(tmp_path) if pages.key(f.path)}
    assert sorted(keys, key=lambda key: -used[key]) == keys, "the first one counts as used last"
    pages.remove([keys[0], keys[0]])
    assert len(list(all_pages(tmp_path))) == 6
    notes = model_notes(tmp_path)
    assert notes[MODEL.hex()].model == "name"
    assert notes[OTHER.hex()] is None


def test_drafts_of_processes_that_died_are_removed_in_time(tmp_path):
    pages = ModelPages(tmp_path, MODEL)
    assert pages.write(PageKey(0, KEY), memoryview(PAGE))
    new, old = (pages.path(PageKey(0, KEY)).with_name(name + DRAFT) for name in ("new", "old"))
    for draft in (new, old):
        draft.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * DRAFT_S,) * 2)
    assert len(list(all_pages(tmp_path))) == 1
    assert new.exists()
    assert not old.exists()


def test_rejects_directories_that_are_not_ours(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("")
    with pytest.raises(ConfigError, match=r"kv_disk: got .*file.*, legal is a directory"):
        open_directory(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"kv_disk: got .*home.*, which holds other files"):
        open_directory(tmp_path / "home")
    with pytest.raises(ConfigError, match=r"directory: got .*home.*, legal is a directory that --kv-disk made"):
        check_ours(tmp_path / "home", "directory")
    open_directory(tmp_path / "kv")
    open_directory(tmp_path / "kv")
    (tmp_path / "kv" / MARK).write_text('{"format": 99}')
    with pytest.raises(ConfigError, match="of format 99, legal is one of format 1"):
        open_directory(tmp_path / "kv")


_WRITER = """
import random, sys
from pathlib import Path
from longspan.kv.page_directory import ModelPages, PageKey
pages, rng = ModelPages(Path(sys.argv[1]), b"m" * 16), random.Random(sys.argv[2])
print("begun", flush=True)
while True:
    key = bytes([rng.randrange(4)] * 16)
    pages.write(PageKey(0, key), memoryview(random.Random(key).randbytes(300_000)))
"""


@pytest.mark.processes
def test_a_writer_that_is_killed_leaves_whole_pages_only(tmp_path):
    """Two processes write the same pages, and are killed at some moment, again and again."""
    rng, num_read = random.Random(2), 0
    pages = ModelPages(tmp_path, MODEL)
    for turn in range(8):
        writers = [
            subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), f"{turn} {i}"], stdout=subprocess.PIPE)
            for i in range(2)
        ]
        for writer in writers:
            assert writer.stdout.readline() == b"begun\n"
        time.sleep(rng.uniform(0.0, 0.05))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            writer.stdout.close()
        for i in range(4):
            key, page = bytes([i] * 16), bytearray(300_000)
            if pages.path(PageKey(0, key)).exists():
                pages.read(PageKey(0, key), memoryview(page))
                assert page == random.Random(key).randbytes(300_000)
                num_read += 1
    assert num_read
