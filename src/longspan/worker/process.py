"""A worker process: one rank that takes plans from a socket and answers.

Started by `longspan.engine.processes` as `python -m longspan.worker.process RANK INBOX OUTBOX`. Holds the loop and the
end of the process. Must not know schedulers or requests.
Read next: `longspan.worker.runner`.

A worker never outlives its driver: its standard input is a pipe that only the driver holds open, and a thread ends the
process when that pipe closes, whatever the process is doing. Ctrl-C reaches the whole process group of a terminal; the
driver alone decides what it means, so workers ignore it.
"""

import os
import signal
import sys
import threading
import traceback

import torch
import zmq

from longspan.comm.base import Communicator
from longspan.comm.distributed import DistributedCommunicator
from longspan.comm.threads import thread_group
from longspan.errors import ConfigError, LongspanError
from longspan.models.loader import quiet_transformers
from longspan.worker.build import build_runner, load_weights
from longspan.worker.messages import (
    Answer,
    Failed,
    Ready,
    RunPlan,
    Start,
    decode_to_worker,
    encode,
)


def _end_with_driver() -> None:
    """Block until the driver's end of standard input closes, then end the process at once."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def _join_group(rank: int, start: Start) -> Communicator:
    size, timeout_s = start.config.context_parallel_size, start.config.exchange_timeout_s
    if size == 1:
        return thread_group(1, timeout_s=timeout_s)[0]
    return DistributedCommunicator(rank, size, start.init_method, timeout_s=timeout_s)


def _serve(rank: int, inbox: "zmq.Socket[bytes]", outbox: "zmq.Socket[bytes]") -> None:
    """Start up, then run plans until told to stop."""
    start = decode_to_worker(inbox.recv())
    assert isinstance(start, Start)
    torch.set_num_threads(start.config.num_threads)
    model = load_weights(start, show_progress=rank == 0 and sys.stderr.isatty())
    runner = build_runner(start, model, _join_group(rank, start))
    outbox.send(encode(Ready(rank)))
    while isinstance(message := decode_to_worker(inbox.recv()), RunPlan):
        try:
            outbox.send(encode(Answer(runner.run(message.plan))))
        except Exception as error:
            error.add_note(f"in plan {message.plan.plan_id} ({message.plan.phase})")
            raise


def main() -> None:
    """Entry point of the process."""
    rank, inbox_address, outbox_address = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    quiet_transformers()
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.bind(inbox_address)
    outbox.connect(outbox_address)
    status = 0
    try:
        _serve(rank, inbox, outbox)
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", []))
        text = " ".join(str(error).split()) or "no message"
        reason = text if isinstance(error, LongspanError) else f"{type(error).__name__}: {text}"
        failed = Failed(rank, f"{reason} {notes}".strip(), traceback.format_exc(), isinstance(error, ConfigError))
        outbox.send(encode(failed))
        status = 1
    outbox.close(linger=2000)
    inbox.close(linger=0)
    context.term()
    # Not sys.exit: gloo's threads may still wait for a peer that is gone, and would keep the process alive.
    os._exit(status)


if __name__ == "__main__":
    main()
