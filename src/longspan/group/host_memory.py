"""Memory of this host, as far as a process may use it.

Holds the query. Must not know ranks, nor what the memory is for.
Read next: `longspan.engine.memory`, which divides it; `longspan.group.membership`, which checks what others have.
"""

import os
from pathlib import Path

from longspan.cgroups import ROOT, memory_limits


def memory_bytes(root: Path = ROOT) -> tuple[int, int]:
    """Return the bytes that this process may use, and those that are free now; file caches count as free."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        free = fields["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        pass  # not Linux
    limits = memory_limits(root)
    return min([total, *(limit.total for limit in limits)]), min([free, *(limit.free for limit in limits)])
