"""What the driver costs by rank count: planning a long prompt and its decode, scheduling many short requests.

    python benchmarks/driver.py [--ranks 2,8,32,64,128] [--context 1M] [--json]

The scheduler is the real one, with the shape of an 8 B Llama; answers of the ranks are simulated, and no model runs.
One process, one thread, of which the time on a core is counted: other programs cost nothing. Prints one JSON object
with a list `ranks`, or with `--json` nothing else:

    prefill_plan_ms        median, of a striped prompt: making a plan, and the messages that tell the ranks
    decode_plan_ms         median, the same of one striped request at the context's end
    plan_bytes_per_rank    most bytes that one rank gets with a plan of the prompt
    schedule_us_per_token  `Scheduler.schedule` while 8 packed requests a rank generate 64 tokens each
    rank_prepare_ms        decode, most of all ranks' medians: from the message to the rows that its kernels read
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from longspan.attention.select import make_backend
from longspan.comm.recording import RecordingCommunicator
from longspan.config import EngineConfig
from longspan.cp.eager import EagerStepAttention
from longspan.group.messages import RunNext, RunPlan, decode_to_worker
from longspan.group.plans import PlanReceiver, PlanSender
from longspan.kv.layout import KVGroup, KVSpec
from longspan.plan.types import Plan, PlanResult, RankResult, SampledToken
from longspan.quantities import parse_tokens
from longspan.scheduler.scheduler import Scheduler
from longspan.sharding.capacity import pool_pages
from longspan.types import AttentionParams, ModelSpec, Phase, SamplingParams

NUM_LAYERS, VOCAB_SIZE = 32, 128_256
TOKEN_BYTES = NUM_LAYERS * 2 * 8 * 128 * 2
"""KV of one token in all layers."""
PAGE_SIZE, STRIPE_SIZE, CHUNK_PER_RANK = 64, 512, 2048
NUM_DECODES = 3 * PAGE_SIZE
"""Of the striped request, so that pages and owners change too."""
REQUESTS_PER_RANK, SHORT_PROMPT, SHORT_OUTPUT = 8, 512, 64
NUM_PREPARED = 5
"""Decodes whose preparation is timed on every rank."""


def llama_8b() -> ModelSpec:
    """Facts of a Llama of 8 B parameters, without end tokens."""
    layers = tuple(range(NUM_LAYERS))
    group = KVGroup(layers, KVSpec.uniform(8, 128, 128, "bfloat16"), 32)
    params = tuple(AttentionParams(128**-0.5) for _ in layers)
    return ModelSpec(
        "llama", NUM_LAYERS, VOCAB_SIZE, None, (), (group,), params, num_parameters=8 * 10**9, weight_bytes=16 * 10**9
    )


def make_scheduler(num_ranks: int, tokens_per_rank: int, **options: Any) -> Scheduler:
    """Make a scheduler whose ranks hold so many tokens each."""
    model = llama_8b()
    config = EngineConfig(
        model="llama",
        context_parallel_size=num_ranks,
        page_size=PAGE_SIZE,
        stripe_size=STRIPE_SIZE,
        max_num_batched_tokens=CHUNK_PER_RANK,
        async_scheduling=False,
        threads_per_rank=1,
        **options,
    )
    pages = pool_pages(model, tokens_per_rank * TOKEN_BYTES, PAGE_SIZE, CHUNK_PER_RANK)
    return Scheduler(model, config, [pages] * num_ranks)


def answer(plan: Plan) -> PlanResult:
    """Answer a plan as its ranks would; the tokens depend on positions alone."""
    owner = {run.request_id: run.compute_rank for run in plan.query_runs}
    sampled: dict[int, list[SampledToken]] = {rank: [] for rank in plan.ranks}
    for row in plan.samples:
        token = SampledToken(row.request_id, row.position + 1, 7919 * row.position % VOCAB_SIZE, None)
        sampled[owner[row.request_id]].append(token)
    results = (RankResult(plan.plan_id, rank, tuple(tokens), (), 0, 0) for rank, tokens in sampled.items())
    return PlanResult(plan.plan_id, tuple(results))


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


class Timed(NamedTuple):
    """A plan of the long prompt, and what the driver did for it."""

    plan: Plan
    seconds: float
    messages: dict[int, bytes]


def timed_plans(scheduler: Scheduler) -> Iterator[Timed]:
    """Yield the plans of a lone request, each before it is answered."""
    sender = PlanSender()
    while scheduler.has_requests:
        started = time.thread_time()
        plan = scheduler.schedule()
        assert plan is not None
        messages = sender.messages(plan)
        yield Timed(plan, time.thread_time() - started, messages)
        scheduler.update(answer(plan))


class PreparedRank:
    """One rank's part in steps, up to where a model would run."""

    def __init__(self, scheduler: Scheduler, rank: int) -> None:
        """Stand where a rank stands; `scheduler` has the page tables that it would mirror."""
        group, size = scheduler.model.kv_groups[0], scheduler.config.context_parallel_size
        self._scheduler = scheduler
        self._pools: Any = [SimpleNamespace(group=group, device=torch.device("cpu"), page_size=PAGE_SIZE)]
        self._comm = RecordingCommunicator(SimpleNamespace(rank=rank, size=size))  # type: ignore[arg-type]
        self._backend = make_backend("cpu", "cpu")
        self._receiver = PlanReceiver(rank)
        self.seconds: list[float] = []

    def prepare(self, message: bytes, *, is_timed: bool) -> None:
        """Prepare a step, and note the time if asked to."""
        tables = [{r.request_id: r.allocation.tables[0] for r in self._scheduler.running if r.allocation}]
        started = time.thread_time()
        received = decode_to_worker(message)
        assert isinstance(received, RunPlan | RunNext)
        plan = self._receiver.take(received)
        if is_timed:
            params = self._scheduler.model.layer_params
            EagerStepAttention(plan, tables, self._pools, self._comm, self._backend, params)
            self.seconds.append(time.thread_time() - started)


def long_request(num_ranks: int, context: int) -> dict[str, float]:
    """Measure one striped prompt and its decode."""
    scheduler = make_scheduler(num_ranks, context // num_ranks + 8192, placement="striped", enable_prefix_caching=False)
    scheduler.add_request(prompt(context, 0), SamplingParams(max_tokens=NUM_DECODES, ignore_eos=True))
    prefill, decode, num_bytes = [], [], 0
    ranks = [PreparedRank(scheduler, rank) for rank in range(num_ranks)]
    for timed in timed_plans(scheduler):
        if timed.plan.phase is Phase.PREFILL:
            prefill.append(timed.seconds)
            num_bytes = max(num_bytes, max(map(len, timed.messages.values())))
            continue
        decode.append(timed.seconds)
        is_timed = len(decode) > NUM_DECODES - NUM_PREPARED
        for rank, message in timed.messages.items():
            ranks[rank].prepare(message, is_timed=is_timed)
    return {
        "prefill_plan_ms": statistics.median(prefill) * 1e3,
        "decode_plan_ms": statistics.median(decode) * 1e3,
        "plan_bytes_per_rank": num_bytes,
        "rank_prepare_ms": max(statistics.median(rank.seconds) for rank in ranks) * 1e3,
    }


def short_requests(num_ranks: int) -> float:
    """Microseconds of scheduling per token of many packed requests."""
    num_requests = REQUESTS_PER_RANK * num_ranks
    scheduler = make_scheduler(
        num_ranks, 2 * REQUESTS_PER_RANK * (SHORT_PROMPT + SHORT_OUTPUT), max_num_seqs=num_requests
    )
    for i in range(num_requests):
        scheduler.add_request(prompt(SHORT_PROMPT, i), SamplingParams(max_tokens=SHORT_OUTPUT, ignore_eos=True))
    seconds, num_tokens = 0.0, 0
    while scheduler.has_requests:
        plans: list[Plan] = []
        started = time.thread_time()
        while (plan := scheduler.schedule()) is not None:
            plans.append(plan)
        seconds += time.thread_time() - started
        for plan in plans:
            scheduler.update(answer(plan))
            num_tokens += len(plan.samples)
    return seconds / num_tokens * 1e6


def measure(num_ranks: int, context: int) -> dict[str, Any]:
    long = long_request(num_ranks, context)
    return {
        "ranks": num_ranks,
        "prefill_plan_ms": round(long["prefill_plan_ms"], 3),
        "decode_plan_ms": round(long["decode_plan_ms"], 4),
        "plan_bytes_per_rank": long["plan_bytes_per_rank"],
        "schedule_us_per_token": round(short_requests(num_ranks), 2),
        "rank_prepare_ms": round(long["rank_prepare_ms"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,8,32,64,128", help="rank counts, with commas")
    parser.add_argument("--context", default="1M", help="tokens of the long prompt")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing before it")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    context = parse_tokens(chosen.context)
    rows = []
    for num_ranks in map(int, chosen.ranks.split(",")):
        rows.append(measure(num_ranks, context))
        if not chosen.json:
            print(rows[-1], flush=True)
    print(json.dumps({"context": context, "ranks": rows}, indent=1))


if __name__ == "__main__":
    main()
