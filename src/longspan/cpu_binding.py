"""Cores of each worker process: legal values of the option `cpu_binding`, and who gets which.

Holds the option's meaning. Must not know ranks, or what threads compute.
Read next: `longspan.worker.process`, which binds itself; docs/performance.md.

Note [Neighbouring cores]
    Processes get cores that are next to each other in the machine: all of one NUMA node before those of the next, both
    hardware threads of a core together. So a process reads the memory of its own node. No core is of two processes:
    bound ones count on having theirs alone, when they look for messages and when they measure themselves.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from longspan.cgroups import ROOT, cpu_quota
from longspan.errors import ConfigError

FIELD = "cpu_binding"
_LEGAL = "none, auto, or for each process a list of cores such as 0-3|4-7"


def parse_cpu_binding(text: str, num_processes: int) -> tuple[frozenset[int], ...] | None:
    """Cores of each process that a list names; None for `none` and `auto`.

    Args:
        text: the option's value.
        num_processes: processes of all ranks.

    Raises:
        ConfigError: the text is no list of cores, does not name cores for every process, or names one twice.
    """
    if text in ("none", "auto"):
        return None
    found = [_cores(text, part) for part in text.split("|")]
    if len(found) != num_processes:
        count = f"{len(found)} lists" if len(found) > 1 else "one list"
        raise ConfigError(f"{FIELD}: got {count} in {text!r}, legal are {num_processes}, one for each process")
    counts = Counter(chain(*found))
    shared = min((core for core, count in counts.items() if count > 1), default=None)
    if shared is not None:
        raise ConfigError(f"{FIELD}: got core {shared} twice in {text!r}, legal are lists without a common core")
    return tuple(found)


def with_processes(text: str, num_processes: int) -> str:
    """The option's value for fewer processes, the first ones of those before."""
    return "|".join(text.split("|")[:num_processes])


def check_cores(text: str, num_processes: int) -> None:
    """Refuse cores that this process may not use, or fewer than there are processes.

    Raises:
        ConfigError: a list names one, or there are too few to share them out.
    """
    allowed = allowed_cores()
    if text == "auto" and len(allowed) < num_processes:
        raise ConfigError(
            f"{FIELD}: got 'auto' for {num_processes} processes on {len(allowed)} cores, legal there is none"
        )
    missing = sorted(set().union(*(parse_cpu_binding(text, num_processes) or ())) - set(allowed))
    if missing:
        raise ConfigError(
            f"{FIELD}: got core {missing[0]} in {text!r}, legal are the cores that this process may use: "
            + ", ".join(map(str, allowed))
        )


def cores_of(text: str, number: int, num_processes: int, root: Path = ROOT) -> frozenset[int] | None:
    """Cores that one process binds itself to; None for none.

    Args:
        text: the option's value, which has been checked.
        number: of the process.
        num_processes: processes on this host.
        root: directory with `sys`.
    """
    if text == "none":
        return None
    listed = None if text == "auto" else [_cores(text, part) for part in text.split("|")]
    if listed is not None:
        return listed[number]
    cores = _by_place(allowed_cores(), root)
    first, end = (len(cores) * i // num_processes for i in (number, number + 1))
    return frozenset(cores[first:end])


def allowed_cores() -> list[int]:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def num_cores() -> int:
    """Cores that this process may run on; at most as many whole ones as its quota of time is worth, but one."""
    cores = len(allowed_cores())
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _cores(text: str, part: str) -> frozenset[int]:
    """Cores of a list such as `0-3,8`."""
    found: set[int] = set()
    for entry in part.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", entry)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"{FIELD}: got {text!r}, legal is {_LEGAL}")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)


def _by_place(cores: Sequence[int], root: Path) -> list[int]:
    """Cores in the order of their NUMA nodes and, there, of the physical cores that they are threads of."""
    nodes: dict[int, int] = {}
    for path in sorted((root / "sys/devices/system/node").glob("node[0-9]*/cpulist")):
        text = path.read_text().strip()
        node = int(path.parent.name.removeprefix("node"))
        nodes |= dict.fromkeys(_cores(text, text), node) if text else {}

    def place(core: int) -> tuple[int, int, int]:
        directory = root / f"sys/devices/system/cpu/cpu{core}/topology"
        try:
            physical = int((directory / "core_id").read_text())
        except (OSError, ValueError):
            physical = core
        return nodes.get(core, 0), physical, core

    return sorted(cores, key=place)
