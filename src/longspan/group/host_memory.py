"""Memory of this host, as far as a process may use it.

Holds the query. Must not know ranks, nor what the memory is for.
Read next: `longspan.engine.memory`, which divides it; `longspan.group.membership`, which checks what others have.
"""

import os
from pathlib import Path


def memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Return the bytes that this process may use, and those that are free now; file caches count as free."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        fields = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        free = fields["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        pass  # not Linux
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        inactive = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, KeyError, ValueError):
        return total, free  # no container, or one without a limit ("max")
    return min(total, limit), min(free, max(0, limit - used + int(inactive)))
