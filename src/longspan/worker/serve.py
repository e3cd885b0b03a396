"""What a worker process does between its start and its end: load, join the group, run plans.

Holds the loop. Must not know schedulers or requests, or how the process lives and dies.
Read next: `longspan.worker.runner`.
"""

import sys
from pathlib import Path

import torch
import zmq

from longspan.comm.base import Communicator
from longspan.comm.local import LocalCommunicator
from longspan.comm.threads import thread_group
from longspan.models.loader import quiet_transformers
from longspan.worker.build import build_runner, load_weights, with_simulated_links
from longspan.worker.measure import measure
from longspan.worker.messages import Answer, Measure, Measured, Ready, RunPlan, Start, decode_to_worker, encode


def serve(rank: int, inbox: "zmq.Socket[bytes]", outbox: "zmq.Socket[bytes]") -> None:
    """Start up, then run plans until told to stop."""
    quiet_transformers()
    start = decode_to_worker(inbox.recv())
    assert isinstance(start, Start)
    torch.set_num_threads(start.config.num_threads)
    model = load_weights(start, show_progress=rank == 0 and sys.stderr.isatty())
    runner = build_runner(start, model, _join_group(rank, start))
    outbox.send(encode(Ready(rank)))
    while isinstance(message := decode_to_worker(inbox.recv()), (RunPlan, Measure)):
        if isinstance(message, Measure):
            outbox.send(encode(Measured(measure(runner, message))))
            continue
        try:
            outbox.send(encode(Answer(runner.run(message.plan))))
        except Exception as error:
            error.add_note(f"in plan {message.plan.plan_id} ({message.plan.phase})")
            raise


def _join_group(rank: int, start: Start) -> Communicator:
    size, timeout_s = start.config.context_parallel_size, start.config.exchange_timeout_s
    if size == 1:
        return thread_group(1, timeout_s=timeout_s)[0]
    directory = Path(start.directory)
    return with_simulated_links(LocalCommunicator(rank, size, directory, timeout_s=timeout_s), start, directory)
