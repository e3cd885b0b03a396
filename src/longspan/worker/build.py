"""Builds one rank's `ModelRunner` from its start message.

Holds the order of construction. Must not know whether the rank is a process or a thread.
Read next: `longspan.worker.runner`.
"""

import sys
from collections.abc import Callable

import torch

from longspan.attention.select import make_backend
from longspan.comm.base import Communicator
from longspan.comm.checking import CheckingCommunicator
from longspan.comm.delaying import DelayingCommunicator
from longspan.models.loader import load_model, resolve_dtype
from longspan.plan.types import Plan
from longspan.worker.messages import Start
from longspan.worker.runner import ModelRunner

DEVICE = torch.device("cpu")


def load_weights(start: Start, *, show_progress: bool) -> torch.nn.Module:
    """The model, with weights."""
    return load_model(start.config.model, resolve_dtype(start.config.dtype, DEVICE), show_progress=show_progress)


def with_options(comm: Communicator, start: Start) -> Communicator:
    """The communicator, with checks, and slowed down, if the user asked for it; rank 0 says the latter.

    Args:
        comm: to be wrapped.
        start: what the driver said.
    """
    links = start.config.simulation
    if start.config.check_messages:
        comm = CheckingCommunicator(comm)
    if links is None:
        return comm
    if comm.rank == 0:
        print(f"longspan: simulating a slower network ({start.config.simulated_links})", file=sys.stderr, flush=True)
    return DelayingCommunicator(comm, links)


def build_runner(
    start: Start,
    model: torch.nn.Module,
    comm: Communicator,
    dense_threads: Callable[[Plan, int], int] | None = None,
) -> ModelRunner:
    """A rank that is ready for plans. Args: `dense_threads` as `ModelRunner` takes it."""
    return ModelRunner(
        model,
        start.spec,
        num_pages=start.num_pages,
        page_size=start.config.page_size,
        comm=comm,
        backend=make_backend(start.config.attention_backend, DEVICE),
        dense_threads=dense_threads,
    )
