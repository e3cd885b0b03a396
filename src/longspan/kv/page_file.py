"""One page of KV in a file: written whole or not at all, and noticed if it is damaged.

Holds the format of a file. Must not know tensors, where files lie, or which pages there are.
Read next: `longspan.kv.page_directory`, where files lie; `longspan.kv.page_bytes`, what a page's bytes are.

    header   magic, version, key of the page, fingerprint of the model, number of bytes, checksum   HEADER.size bytes
    bytes    the page as its pool stores it

The checksum (CRC-32) covers the header's other fields and the bytes. A file is written under another name and renamed
when it is complete, so that who reads it never sees a part of it; a part that an operating system left behind after a
crash has too few bytes or another checksum.
"""

import os
import secrets
import struct
import zlib
from pathlib import Path

from longspan.errors import LongspanError

HEADER = struct.Struct("<8sII16s16sQI")
MAGIC, VERSION = b"longspan", 1
DRAFT = ".draft"
"""End of the name of a file that is being written."""


class DamagedPageError(LongspanError):
    """A file does not hold the page that its name promises."""


def write_page(path: Path, key: bytes, pool_idx: int, fingerprint: bytes, page: memoryview) -> int:
    """Write a page for its owner alone, in place of an earlier file.

    Args:
        path: the file, in a directory that exists.
        key: hash of the page, 16 bytes.
        pool_idx: pool that the page is of.
        fingerprint: of the model, 16 bytes.
        page: its bytes.

    Returns:
        Bytes of the file.

    Raises:
        OSError: the disk is full, or the directory cannot be written.
    """
    draft = path.with_name(secrets.token_hex(8) + DRAFT)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            parts: list[memoryview] = [memoryview(_header(key, pool_idx, fingerprint, page)), page]
            while parts:
                written = os.writev(descriptor, parts)
                while parts and written >= parts[0].nbytes:
                    written -= parts.pop(0).nbytes
                if parts:
                    parts[0] = parts[0][written:]
        finally:
            os.close(descriptor)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return HEADER.size + page.nbytes


def read_page(path: Path, key: bytes, pool_idx: int, fingerprint: bytes, page: memoryview) -> None:
    """Read a page into memory of its size; what the memory holds after an error is not defined.

    Args:
        path: the file.
        key: hash of the page, 16 bytes.
        pool_idx: pool that the page is of.
        fingerprint: of the model, 16 bytes.
        page: memory for exactly the page's bytes.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DamagedPageError: the file is not of this page, was cut, or has other bytes than were written.
    """
    header = bytearray(HEADER.size)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if os.fstat(descriptor).st_size != HEADER.size + page.nbytes:
            raise DamagedPageError(f"{path.name}: the file has another length than the page")
        parts = [memoryview(header), page]
        while parts:
            count = os.readv(descriptor, parts)
            if not count:
                raise DamagedPageError(f"{path.name}: the file has become shorter")
            while parts and count >= parts[0].nbytes:
                count -= parts.pop(0).nbytes
            if parts:
                parts[0] = parts[0][count:]
    finally:
        os.close(descriptor)
    if bytes(header) != _header(key, pool_idx, fingerprint, page):
        raise DamagedPageError(f"{path.name}: the checksum or another field of the header is wrong")


def _header(key: bytes, pool_idx: int, fingerprint: bytes, page: memoryview) -> bytes:
    fields = (MAGIC, VERSION, pool_idx, key, fingerprint, page.nbytes)
    return HEADER.pack(*fields, zlib.crc32(page, zlib.crc32(HEADER.pack(*fields, 0))))
