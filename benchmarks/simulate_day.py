"""A mixed day on 2 to 128 simulated ranks: the real scheduler and cost model, with clocks that are simulated.

    python benchmarks/simulate_day.py [--ranks 2,8,32,128] [--minutes 2] [--json] [--save]

Ranks are H100s in nodes of 8, of which only published figures are known; a step takes as long as the cost model
predicts for the plan's tokens, strategies and page tables. The driver is one thread: every call of the scheduler, and
making messages, takes the time that it takes on this machine. Short chats, documents of 128k tokens and a prompt of 1M
arrive at random, so many per rank; once all ranks are lost, and from eight nodes on one node for good.

Prints per rank count: throughput, time to the first token and between tokens, the driver's share of a core, memory of
this process; and of a lone prompt of 1M tokens, the simulated against the planner's times.
"""

import argparse
import heapq
import json
import os
import random
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from driver import CHUNK_PER_RANK, PAGE_SIZE, STRIPE_SIZE, TOKEN_BYTES, VOCAB_SIZE, answer, llama_8b, prompt
from longspan.config import EngineConfig
from longspan.costmodel.choose import predict_strategy
from longspan.costmodel.model_time import StepOptions, predict_decode, predict_dense
from longspan.costmodel.parameters import Costs
from longspan.costmodel.prompt_time import predict_prefill
from longspan.costmodel.shapes import ModelShape
from longspan.costmodel.work import count_work
from longspan.group.plans import PlanSender
from longspan.plan.group_step import BLOCK_LEN
from longspan.plan.step_keys import step_keys
from longspan.plan.types import Plan, QueryRun
from longspan.planner.clusters import known_cluster
from longspan.scheduler.request import Request
from longspan.scheduler.scheduler import Scheduler
from longspan.sharding.capacity import pool_pages
from longspan.types import SamplingParams, Strategy

RESULTS = Path(__file__).parent / "results"
RANKS_PER_NODE = 8
TOKENS_PER_RANK = 300_000
"""KV memory, about 40 GB."""
STEP_S = 2e-3
"""Fixed time of a step outside its layers, as the planner assumes."""
RESTART_S = 30.0
"""From a loss until new ranks are ready."""
LAST_CHAT_S = 10.0
"""No request comes in the last seconds, so that most of them end."""


def shape_8b() -> ModelShape:
    return ModelShape(llama_8b(), "bfloat16", 4096, 14336, 8.03e9, VOCAB_SIZE * 4096)


def costs_of(num_ranks: int) -> Costs:
    """Costs of H100s."""
    nodes = -(-num_ranks // RANKS_PER_NODE)
    return known_cluster("h100", min(num_ranks, RANKS_PER_NODE), nodes).costs(num_ranks, 1, "bfloat16")


def config_of(num_ranks: int, max_num_seqs: int) -> EngineConfig:
    return EngineConfig(
        model="llama",
        context_parallel_size=num_ranks,
        page_size=PAGE_SIZE,
        stripe_size=STRIPE_SIZE,
        max_num_batched_tokens=CHUNK_PER_RANK,
        max_num_seqs=max_num_seqs,
        threads_per_rank=1,
    )


class StepClock:
    """Seconds that plans take on the ranks."""

    def __init__(self, shape: ModelShape, costs: Costs) -> None:
        self._shape, self._costs = shape, costs
        self._last: dict[int, float] = {}  # plan id to seconds, of decodes that others may go on from

    def seconds(self, plan: Plan, scheduler: Scheduler) -> float:
        """Predict a plan; one that goes on from another takes as long as that."""
        found = None if plan.follows is None else self._last.pop(plan.follows, None)
        if found is None:
            found = self._predict(plan, scheduler)
        self._last[plan.plan_id] = found
        return found

    def _predict(self, plan: Plan, scheduler: Scheduler) -> float:
        (group,), spec = self._shape.spec.kv_groups, self._shape.spec
        requests = scheduler.requests
        tokens: dict[int, int] = {}
        for run in plan.query_runs:
            tokens[run.compute_rank] = tokens.get(run.compute_rank, 0) + run.num_tokens
        tables = {r.request_id: requests[r.request_id].allocation.tables[0] for r in plan.query_runs}  # type: ignore[union-attr]

        def attention_s(strategy: Strategy, runs: Sequence[QueryRun]) -> float:
            if not runs:
                return 0.0
            keys = step_keys(runs, tables, group.spec)
            work = count_work(keys, group, self._costs.rates)
            return predict_strategy(strategy, keys, group, self._costs, work, BLOCK_LEN).prediction.total_s

        layer_s, num_layers = attention_s(plan.groups[0].strategy, plan.query_runs), spec.num_layers
        total_s = STEP_S + num_layers * (self._costs.rates.layer_s + layer_s)
        if plan.last_layer is not None:
            total_s += attention_s(plan.last_layer.strategy, plan.read_runs) - layer_s
        rows = len(plan.samples)
        are_all_read = plan.last_layer is None
        return total_s + predict_dense(
            self._shape, max(tokens.values()), len(tokens), self._costs, rows, are_all_read=are_all_read
        )


Arrival: TypeAlias = tuple[float, str, int, int]
"""(second, kind, prompt tokens, output tokens) of a request."""


@dataclass
class Timing:
    """What one client saw."""

    kind: str
    arrived_s: float
    tokens_s: list[float] = field(default_factory=list)


@dataclass
class Day:
    """One simulation. Time is simulated, but for the driver's own work."""

    num_ranks: int
    max_num_seqs: int
    arrivals: list[Arrival]
    """Ascending."""
    losses: list[tuple[float, int]]
    """(second, ranks that are left), ascending."""
    timings: list[Timing] = field(default_factory=list)
    driver_s: float = 0.0
    now_s: float = 0.0
    num_plans: int = 0

    def __post_init__(self) -> None:
        self._start(self.num_ranks)
        self._known: dict[int, tuple[Request, Timing]] = {}

    def _start(self, num_ranks: int) -> None:
        """Begin with new ranks."""
        model, config = llama_8b(), config_of(num_ranks, self.max_num_seqs)
        pages = pool_pages(model, TOKENS_PER_RANK * TOKEN_BYTES, PAGE_SIZE, CHUNK_PER_RANK)
        self.scheduler = Scheduler(model, config, [pages] * num_ranks)
        costs = costs_of(num_ranks)
        self.scheduler.use_costs(costs, None)
        self._clock, self._sender = StepClock(shape_8b(), costs), PlanSender()
        self._free_s = [self.now_s] * num_ranks
        self._ends: list[tuple[float, int, Plan]] = []

    def run(self, until_s: float) -> None:
        """Go on until all requests have ended, or until a moment."""
        while self.now_s < until_s and (self.arrivals or self._ends or self.scheduler.has_requests):
            moments = [self.arrivals[0][0]] if self.arrivals else []
            moments += [self._ends[0][0]] if self._ends else []
            moments += [self.losses[0][0]] if self.losses else []
            self.now_s = max(self.now_s, min(moments))
            if self.losses and self.losses[0][0] <= self.now_s:
                self._lose(self.losses.pop(0)[1])
            arrived = [(arrival, prompt(arrival[2], len(self.timings))) for arrival in self._due_arrivals()]
            ended = [(end_s, answer(plan)) for end_s, plan in self._due_ends()]
            started = time.thread_time()
            for arrival, token_ids in arrived:
                self._add(arrival, token_ids)
            for end_s, result in ended:
                self._note(end_s, self.scheduler.update(result))
            plans: list[Plan] = []
            while (plan := self.scheduler.schedule()) is not None:
                self._sender.messages(plan)
                plans.append(plan)
            spent_s = time.thread_time() - started
            self.driver_s += spent_s
            self.now_s += spent_s
            for plan in plans:
                self._submit(plan)

    def _due_arrivals(self) -> Iterator[Arrival]:
        while self.arrivals and self.arrivals[0][0] <= self.now_s:
            yield self.arrivals.pop(0)

    def _due_ends(self) -> Iterator[tuple[float, Plan]]:
        while self._ends and self._ends[0][0] <= self.now_s:
            end_s, _, plan = heapq.heappop(self._ends)
            yield end_s, plan

    def _add(self, arrival: Arrival, token_ids: list[int]) -> None:
        """Add a request that has come."""
        arrived_s, kind, _, output_len = arrival
        request = self.scheduler.add_request(token_ids, SamplingParams(max_tokens=output_len, ignore_eos=True, seed=0))
        timing = Timing(kind, arrived_s)
        self.timings.append(timing)
        self._known[request.request_id] = (request, timing)

    def _note(self, end_s: float, advanced: Sequence[Request]) -> None:
        """Note when clients see what a plan has brought."""
        for request in advanced:
            timing = self._known[request.request_id][1]
            timing.tokens_s += [end_s] * (request.num_generated - len(timing.tokens_s))
            if request.finish_reason is not None:
                del self._known[request.request_id]

    def _submit(self, plan: Plan) -> None:
        start_s = max(self.now_s, max(self._free_s[rank] for rank in plan.ranks))
        end_s = start_s + self._clock.seconds(plan, self.scheduler)
        for rank in plan.ranks:
            self._free_s[rank] = end_s
        heapq.heappush(self._ends, (end_s, plan.plan_id, plan))
        self.num_plans += 1

    def _lose(self, num_left: int) -> None:
        """All ranks are lost; so many come back."""
        before = self.scheduler
        before.restart()
        self.now_s += RESTART_S
        self._start(num_left)
        self.scheduler.take_over(before)


def mixed_day(num_ranks: int, minutes: float) -> Day:
    """Traffic in proportion to the ranks, of which each has three chats at a time, and losses."""
    rng, end_s = random.Random(num_ranks), 60 * minutes
    arrivals: list[Arrival] = []
    chats, documents = int(0.5 * num_ranks * end_s), max(1, int(num_ranks * end_s / 400))
    last_s = end_s - LAST_CHAT_S
    for _ in range(chats):
        arrivals.append((rng.uniform(0, last_s), "chat", rng.randint(100, 2000), rng.randint(50, 300)))
    for _ in range(documents):
        arrivals.append((rng.uniform(0, last_s), "document", 131_072, 200))
    if num_ranks >= 8:
        arrivals += [(rng.uniform(0, last_s / 2), "1M", 1_000_000, 200) for _ in range(max(1, num_ranks // 64))]
    losses = [(end_s / 3, num_ranks)]
    if num_ranks >= 8 * RANKS_PER_NODE:
        losses.append((2 * end_s / 3, num_ranks - RANKS_PER_NODE))
    return Day(num_ranks, 16 * num_ranks, sorted(arrivals), losses)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def simulate(num_ranks: int, minutes: float) -> dict[str, Any]:
    """Run one day; return what clients and the driver saw."""
    day, began = mixed_day(num_ranks, minutes), time.perf_counter()
    day.run(until_s=10 * 60 * minutes)
    found: dict[str, Any] = {"ranks": num_ranks, "simulated_s": day.now_s, "wall_s": time.perf_counter() - began}
    found["plans"] = day.num_plans
    tokens = sum(len(timing.tokens_s) for timing in day.timings)
    found["tokens_per_s"] = tokens / day.now_s
    for kind in ("chat", "document", "1M"):
        seen = [timing for timing in day.timings if timing.kind == kind and timing.tokens_s]
        firsts = [timing.tokens_s[0] - timing.arrived_s for timing in seen]
        gaps = [b - a for timing in seen for a, b in zip(timing.tokens_s, timing.tokens_s[1:], strict=False)]
        if seen:
            found |= {f"{kind}_ttft_p50_s": percentile(firsts, 0.5), f"{kind}_ttft_p99_s": percentile(firsts, 0.99)}
            found |= {
                f"{kind}_itl_p50_ms": 1e3 * percentile(gaps, 0.5),
                f"{kind}_itl_p99_ms": 1e3 * percentile(gaps, 0.99),
            }
    found["driver_share"] = day.driver_s / day.now_s
    found["driver_us_per_token"] = day.driver_s / max(1, tokens) * 1e6
    found["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found | lone_prompt(num_ranks)


def lone_prompt(num_ranks: int, length: int = 2**20) -> dict[str, float]:
    """A prompt with nothing beside it, simulated and planned."""
    if length // num_ranks > TOKENS_PER_RANK - 4096:
        return {}
    day = Day(num_ranks, 1, [(0.0, "lone", length, 20)], [])
    day.run(until_s=1e9)
    (timing,) = day.timings
    options = StepOptions(
        page_size=PAGE_SIZE, stripe_size=STRIPE_SIZE, max_num_batched_tokens=CHUNK_PER_RANK, step_s=STEP_S
    )
    shape, costs = shape_8b(), costs_of(num_ranks)
    gaps = [b - a for a, b in zip(timing.tokens_s, timing.tokens_s[1:], strict=False)]
    return {
        "alone_ttft_s": timing.tokens_s[0],
        "alone_ttft_planned_s": predict_prefill(shape, length, costs, options).total_s,
        "alone_itl_ms": statistics.median(gaps) * 1e3,
        "alone_itl_planned_ms": predict_decode(shape, length, costs, options).total_s * 1e3,
    }


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Four panels over the rank count."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "tokens per second": ["tokens_per_s"],
        "first token, s": ["chat_ttft_p50_s", "chat_ttft_p99_s", "document_ttft_p50_s", "1M_ttft_p50_s"],
        "between tokens of chats, ms": ["chat_itl_p50_ms", "chat_itl_p99_ms"],
        "driver's share of a core": ["driver_share"],
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.4))
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            points = [(row["ranks"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("ranks")
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,8,32,128", help="rank counts, with commas")
    parser.add_argument("--minutes", type=float, default=2.0, help="minutes of traffic")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing before it")
    parser.add_argument("--save", action="store_true", help="write result and plot to benchmarks/results")
    chosen = parser.parse_args()
    rows = []
    for num_ranks in map(int, chosen.ranks.split(",")):
        rows.append({name: round(value, 4) for name, value in simulate(num_ranks, chosen.minutes).items()})
        if not chosen.json:
            print(rows[-1], flush=True)
    result = {"theme": "day", "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "minutes": chosen.minutes}
    result |= {"cores": os.cpu_count(), "rows": rows}
    if chosen.save:
        stem = RESULTS / f"day-{datetime.now(UTC).strftime('%Y-%m-%d')}-{os.cpu_count()}-core-cpu"
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        plot(rows, stem.with_suffix(".png"))
    if chosen.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
