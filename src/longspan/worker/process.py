"""A worker process: one rank that takes plans from a socket and answers.

Started by `longspan.engine.processes` as `python -m longspan.worker.process RANK INBOX OUTBOX`. Holds the life and
death of the process. Must not know schedulers, requests or models, and imports torch only when all below is in place.
Read next: `longspan.worker.serve`.

A worker never outlives its driver: its standard input is a pipe that only the driver holds open, and a thread ends the
process when that pipe closes, whatever the process is doing. Ctrl-C reaches the whole process group of a terminal; the
driver alone decides what it means, so workers ignore it.
"""

import os
import select
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Literal

import zmq

from longspan.errors import CommunicationError, ConfigError, LongspanError
from longspan.worker.messages import Alive, Failed, encode

ALIVE_EVERY_S = 1.0
"""How often the driver hears that the process runs."""


def _watch_driver(rank: int, outbox_address: str) -> None:
    """Tell the driver every second that this process runs; end it when the driver is gone.

    The driver is gone when its end of standard input has closed. A process that the driver forked may hold that end
    open, so the parent's id is looked at too.
    """
    driver = os.getppid()
    outbox = zmq.Context().socket(zmq.PUSH)  # its own context: nobody ever waits for this thread
    outbox.connect(outbox_address)
    while os.getppid() == driver:
        readable, _, _ = select.select([0], [], [], ALIVE_EVERY_S)
        if readable and not os.read(0, 4096):
            break
        try:
            outbox.send(encode(Alive(rank)), flags=zmq.DONTWAIT)
        except zmq.Again:
            continue  # a driver that is stopped has enough of them already
    if outbox_address.startswith("ipc://"):  # the driver could not clean up, or has done so
        shutil.rmtree(Path(outbox_address.removeprefix("ipc://")).parent, ignore_errors=True)
    os._exit(1)


def _last_words(rank: int, error: Exception) -> Failed:
    """Why this rank cannot go on."""
    notes = " ".join(getattr(error, "__notes__", []))
    text = " ".join(str(error).split()) or "no message"
    reason = text if isinstance(error, LongspanError) else f"{type(error).__name__}: {text}"
    if isinstance(error, ConfigError):
        return Failed(rank, reason, traceback.format_exc(), "user")
    blames: Literal["peer", "rank"] = "peer" if isinstance(error, CommunicationError) else "rank"
    return Failed(rank, f"{reason} {notes}".strip(), traceback.format_exc(), blames)


def main() -> None:
    """Entry point of the process."""
    rank, inbox_address, outbox_address = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch_driver, args=(rank, outbox_address), daemon=True).start()
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.bind(inbox_address)
    outbox.connect(outbox_address)
    status = 0
    try:
        from longspan.worker.serve import serve

        serve(rank, inbox, outbox)
    except Exception as error:
        outbox.send(encode(_last_words(rank, error)))
        status = 1
    outbox.close(linger=2000)
    inbox.close(linger=0)
    context.term()
    # Not sys.exit: gloo's threads may still wait for a peer that is gone, and would keep the process alive.
    os._exit(status)


if __name__ == "__main__":
    main()
