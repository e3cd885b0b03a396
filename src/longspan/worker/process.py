"""A worker process on the driver's machine.

Started by `longspan.engine.processes` as `python -m longspan.worker.process RANK SIZE DRIVER`. Holds the life and death
of a worker, wherever it runs. Must not know schedulers, requests or models, and imports torch only when all below is in
place.
Read next: `longspan.worker.serve`; `longspan.worker.remote`, workers elsewhere.

Ctrl-C reaches the whole process group of a terminal; the driver alone decides what it means, so workers ignore it.
"""

import os
import platform
import signal
import sys
import traceback
from pathlib import Path
from typing import Literal, NoReturn

from longspan.comm.connect import Meeting, local_meeting
from longspan.errors import CommunicationError, ConfigError, LongspanError
from longspan.worker.link import WorkerLink
from longspan.worker.messages import Failed, Hello, Start
from longspan.worker.pulse import PulseThread
from longspan.worker.versions import own_versions


def hello(rank: int, world_size: int) -> Hello:
    """How this process introduces itself."""
    return Hello(rank, world_size, platform.node(), os.getpid(), own_versions())


def last_words(rank: int, error: Exception) -> Failed:
    """Why this rank cannot go on."""
    notes = " ".join(getattr(error, "__notes__", []))
    text = " ".join(str(error).split()) or "no message"
    reason = text if isinstance(error, LongspanError) else f"{type(error).__name__}: {text}"
    if isinstance(error, ConfigError):
        return Failed(rank, reason, traceback.format_exc(), "user")
    blames: Literal["peer", "rank"] = "peer" if isinstance(error, CommunicationError) else "rank"
    return Failed(rank, f"{reason} {notes}".strip(), traceback.format_exc(), blames)


def run(rank: int, start: Start, link: WorkerLink, meeting: Meeting, num_threads: int) -> Failed | None:
    """Load, and run plans until told to stop. Returns why not, after telling the driver; None if all went well."""
    failed = None
    try:
        from longspan.worker.serve import serve

        serve(rank, start, link, meeting, num_threads)
    except Exception as error:
        failed = last_words(rank, error)
        link.send(failed)
    link.close()
    return failed


def main() -> NoReturn:
    """Entry point of the process."""
    rank, size, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    PulseThread(rank, address, None, silence_limit_s=None).start()
    link = WorkerLink(address, None)
    start = link.introduce(hello(rank, size), timeout_s=None)
    assert start.directory is not None, "ranks of one machine meet in a directory"
    failed = run(rank, start, link, local_meeting(Path(start.directory)), start.config.num_threads)
    # Not sys.exit: gloo's threads may still wait for a peer that is gone, and would keep the process alive.
    os._exit(0 if failed is None else 1)


if __name__ == "__main__":
    main()
