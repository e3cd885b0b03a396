"""Builds a `ModelRunner` from the driver's start message: for a process of a rank, or a thread that is one.

Holds the order of construction. Must not know which of the two it is.
Read next: `longspan.worker.runner`.
"""

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from longspan.attention.base import AttentionBackend
from longspan.comm.base import Communicator
from longspan.comm.checking import CheckingCommunicator
from longspan.comm.delaying import DelayingCommunicator
from longspan.group.heartbeat import ProcessProgress
from longspan.group.messages import Start
from longspan.group.shape import GroupShape, ProcessId
from longspan.models.loader import load_model, resolve_dtype
from longspan.models.speedups import ALWAYS, SPEEDUPS, speed_up_
from longspan.plan.types import Plan
from longspan.worker.device import check_memory, device_backend, process_device
from longspan.worker.fault import Injector
from longspan.worker.runner import GraphMode, ModelRunner


class DeviceTools(NamedTuple):
    """What a process computes on and with."""

    device: torch.device
    backend: AttentionBackend


def open_device(start: Start, process: ProcessId, *, ranks_on_device: int = 1, is_loaded: bool = False) -> DeviceTools:
    """A process's device and attention kernels, checked. The group's first process says which, if it is a GPU.

    Args:
        start: what the driver said.
        process: this one.
        ranks_on_device: how many ranks share the device, and one set of weights; more than one where they are threads.
        is_loaded: whether the weights are there.

    Raises:
        ConfigError: they are not there, or do not take the model, or memory is too small.
        LongspanError: the kernels are wrong on this GPU.
    """
    config, shape = start.config, GroupShape.of(start.config)
    device = process_device(config, shape, process, os.environ)
    num_pages = [pages * ranks_on_device for pages in start.num_pages]
    check_memory(start.spec, 0 if is_loaded else start.spec.weight_bytes, num_pages, config.page_size, device)
    backend = device_backend(config, start.spec, device)
    if device.type == "cuda" and shape.number(process) == 0:
        name = torch.cuda.get_device_name(device)
        print(f"longspan: attention backend {backend.name} on {name}", file=sys.stderr, flush=True)
    return DeviceTools(device, backend)


def load_weights(start: Start, device: torch.device, *, show_progress: bool) -> torch.nn.Module:
    """The model, with weights and speed-ups."""
    dtype = resolve_dtype(start.config.dtype, device)
    model = load_model(start.config.model, dtype, show_progress=show_progress, device=device)
    speed_up_(model, SPEEDUPS if start.config.compile_dense else ALWAYS)
    return model


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
    backend: AttentionBackend,
    dense_threads: Callable[[Plan, int], int] | None = None,
    *,
    progress: ProcessProgress | None = None,
    faults: Injector | None = None,
) -> ModelRunner:
    """A runner that is ready for plans. Arguments as `ModelRunner` takes them."""
    return ModelRunner(
        model,
        start.spec,
        num_pages=start.num_pages,
        page_size=start.config.page_size,
        comm=comm,
        backend=backend,
        dense_threads=dense_threads,
        graphs=_graph_mode(start, backend),
        progress=progress,
        faults=faults,
    )


def _graph_mode(start: Start, backend: AttentionBackend) -> GraphMode:
    """Fixed shapes need our kernels, and a capture ranks that do not wait for each other in Python."""
    config = start.config
    if config.cuda_graphs == "never" or backend.name not in ("triton", "flashinfer"):
        return "never"
    are_threads = config.executor == "threads" and config.context_parallel_size > 1
    return "captured" if config.device == "cuda" and not are_threads else "launched"
