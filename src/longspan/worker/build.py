"""Builds one rank's `ModelRunner` from its start message.

Holds the order of construction. Must not know whether the rank is a process or a thread.
Read next: `longspan.worker.runner`.
"""

import torch

from longspan.attention.select import make_backend
from longspan.comm.base import Communicator
from longspan.models.loader import load_model, resolve_dtype
from longspan.worker.messages import Start
from longspan.worker.runner import ModelRunner

DEVICE = torch.device("cpu")


def load_weights(start: Start, *, show_progress: bool) -> torch.nn.Module:
    """The model, with weights."""
    return load_model(start.config.model, resolve_dtype(start.config.dtype, DEVICE), show_progress=show_progress)


def build_runner(start: Start, model: torch.nn.Module, comm: Communicator) -> ModelRunner:
    """A rank that is ready for plans."""
    return ModelRunner(
        model,
        start.spec,
        num_pages=start.num_pages,
        page_size=start.config.page_size,
        comm=comm,
        backend=make_backend(start.config.attention_backend, DEVICE),
    )
