"""Ranks as threads of this process, sharing one set of weights: for tests, debugging, and one rank without a process.

Holds threads and queues. Must not know schedulers or requests.
Read next: `longspan.engine.workers`, the executor whose ranks are processes.
"""

import platform
import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from longspan.comm.threads import thread_group
from longspan.costmodel.measured import RankMeasurement
from longspan.engine.executor import PendingPlans
from longspan.errors import LongspanError, WorkerError
from longspan.group.messages import Measure, Start
from longspan.group.plans import PlanReceiver, PlanSender
from longspan.group.shape import speaker
from longspan.models.speedups import COMPILED, speed_up_
from longspan.plan.types import Plan, PlanResult
from longspan.worker.build import build_runner, load_weights, open_device, with_options
from longspan.worker.measure import measure
from longspan.worker.runner import ModelRunner


class ThreadExecutor:
    """Executor with one thread per rank. `threads_per_rank` sets the compute threads of the whole process."""

    def __init__(self, start: Start, model: torch.nn.Module | None = None) -> None:
        """Load the model (or take one that is loaded) and start the ranks."""
        torch.set_num_threads(start.config.num_threads)
        size = start.config.context_parallel_size
        tools = open_device(start, speaker(0), ranks_on_device=size, is_loaded=model is not None)
        if model is None:
            model = load_weights(start, tools.device, show_progress=False, tells=True)
        elif start.config.compile_dense:
            speed_up_(model, [COMPILED])
        self._pending, self._stop_s = PendingPlans(), start.config.stop_s
        self._sender, self._receivers = PlanSender(), [PlanReceiver(rank) for rank in range(size)]
        self._inboxes: list[queue.SimpleQueue[Plan | None]] = []
        self._threads: list[threading.Thread] = []
        comms = thread_group(size, timeout_s=start.config.exchange_timeout_s)
        comms = [with_options(comm, start) for comm in comms]
        self.runners = [build_runner(start, model, comm, tools.backend) for comm in comms]
        for runner in self.runners:
            inbox: queue.SimpleQueue[Plan | None] = queue.SimpleQueue()
            thread = threading.Thread(
                target=self._serve, args=(runner, inbox), name=f"longspan-rank-{runner.rank}", daemon=True
            )
            self._inboxes.append(inbox)
            self._threads.append(thread)
            thread.start()

    def _serve(self, runner: ModelRunner, inbox: "queue.SimpleQueue[Plan | None]") -> None:
        while (plan := inbox.get()) is not None:
            try:
                self._pending.answer(runner.run(plan))
            except LongspanError as error:
                error.add_note(f"rank {runner.rank}, plan {plan.plan_id} ({plan.phase})")
                self._pending.fail(error)
                return
            except Exception as error:
                text = f"{type(error).__name__}: {error} in plan {plan.plan_id} ({plan.phase})"
                failure = WorkerError(f"rank {runner.rank}: {text}")
                failure.__cause__ = error
                self._pending.fail(failure)
                return
        runner.close()

    def submit(self, plan: Plan) -> "Future[PlanResult]":
        future = self._pending.add(plan)
        if len(self.runners) == 1:
            self._inboxes[0].put(plan)
            return future
        for rank, message in self._sender.messages(plan).items():  # ranks know what they would know as processes
            self._inboxes[rank].put(self._receivers[rank].take(message))
        return future

    def measure(self, nodes: tuple[int, ...], machines: tuple[int, ...]) -> list[RankMeasurement]:
        message = Measure(nodes, machines)
        with ThreadPoolExecutor(len(self.runners)) as threads:
            return list(threads.map(lambda runner: measure(runner, message), self.runners))

    @property
    def failure(self) -> BaseException | None:
        return self._pending.error

    @property
    def hosts(self) -> tuple[str, ...]:
        return (platform.node(),) * len(self.runners)

    def close(self) -> None:
        self._pending.fail(LongspanError("the engine is closed"))
        for inbox in self._inboxes:
            inbox.put(None)
        deadline = time.monotonic() + self._stop_s
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        self.runners.clear()  # frees the page pools, which may be most of a GPU

    def replace(self) -> None:
        self.close()
