"""Construction of a `ModelRunner` from the driver's start message, for a rank that is a process or a thread.

Holds the order of construction. Must not know which of the two the rank is.
Read next: `longspan.worker.runner`.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from longspan.attention.base import AttentionBackend
from longspan.comm.base import PROCESSES, Communicator
from longspan.comm.checking import CheckingCommunicator
from longspan.comm.delaying import DelayingCommunicator
from longspan.comm.peers import Peers
from longspan.comm.shared_sums import SharedSums
from longspan.errors import ConfigError
from longspan.group.heartbeat import ProcessProgress
from longspan.group.messages import Start
from longspan.group.shape import GroupShape, ProcessId
from longspan.kv.page_bytes import PageBytes
from longspan.kv.page_directory import ModelPages
from longspan.models.loader import load_model, resolve_dtype
from longspan.models.speedups import ALWAYS, SPEEDUPS, speed_up_
from longspan.models.tensor_parallel import connect_, cut_
from longspan.models.tensor_part import Part
from longspan.plan.fixed_shape import OWN_DECODE, has_fixed_steps, is_captured
from longspan.plan.moves import Moved
from longspan.plan.types import Plan
from longspan.types import Adapter, ModelSpec
from longspan.worker.device import check_memory, device_backend, process_device
from longspan.worker.fault import Injector
from longspan.worker.page_mover import PageMover
from longspan.worker.profile import PlanProfiler
from longspan.worker.runner import GraphMode, ModelRunner


class DeviceTools(NamedTuple):
    """Device and attention kernels of a process."""

    device: torch.device
    backend: AttentionBackend


def open_device(
    start: Start, process: ProcessId, *, processes_on_device: int = 1, is_loaded: bool = False
) -> DeviceTools:
    """Open and check a process's device and attention kernels. The group's first process logs a GPU's name.

    Args:
        start: the driver's start message.
        process: this process.
        processes_on_device: processes that share the device and its weights: all of them if ranks are threads, else 1.
        is_loaded: whether the weights are loaded already.

    Raises:
        ConfigError: there is no such device or kernel, the kernels do not take the model, or memory is too small.
        LongspanError: the kernels are wrong on this GPU.
    """
    config, shape = start.config, GroupShape.of(start.config)
    device = process_device(config, shape, process, os.environ)
    are_threads = processes_on_device > 1
    parts = shape.processes_per_rank if are_threads else 1
    here = start.num_pages if are_threads else start.num_pages[process.rank : process.rank + 1]
    num_pages = [parts * sum(of_group) for of_group in zip(*here, strict=True)]
    weight_bytes = 0 if is_loaded else parts * start.spec.weight_bytes
    check_memory(start.spec, weight_bytes, num_pages, config.page_size, device)
    backend = device_backend(config, start.spec, device)
    if device.type == "cuda" and (mode := _graph_mode(start, backend)) != "never":
        _check_fixed_steps(start.spec, device, mode)
    if device.type == "cuda" and shape.number(process) == 0:
        name = torch.cuda.get_device_name(device)
        print(f"longspan: attention backend {backend.name} on {name}", file=sys.stderr, flush=True)
    return DeviceTools(device, backend)


def _check_fixed_steps(spec: ModelSpec, device: torch.device, mode: GraphMode) -> None:
    from longspan.worker.first_steps import check_fixed_step  # imports Triton
    from longspan.worker.graphs import CUDAGraphs

    kinds = {(group, spec.attention_params(layer)) for group in spec.kv_groups for layer in group.layers}
    for group, params in kinds:
        check_fixed_step(group, params, device, CUDAGraphs() if mode == "captured" else None)


def load_weights(
    start: Start, device: torch.device, part: Part | None = None, *, show_progress: bool, tells: bool
) -> torch.nn.Module:
    """Load the model, with weights and speed-ups.

    Args:
        start: the driver's start message.
        device: device of the weights.
        part: which part of a model that a rank's processes share; None for all of it.
        show_progress: whether to draw a progress bar on standard error.
        tells: whether this process says on standard error what is left out.
    """
    model = load_model(
        start.config.model,
        resolve_dtype(start.config.dtype, device),
        show_progress=show_progress,
        device=device,
        quantization=start.config.quantization,
        lora=start.config.merged_lora,
        overrides=start.config.hf_overrides,
        tell=_tell if tells else _ignore,
        cut_=_ignore if part is None else lambda model: cut_(model, part, start.spec.kv_groups),
    )
    speed_up_(model, SPEEDUPS if start.config.compile_dense else ALWAYS)
    return model


def _tell(line: str) -> None:
    print(f"longspan: {line}", file=sys.stderr, flush=True)


def _ignore(_whatever: object) -> None:
    """Do nothing."""


def with_options(comm: Communicator, start: Start) -> Communicator:
    """Wrap the communicator to check messages or simulate slow links, if the user asked for it; rank 0 logs the latter.

    Args:
        comm: communicator to wrap.
        start: the driver's start message.
    """
    links = start.config.simulation
    if start.config.check_messages:
        comm = CheckingCommunicator(comm)
    if links is None:
        return comm
    if comm.rank == 0:
        print(f"longspan: simulating a slower network ({start.config.simulated_links})", file=sys.stderr, flush=True)
    return DelayingCommunicator(comm, links)


def peers_of(comm: Communicator, sums: SharedSums | None, start: Start) -> Peers:
    """Return the processes of a rank, whose messages are checked if the user asked for it; no slow link is simulated.

    Args:
        comm: communicator of the rank's processes.
        sums: their sums in shared memory, if there are any; not used where messages are checked.
        start: the driver's start message.
    """
    if start.config.check_messages:
        return Peers(CheckingCommunicator(comm, names=PROCESSES))
    return Peers(comm, sums)


def build_runner(
    start: Start,
    model: torch.nn.Module,
    comm: Communicator,
    backend: AttentionBackend,
    dense_threads: Callable[[Plan, int], int] | None = None,
    *,
    peers: Peers | None = None,
    progress: ProcessProgress | None = None,
    faults: Injector | None = None,
) -> ModelRunner:
    """Build a runner that is ready for plans. See `ModelRunner` for the arguments.

    Collective: all processes of a rank, if it has several.
    """
    if peers is not None:
        connect_(model, peers)
    runner = ModelRunner(
        model,
        start.spec,
        num_pages=start.num_pages[comm.rank],
        page_size=start.config.page_size,
        comm=comm,
        backend=backend,
        dense_threads=dense_threads,
        graphs=_graph_mode(start, backend),
        profiler=_profiler(start, comm, peers),
        peers=peers,
        progress=progress,
        faults=faults,
    )
    for adapter in start.adapters:
        runner.load_adapter(adapter)
    if runner.fixed is not None and runner.device.type == "cuda":
        from longspan.worker.first_steps import compile_kernels  # imports Triton

        compile_kernels(runner.pools, runner.layer_params, backend, start.config.max_num_seqs)
    return runner


def try_load(runner: ModelRunner, adapter: Adapter) -> str | None:
    """Load an adapter while plans come and go; return why it cannot be loaded, or None."""
    try:
        runner.load_adapter(adapter)
    except (ConfigError, MemoryError, RuntimeError) as error:  # torch has no error of its own for what has no room
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _profiler(start: Start, comm: Communicator, peers: Peers | None) -> PlanProfiler | None:
    """Recorder of a rank's plans, in its first process, if the user asked for one."""
    speaks = peers is None or peers.index == 0
    return None if start.config.profile is None or not speaks else PlanProfiler(start.config.profile, comm.rank)


def build_mover(start: Start, runner: ModelRunner, answer: Callable[[Moved], None]) -> PageMover | None:
    """Build what moves a rank's pages to and from tiers; None where there are none.

    Args:
        start: the driver's start message.
        runner: the rank's runner.
        answer: called with every answer to the driver, from any thread.
    """
    if not start.config.has_tiers:
        return None
    files = None
    if start.config.kv_disk is not None:
        assert start.kv_fingerprint is not None, "pages on disk have a fingerprint"
        files = ModelPages(Path(start.config.kv_disk).expanduser(), start.kv_fingerprint)
    return PageMover([PageBytes(pool.by_slot()) for pool in runner.pools], files, answer)


def _graph_mode(start: Start, backend: AttentionBackend) -> GraphMode:
    """How decode steps run, as the driver takes it to be; without Triton, in any shape."""
    if not has_fixed_steps(start.config, start.spec) or backend.name not in OWN_DECODE:
        return "never"
    return "captured" if is_captured(start.config) else "launched"
