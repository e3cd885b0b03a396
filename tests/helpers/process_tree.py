"""The processes that a driver has on this machine: the parent of its ranks, and the ranks."""

from pathlib import Path


def _status(pid):
    """Name, state and parent's id of a process; None if it is gone."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    except OSError:
        return None
    state, parent = rest.split()[:2]
    return name, state, int(parent)


def is_alive(pid):
    status = _status(pid)
    return status is not None and status[1] not in "ZX"


def children(pid):
    """Ids and names of the children of a process that are alive."""
    ids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    found = [(child, status) for child in ids if (status := _status(child)) is not None]
    return [(child, name) for child, (name, state, parent) in found if parent == pid and state not in "ZX"]


def parents_of_ranks(driver):
    """Ids of the processes that import for the ranks, and fork them."""
    found = []
    for child, _ in children(driver):
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # gone
        found += [child] * (b"longspan.worker.fork_server" in words)
    return found


def ranks(driver):
    """Ids of the processes of a driver's ranks, by rank."""
    prefix = "longspan-"
    found = [child for parent in parents_of_ranks(driver) for child in children(parent)]
    return [pid for pid, name in sorted(found, key=lambda one: one[1]) if name.startswith(prefix)]
