"""The attention of single steps on real worker processes: no model, no scheduler, one KV group.

What `regret.py` and `crossing.py` share. Every rank is a process with one compute thread, pools of random keys, and the
communicator of a real run, slowed down where links are simulated. A step is planned as the scheduler would plan it.
"""

import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from longspan.costmodel.choose import plan_group, predict_candidates
from longspan.costmodel.measured import combine
from longspan.costmodel.parameters import Costs
from longspan.cpu_binding import num_cores
from longspan.kv.layout import KVGroup, KVSpec
from longspan.plan.build import count_tokens
from longspan.plan.group_step import make_group_step
from longspan.plan.step_keys import step_keys
from longspan.plan.types import GroupStep, Literals, Plan, QueryRun
from longspan.sharding.geometry import StepGeometry
from longspan.sharding.pages import PageTable
from longspan.sharding.placement import place
from longspan.simulation import parse_simulated_links
from longspan.types import Phase, Placement, Strategy

PAGE, STRIPE = 16, 512
QUERY_HEADS, KV_HEADS, WIDTH = 8, 2, 64
LAYERS = 4


@dataclass(frozen=True)
class Shape:
    """One step: so many new tokens behind so many cached ones."""

    chunk: int
    context: int


def group() -> KVGroup:
    """The heads of the benchmark model, float32."""
    return KVGroup(tuple(range(LAYERS)), KVSpec.uniform(KV_HEADS, WIDTH, WIDTH, "float32"), QUERY_HEADS)


def striped(shape: Shape, num_ranks: int) -> tuple[list[QueryRun], PageTable]:
    """The step of one striped request, as the scheduler cuts it."""
    end = shape.context + shape.chunk
    num_pages = -(-end // PAGE)
    stripes = StepGeometry.of_rank_budget(num_ranks, PAGE, STRIPE, 2048).stripes(num_pages)
    runs = place(Placement.STRIPED, stripes, [num_pages] * num_ranks, 0)
    assert runs is not None
    table, used = PageTable(PAGE), [0] * num_ranks
    for rank, pages in runs:
        if pages:
            table.append(rank, used[rank], pages)
            used[rank] += pages
    owners = table.owners(shape.context, end)
    return [QueryRun(0, first, last - first, rank, Literals(())) for rank, first, last in owners], table


class AttentionRanks:
    """Processes that run the attention of steps. Close it."""

    def __init__(self, num_ranks: int, max_len: int, simulated_links: str | None = None) -> None:
        self.num_ranks, self.group = num_ranks, group()
        links = None if simulated_links is None else parse_simulated_links(simulated_links, num_ranks)
        self.nodes = (0,) * num_ranks if links is None else links.nodes
        self._directory = tempfile.TemporaryDirectory(prefix="longspan-")
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, num_ranks, max_len, simulated_links, self._directory.name, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def _ask(self, message: object) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(message)
        return [pipe.recv() for pipe in self._pipes]

    def measure(self) -> Costs:
        """What a start of longspan would measure."""
        sharing = max(1.0, self.num_ranks / num_cores())
        return combine(self._ask(("measure", self.nodes, sharing)), self.nodes, (0,) * self.num_ranks)

    def candidates(self, shape: Shape, costs: Costs) -> dict[Strategy, tuple[GroupStep, float]]:
        """Every strategy of a step, and its predicted seconds per layer."""
        runs, table = striped(shape, self.num_ranks)
        keys = step_keys(runs, {0: table}, self.group.spec)
        return {
            found.strategy: (
                make_group_step(found.strategy, keys, node_of_rank=costs.topology.nodes, exchanges=found.exchanges),
                found.prediction.total_s,
            )
            for found in predict_candidates(keys, self.group, costs)
        }

    def choice(self, shape: Shape, costs: Costs) -> Strategy:
        """What the policy takes."""
        runs, table = striped(shape, self.num_ranks)
        return plan_group(runs, {0: table}, self.group, costs).strategy

    def time(self, shape: Shape, steps: Sequence[GroupStep], repeats: int, most_s: float = 3.0) -> list[float]:
        """Median seconds per layer of some steps of one shape, interleaved in changing order. Fewer repeats (not below
        5) where `most_s` would pass."""
        runs, table = striped(shape, self.num_ranks)
        times: list[list[float]] = [[] for _ in steps]
        started = time.perf_counter()
        for repeat in range(repeats + 1):
            for step, found in random.Random(repeat).sample(list(zip(steps, times, strict=True)), len(steps)):
                ranks = tuple(range(self.num_ranks))
                plan = Plan(0, Phase.PREFILL, ranks, count_tokens(ranks, runs), tuple(runs), (), (step,), ())
                seconds = max(self._ask(("run", plan, table.runs)))
                if repeat:  # the first one is for caches
                    found.append(seconds)
            if repeat >= 5 and time.perf_counter() - started > most_s:
                break
        return [statistics.median(found) for found in times]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(timeout=2)
            process.kill()
        self._directory.cleanup()


def _serve(
    rank: int, num_ranks: int, max_len: int, simulated_links: str | None, directory: str, pipe: Connection
) -> None:
    """One rank."""
    import torch

    from longspan.attention.measure import measure_kernels
    from longspan.attention.select import make_backend
    from longspan.comm.base import Communicator
    from longspan.comm.connect import local_meeting
    from longspan.comm.delaying import DelayingCommunicator
    from longspan.comm.measure import barrier, measure_links
    from longspan.comm.recording import RecordingCommunicator
    from longspan.comm.sockets import SocketCommunicator
    from longspan.costmodel.measured import RankMeasurement
    from longspan.cp.eager import EagerStepAttention
    from longspan.cp.measure import measure_messages
    from longspan.kv.pool import PagePool
    from longspan.types import AttentionParams

    torch.set_num_threads(1)
    comm: Communicator = SocketCommunicator(rank, num_ranks, local_meeting(Path(directory)))
    if simulated_links is not None:
        comm = DelayingCommunicator(comm, parse_simulated_links(simulated_links, num_ranks))
    device, backend, kv_group = torch.device("cpu"), make_backend("cpu", "cpu"), group()
    params = AttentionParams(WIDTH**-0.5)
    num_pages = (max_len // num_ranks + 2 * num_ranks * STRIPE) // PAGE
    pool = PagePool(kv_group, num_pages, PAGE, device)
    for tensor in (*pool.k.values(), *pool.v.values()):
        tensor.normal_()
    recorder = RecordingCommunicator(comm)
    queries = torch.randn(max_len, QUERY_HEADS, WIDTH)
    keys = torch.randn(KV_HEADS, max_len, WIDTH)
    with torch.inference_mode():
        while (message := pipe.recv()) is not None:
            if message[0] == "measure":
                _, nodes, sharing = message
                rates = measure_kernels(
                    backend, kv_group, params, ranks_per_device=sharing, sync=lambda: barrier(comm), device=device
                )
                rates = measure_messages(kv_group, device).add_to(rates)
                pipe.send(RankMeasurement(rank, rates, measure_links(comm, nodes)))
                continue
            _, plan, table_runs = message
            table = PageTable(PAGE)
            table.apply(list(table_runs))
            step = EagerStepAttention(plan, [{0: table}], [pool], recorder, backend, [params] * LAYERS)
            count = step.num_rows
            q, kv = queries[:count], keys[:, :count]
            barrier(comm)
            started = time.perf_counter()
            for layer in range(LAYERS):
                if count:
                    step.attend(layer, q, kv, kv)
                else:
                    step.join(layer)
            pipe.send((time.perf_counter() - started) / LAYERS)
