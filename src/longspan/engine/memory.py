"""How much memory ranks on this machine may take for KV.

Holds the look at the machine. Must not know models or pages.
Read next: `longspan.sharding.capacity`, which cuts the memory into pages.
"""

import os
from pathlib import Path

from longspan.errors import ConfigError

DEFAULT_KV_CACHE_MEMORY = 4 * 2**30


def kv_cache_memory(asked: int | None, num_ranks: int) -> int:
    """Bytes of one rank: what was asked for, or 4 GiB, or an equal share of half the memory that is free now.

    Raises:
        ConfigError: all ranks together would take more than the machine has.
    """
    total, free = _memory_bytes()
    if asked is None:
        return min(DEFAULT_KV_CACHE_MEMORY, free // 2 // num_ranks)
    if asked * num_ranks > total:
        raise ConfigError(
            f"kv_cache_memory: got {asked} bytes per rank, legal is at most {total // num_ranks}: {num_ranks} "
            f"rank{'s' * (num_ranks > 1)} share this machine's {total} bytes"
        )
    return asked


def _memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """All memory that this process may use, and what is free of it now; memory that only caches files is free."""
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
