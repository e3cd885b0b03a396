"""Life of a worker, a process of a rank: it introduces itself, works, and says why it cannot go on.

Holds the life of all workers, and of those on the driver's machine. Must not know schedulers, requests or models, and
imports torch only when link and heartbeat are in place.
Read next: `longspan.worker.serve`; `longspan.worker.fork_server`, the parent; `longspan.worker.remote`, workers
elsewhere.
"""

import os
import platform
import traceback
from pathlib import Path
from typing import Literal

from longspan.comm.connect import Meeting, local_meeting
from longspan.cpu_binding import cores_of
from longspan.errors import CommunicationError, ConfigError, LongspanError
from longspan.group.heartbeat import HeartbeatThread, ProcessProgress
from longspan.group.host_memory import memory_bytes
from longspan.group.messages import Failed, Hello, Start
from longspan.group.shape import GroupShape, ProcessId
from longspan.group.versions import own_versions
from longspan.group.worker_link import WorkerLink
from longspan.imports import quick_imports


def own_hello(number: int, world_size: int, address: str | None = None, master: str | None = None) -> Hello:
    """Make the introduction of this process.

    Args:
        number: of this process in the group.
        world_size: processes of the group.
        address: where processes on other hosts find this one; None where there are none.
        master: where this process looks for process 0; None where all are on one host.
    """
    host, pid, memory = platform.node(), os.getpid(), memory_bytes()[0]
    return Hello(number, world_size, host, pid, own_versions(), memory, address, master)


def last_words(process: ProcessId, error: Exception) -> Failed:
    """Make the message that says why this process cannot go on."""
    notes = " ".join(getattr(error, "__notes__", []))
    text = " ".join(str(error).split()) or "no message"
    reason = text if isinstance(error, LongspanError) else f"{type(error).__name__}: {text}"
    if isinstance(error, ConfigError):
        return Failed(process, reason, traceback.format_exc(), "user")
    blames: Literal["peer", "process"] = "peer" if isinstance(error, CommunicationError) else "process"
    return Failed(process, f"{reason} {notes}".strip(), traceback.format_exc(), blames)


def run(
    process: ProcessId, start: Start, link: WorkerLink, meeting: Meeting, num_threads: int, progress: ProcessProgress
) -> Failed | None:
    """Load, and run plans until told to stop; return None, or the failure after telling the driver."""
    failed = None
    try:
        with quick_imports(for_good=True):
            from longspan.worker.serve import serve

        serve(process, start, link, meeting, num_threads, progress)
    except Exception as error:
        failed = last_words(process, error)
        link.send(failed)
    link.close()
    return failed


def run_local(number: int, world_size: int, address: str) -> int:
    """Run a worker on the driver's machine until the driver ends the group; return the exit code.

    Args:
        number: number of this process.
        world_size: number of processes in the group.
        address: address of the driver's link.
    """
    hello, progress = own_hello(number, world_size), ProcessProgress()
    HeartbeatThread(hello, f"process {number}", progress, address, None, silence_limit_s=None).start()
    link = WorkerLink(address, None)
    start = link.introduce(hello, timeout_s=None)
    assert start.directory is not None, "processes of one machine meet in a directory"
    if (cores := cores_of(start.config.cpu_binding, number, world_size)) is not None:
        os.sched_setaffinity(0, cores)  # threads that start from now on inherit it
    process = GroupShape.of(start.config).process(number)
    failed = run(process, start, link, local_meeting(Path(start.directory)), start.config.num_threads, progress)
    return 0 if failed is None else 1
