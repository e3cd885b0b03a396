"""What control groups of Linux leave to this process: cores and memory, as containers and job schedulers set them.

Holds the search for this process's groups, versions 1 and 2, and their limits. Must not know ranks or pools.
Read next: `longspan.cpu_binding` (`num_cores`), `longspan.engine.memory`, which use it.

Note [Nested groups]
    A limit of a group holds for all groups inside it, so the least limit on the way from this process's group up to the
    top counts. Where the files of a group's parents are not mounted, as in most containers, the mount point is the top.

        /proc/self/cgroup      0::/user.slice/job.scope           version 2
                               4:cpu,cpuacct:/docker/1f0c         version 1, one line per hierarchy
        /proc/self/mountinfo   ... /docker/1f0c /sys/fs/cgroup/cpu,cpuacct ... - cgroup cgroup rw,cpu,cpuacct
                               the group /docker/1f0c is the mount point itself
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")

_NO_LIMIT_BYTES = 2**60
"""Bytes from which a limit of version 1 is none: the kernel writes the largest number of pages."""


class MemoryLimit(NamedTuple):
    """Limit of one group, in bytes."""

    total: int
    free: int
    """Bytes of the limit that are not used; file caches that nobody reads count as free."""


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return the cores' worth of time that this process may use, or None without a limit.

    Args:
        root: directory with `proc`, and the mount points that it names.
    """
    quotas = [quota for group in _groups(root, "cpu") if (quota := _quota(group)) is not None]
    return min(quotas, default=None)


def memory_limits(root: Path = ROOT) -> list[MemoryLimit]:
    """Return the memory limits that hold for this process, of its group and of all around it.

    Args:
        root: as for `cpu_quota`.
    """
    return [limit for group in _groups(root, "memory") if (limit := _memory(group)) is not None]


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the directories of this process's group and of its parents, of both versions."""
    try:
        own = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux, or /proc is hidden
        return
    for line in own:
        number, _, rest = line.partition(":")
        names, _, group = rest.partition(":")
        kind = "cgroup2" if number == "0" else "cgroup"
        if kind == "cgroup" and controller not in names.split(","):
            continue
        for mount in mounts:
            found = _mounted(mount, kind, controller)
            if found is not None:
                yield from _upwards(root / found[1].lstrip("/"), found[0], group)
                break


def _mounted(line: str, kind: str, controller: str) -> tuple[str, str] | None:
    """Return the group that a line of mountinfo mounts, and where; None for other file systems."""
    fields, _, rest = line.partition(" - ")
    words, about = fields.split(), rest.split()
    if len(words) < 5 or len(about) < 3 or about[0] != kind:
        return None
    if kind == "cgroup" and controller not in about[2].split(","):
        return None
    return words[3], words[4]


def _upwards(mount_point: Path, mounted: str, group: str) -> Iterator[Path]:
    """Yield a group's directory and those of its parents, up to the mount point."""
    inner = group.removeprefix(mounted.rstrip("/")) if f"{group}/".startswith(f"{mounted.rstrip('/')}/") else ""
    parts = [part for part in inner.split("/") if part not in ("", ".", "..")]
    for count in range(len(parts), -1, -1):
        yield mount_point.joinpath(*parts[:count])


def _number(path: Path) -> int | None:
    """Return the number in a file, or None if there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _quota(group: Path) -> float | None:
    try:
        limit, _, period = (group / "cpu.max").read_text().partition(" ")
        return int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        pass  # version 1, or "max"
    quota, length = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota / length if quota is not None and quota > 0 and length else None


def _memory(group: Path) -> MemoryLimit | None:
    version_2 = ("memory.max", "memory.current", "inactive_file")
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for limit_name, used_name, cache_name in (version_2, version_1):
        limit, used = _number(group / limit_name), _number(group / used_name)
        if limit is None or used is None or limit >= _NO_LIMIT_BYTES:
            continue
        try:
            lines = (group / "memory.stat").read_text().splitlines()
            cache = int(dict(line.split() for line in lines).get(cache_name, 0))
        except (OSError, ValueError):
            cache = 0
        return MemoryLimit(limit, max(0, limit - used + cache))
    return None
