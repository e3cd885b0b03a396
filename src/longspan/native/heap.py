"""Setting of the C library that keeps the memory of a step's temporaries.

Holds that one setting. Must not know what is computed.
Read next: `longspan.worker.serve`, which sets it in our ranks.

By default glibc returns a freed large block to the operating system, and gets it back zeroed page by page, which takes
a quarter of the time of a prompt of 1,024 tokens. With this setting the same memory serves the next layer.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Values of malloc.h."""
LARGEST_KEPT = 32 << 20
"""Largest block in bytes that is not mapped by itself; glibc admits no larger value."""
MOST_KEPT = 64 << 20
"""Free bytes that a process keeps at the end of the heap: enough for the temporaries of one layer."""


def keep_freed_memory() -> bool:
    """Let this process reuse memory that it frees from now on; return whether the C library can do that."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(_M_TRIM_THRESHOLD, MOST_KEPT))
