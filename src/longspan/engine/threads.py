"""Ranks as threads of this process, sharing one set of weights: for tests, debugging, and one rank without a process.

Holds threads and queues. Must not know schedulers or requests.
Read next: `longspan.engine.workers`, the executor whose ranks are processes.
"""

import platform
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from longspan.attention.base import AttentionBackend
from longspan.comm.base import PROCESSES
from longspan.comm.shared_sums import shared_by_threads
from longspan.comm.threads import thread_group
from longspan.costmodel.measured import RankMeasurement
from longspan.engine.executor import PendingAdapters, PendingMoves, PendingPlans
from longspan.errors import ConfigError, LongspanError, WorkerError
from longspan.group.messages import Measure, Start, UnloadAdapter
from longspan.group.plans import PlanReceiver, PlanSender
from longspan.group.shape import GroupShape, ProcessId, speaker
from longspan.models.loader import load_model, resolve_dtype
from longspan.models.speedups import COMPILED, speed_up_, speedups_of
from longspan.models.tensor_parallel import copy_of, cut_
from longspan.models.tensor_part import Part
from longspan.plan.moves import Move, Moved
from longspan.plan.types import Plan, PlanResult, is_draft_plan
from longspan.types import Adapter
from longspan.worker.build import (
    build_mover,
    build_runner,
    load_weights,
    open_device,
    peers_of,
    try_load,
    with_options,
)
from longspan.worker.measure import measure
from longspan.worker.runner import ModelRunner

_Order = Plan | Move | Adapter | UnloadAdapter | None
"""What a rank's thread is told; an adapter is to be loaded, None ends it."""


class ThreadExecutor:
    """Executor with one thread per rank. `threads_per_rank` sets the compute threads of the whole process.

    Where processes would share a rank's weights, each of them is a thread with its own part.
    """

    def __init__(self, start: Start, model: torch.nn.Module | None = None) -> None:
        """Load the model (or take one that is loaded) and start the ranks."""
        torch.set_num_threads(start.config.num_threads)
        shape = GroupShape.of(start.config)
        tools = open_device(start, speaker(0), processes_on_device=shape.world_size, is_loaded=model is not None)
        if model is None:
            model = _load(start, shape, tools.device)
        elif start.config.compile_dense:
            speed_up_(model, [COMPILED])
        self._pending, self._moves, self._stop_s = PendingPlans(), PendingMoves(), start.config.stop_s
        self._adapters = PendingAdapters(shape.world_size)
        self._sender, self._receivers = PlanSender(), [PlanReceiver(rank) for rank in range(shape.num_ranks)]
        self._inboxes: list[queue.SimpleQueue[_Order]] = []
        self._threads: list[threading.Thread] = []
        self._shape = shape
        self.runners = _build_runners(start, shape, model, tools.backend)
        """One runner per process, in the order of their numbers."""
        self._draft_runners = _build_draft_runners(start, self.runners, tools.device)
        self._movers = [build_mover(start, runner, self._moves.answer) for runner in self.runners]
        for process, runner in zip(shape.processes, self.runners, strict=True):
            inbox: queue.SimpleQueue[_Order] = queue.SimpleQueue()
            name = f"longspan-{shape.name(process).replace(' ', '-')}"
            thread = threading.Thread(target=self._serve, args=(process, runner, inbox), name=name, daemon=True)
            self._inboxes.append(inbox)
            self._threads.append(thread)
            thread.start()

    def _serve(self, process: ProcessId, runner: ModelRunner, inbox: "queue.SimpleQueue[_Order]") -> None:
        who = self._shape.name(process)
        while (plan := inbox.get()) is not None:
            if isinstance(plan, Move):
                mover = self._movers[self._shape.number(process)]
                assert mover is not None, "only ranks with tiers are told to move pages"
                mover.take(plan)
                continue
            if isinstance(plan, Adapter):
                self._adapters.answer(plan.adapter_id, try_load(runner, plan))
                continue
            if isinstance(plan, UnloadAdapter):
                runner.unload_adapter(plan.adapter_id)
                continue
            try:
                result = self._runner_of(plan, process, runner).run(plan)
                if process.speaks_for_rank:
                    self._pending.answer(result)
            except LongspanError as error:
                error.add_note(f"{who}, plan {plan.plan_id} ({plan.phase})")
                self._fail(error)
                return
            except Exception as error:
                text = f"{type(error).__name__}: {error} in plan {plan.plan_id} ({plan.phase})"
                failure = WorkerError(f"{who}: {text}")
                failure.__cause__ = error
                self._fail(failure)
                return
        runner.close()

    def _runner_of(self, plan: Plan, process: ProcessId, runner: ModelRunner) -> ModelRunner:
        """The runner of a plan in a process: that of its model."""
        return self._draft_runners[self._shape.number(process)] if is_draft_plan(plan.plan_id) else runner

    def _fail(self, error: BaseException) -> None:
        self._pending.fail(error)
        self._adapters.fail(error)

    def submit(self, plan: Plan) -> "Future[PlanResult]":
        future = self._pending.add(plan)
        if len(self.runners) == 1:
            self._inboxes[0].put(plan)
            return future
        for rank, message in self._sender.messages(plan).items():  # ranks know what they would know as processes
            taken = self._receivers[rank].take(message)
            for index in range(self._shape.processes_per_rank):
                self._inboxes[self._shape.number(ProcessId(rank, index))].put(taken)
        return future

    def move(self, move: Move) -> "Future[Moved]":
        future = self._moves.add(move)
        self._inboxes[move.rank].put(move)
        return future

    def measure(self, nodes: tuple[int, ...], machines: tuple[int, ...]) -> list[RankMeasurement]:
        message = Measure(nodes, machines)
        with ThreadPoolExecutor(len(self.runners)) as threads:
            found = list(threads.map(lambda runner: measure(runner, message), self.runners))
        return found[:: self._shape.processes_per_rank]

    def load_adapter(self, adapter: Adapter) -> "Future[None]":
        future = self._adapters.add(adapter.adapter_id)
        for inbox in self._inboxes:
            inbox.put(adapter)
        return future

    def unload_adapter(self, adapter_id: int) -> None:
        for inbox in self._inboxes:
            inbox.put(UnloadAdapter(adapter_id))

    @property
    def failure(self) -> BaseException | None:
        return self._pending.error

    @property
    def hosts(self) -> tuple[str, ...]:
        return (platform.node(),) * self._shape.num_ranks

    def close(self) -> None:
        closed = LongspanError("the engine is closed")
        self._pending.fail(closed)
        self._moves.fail(closed)
        self._adapters.fail(closed)
        for mover in self._movers:
            if mover is not None:
                mover.close()
        for inbox in self._inboxes:
            inbox.put(None)
        deadline = time.monotonic() + self._stop_s
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        self.runners.clear()  # frees the page pools, which may be most of a GPU
        self._draft_runners.clear()

    def replace(self) -> None:
        self.close()


def _load(start: Start, shape: GroupShape, device: torch.device) -> torch.nn.Module:
    """Load all of the model; its parts get speed-ups of their own."""
    if shape.processes_per_rank == 1:
        return load_weights(start, device, show_progress=False, tells=True)
    config = start.config
    return load_model(
        config.model,
        resolve_dtype(config.dtype, device),
        show_progress=False,
        device=device,
        lora=config.merged_lora,
        overrides=config.hf_overrides,
    )


def _build_runners(
    start: Start, shape: GroupShape, model: torch.nn.Module, backend: AttentionBackend
) -> list[ModelRunner]:
    """Build the runners of all processes, in the order of their numbers."""
    timeout_s, size = start.config.exchange_timeout_s, shape.processes_per_rank
    cp_groups = [thread_group(shape.num_ranks, timeout_s=timeout_s) for _ in range(size)]
    if size == 1:
        return [build_runner(start, model, with_options(comm, start), backend) for comm in cp_groups[0]]
    if speedups_of(model):
        raise ConfigError("model: got one with speed-ups and tensor_parallel_size, legal is one as it was loaded")
    runners = []
    for rank in range(shape.num_ranks):
        tp_group = thread_group(size, timeout_s=timeout_s, names=PROCESSES)
        sums = shared_by_threads(size, names=PROCESSES, timeout_s=timeout_s)
        for index, comm in enumerate(tp_group):
            part = copy_of(model)
            cut_(part, Part(index, size), start.spec.kv_groups)
            speed_up_(part)
            cp, peers = with_options(cp_groups[index][rank], start), peers_of(comm, sums[index], start)
            runners.append(build_runner(start, part, cp, backend, peers=peers))
    return runners


def _build_draft_runners(start: Start, runners: Sequence[ModelRunner], device: torch.device) -> list[ModelRunner]:
    """Build the draft model's runners, beside the model's and with their communicators; none where there is none."""
    if start.draft is None:
        return []
    backend = open_device(start.draft, speaker(0)).backend
    model = load_weights(start.draft, device, show_progress=False, tells=True)
    return [build_runner(start.draft, model, runner.comm.inner, backend) for runner in runners]
