"""Work of a worker between its start and its end: load, join the group, run plans.

Holds the loop. Must not know schedulers or requests, or how the process starts and ends.
Read next: `longspan.worker.runner`.
"""

import os
import sys

import torch

from longspan.comm.checking import DamagingCommunicator
from longspan.comm.connect import Meeting
from longspan.errors import ConfigError
from longspan.group.heartbeat import ProcessProgress
from longspan.group.messages import (
    AdapterLoaded,
    Answer,
    Files,
    LoadAdapter,
    Measure,
    Measured,
    Ready,
    Refused,
    RunNext,
    RunPlan,
    Start,
    ToWorker,
    UnloadAdapter,
)
from longspan.group.plans import PlanReceiver
from longspan.group.shape import GroupShape, ProcessId
from longspan.group.worker_link import WorkerLink
from longspan.models.fingerprint import fingerprint, hub_directory, local_directory
from longspan.models.loader import quiet_transformers
from longspan.models.lora import check_lora
from longspan.models.tensor_part import Part
from longspan.native.heap import keep_freed_memory
from longspan.plan.moves import Move
from longspan.plan.types import is_draft_plan
from longspan.worker.build import (
    build_mover,
    build_runner,
    load_weights,
    open_device,
    peers_of,
    try_load,
    with_options,
)
from longspan.worker.fault import Injector, read_fault
from longspan.worker.join import join
from longspan.worker.measure import measure
from longspan.worker.page_mover import MovesDone, PageMover
from longspan.worker.runner import ModelRunner
from longspan.worker.thread_lending import borrowed_threads, lends


def serve(
    process: ProcessId, start: Start, link: WorkerLink, meeting: Meeting, num_threads: int, progress: ProcessProgress
) -> None:
    """Start up, then run plans until told to stop.

    Args:
        process: this process.
        start: the driver's start message.
        link: link to the driver.
        meeting: where the processes meet.
        num_threads: threads for computing.
        progress: counter of this process's progress.
    """
    quiet_transformers()
    torch.set_num_threads(num_threads)
    shape = GroupShape.of(start.config)
    is_first = shape.number(process) == 0
    tools = open_device(start, process)  # before anything that takes minutes
    draft_tools = None if start.draft is None else open_device(start.draft, process)
    adapter = None if start.config.merged_lora is None else check_lora(start.config.merged_lora)
    if (directory := local_directory(start.config.model)) is not None:  # before weights are read: that may take minutes
        link.send(Files(process, fingerprint(directory, adapter)))
    part = Part(process.tp_index, shape.processes_per_rank) if shape.processes_per_rank > 1 else None
    model = load_weights(start, tools.device, part, show_progress=is_first and sys.stderr.isatty(), tells=is_first)
    if directory is None and (directory := hub_directory(start.config.model)) is not None:
        link.send(Files(process, fingerprint(directory, adapter)))
    draft_model = None
    if start.draft is not None:
        draft_model = load_weights(start.draft, tools.device, show_progress=False, tells=is_first)
    # Other executors may have ranks on other machines, which cannot lend their threads.
    is_local = start.config.executor == "processes" and tools.device.type == "cpu" and part is None
    is_lent = is_local and start.config.cpu_binding == "none" and lends(num_threads, model, start.spec)
    fault = read_fault(os.environ, process, start.generation)
    cp, tp, sums = join(process, start, shape, meeting, tools.device, may_look=not is_lent)
    damaging = DamagingCommunicator(cp) if fault is not None and fault.kind == "corrupt" else None
    comm, faults = with_options(damaging or cp, start), Injector(fault, damaging)
    threads = borrowed_threads if is_lent else None
    peers = None if tp is None else peers_of(tp, sums, start)
    runner = build_runner(start, model, comm, tools.backend, threads, peers=peers, progress=progress, faults=faults)
    draft_runner = None
    if start.draft is not None and draft_model is not None and draft_tools is not None:
        draft_runner = build_runner(start.draft, draft_model, comm, draft_tools.backend, progress=progress)
    keep_freed_memory()  # after loading, whose freed memory goes back to the system
    faults.at_start()
    done = MovesDone()
    mover = build_mover(start, runner, done.put)
    link.send(Ready(process))
    _answer(process, runner, draft_runner, mover, done, link)


def _next_message(mover: PageMover | None, done: MovesDone, link: WorkerLink) -> ToWorker:
    """Wait for the driver's next message; meanwhile begin moves, and answer those that are done."""
    while True:
        for moved in done.take() if mover is not None else ():
            link.send(moved)
        message = link.receive() if mover is None else link.receive_or(done.bell)
        if isinstance(message, Move):
            assert mover is not None, "only ranks with tiers are told to move pages"
            mover.take(message)
        elif message is not None:
            return message


def _answer(
    process: ProcessId,
    runner: ModelRunner,
    draft_runner: ModelRunner | None,
    mover: PageMover | None,
    done: MovesDone,
    link: WorkerLink,
) -> None:
    """Follow the driver's messages until `Stop`, in all processes of a rank; the first process answers."""
    speaks, plans = process.speaks_for_rank, PlanReceiver(process.rank)
    orders = (RunPlan, RunNext, Measure, LoadAdapter, UnloadAdapter)
    while isinstance(message := _next_message(mover, done, link), orders):
        if isinstance(message, LoadAdapter):
            error = try_load(runner, message.adapter)
            link.send(AdapterLoaded(process, message.adapter.adapter_id, error))
            continue
        if isinstance(message, UnloadAdapter):
            runner.unload_adapter(message.adapter_id)
            continue
        if isinstance(message, Measure):
            measurement = measure(runner, message)
            if speaks:
                link.send(Measured(measurement))
            continue
        plan = plans.take(message)
        try:
            chosen = draft_runner if is_draft_plan(plan.plan_id) else runner
            assert chosen is not None, "only ranks with a draft model get its plans"
            result = chosen.run(plan)
        except Exception as failure:
            failure.add_note(f"in plan {plan.plan_id} ({plan.phase})")
            raise
        if speaks:
            link.send(Answer(result))
    runner.close()
    if isinstance(message, Refused):
        raise ConfigError(message.reason)
