"""How the C library keeps the memory of a step's temporaries.

Holds one setting. Must not know what is computed.
Read next: `longspan.worker.serve`, which sets it in our ranks.

glibc gives a large block back to the operating system when it is freed, and gets it again zeroed, page by page: a
quarter of the time of a prompt of 1,024 tokens. Kept, the same memory serves the next layer.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""As in malloc.h."""
LARGEST_KEPT = 32 << 20
"""Bytes of the largest block that is not mapped by itself; glibc takes no more."""
MOST_KEPT = 64 << 20
"""Bytes of free memory at the end of the heap that a process keeps; there lie the temporaries of one layer."""


def keep_freed_memory() -> bool:
    """Let this process reuse what it frees from now on. Returns whether the C library can do that."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(_M_TRIM_THRESHOLD, MOST_KEPT))
