"""A server whose ranks compute nothing: 128 of them and a thousand requests, for the page and its events.

    PYTHONPATH=tests/helpers python tests/helpers/simulated_server.py [--ranks 128] [--requests 1000] [--port 0]

Engine, scheduler, page tables and prefix cache are real; ranks answer every plan after a moment with random bytes.
"""

import argparse
import asyncio
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from unittest import mock

from serving import Served, listening, served_model

from longspan.config import EngineConfig
from longspan.engine import ranks as ranks_module
from longspan.engine.async_engine import AsyncEngine
from longspan.engine.engine import Engine
from longspan.engine.executor import PendingPlans
from longspan.plan.types import Plan, PlanResult, RankResult, SampledToken
from longspan.types import SamplingParams


class PretendedRanks:
    """An executor that answers plans, each rank one after another, after `step_s` seconds."""

    def __init__(self, num_ranks: int, step_s: float) -> None:
        self.hosts = ("here",) * num_ranks
        self._pending, self._step_s = PendingPlans(), step_s
        self._plans: queue.SimpleQueue[Plan | None] = queue.SimpleQueue()
        self._computed, self._busy_s = [0] * num_ranks, [0.0] * num_ranks
        self._rng = random.Random(0)
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, plan: Plan) -> "Future[PlanResult]":
        future = self._pending.add(plan)
        self._plans.put(plan)
        return future

    def _run(self) -> None:
        while (plan := self._plans.get()) is not None:
            time.sleep(self._step_s)
            for run in plan.query_runs:
                self._computed[run.compute_rank] += run.num_tokens
            for rank in plan.ranks:
                self._pending.answer(self._result(plan, rank))

    def _result(self, plan: Plan, rank: int) -> RankResult:
        own = [run for run in plan.query_runs if run.compute_rank == rank]
        sampled = tuple(
            SampledToken(row.request_id, row.position + 1, self._rng.randrange(97, 123), None)
            for row in plan.samples
            if any(run.request_id == row.request_id and run.position <= row.position < run.end for run in own)
        )
        self._busy_s[rank] += self._step_s
        return RankResult(plan.plan_id, rank, sampled, (), self._computed[rank], 0, busy_s=self._busy_s[rank])

    @property
    def failure(self) -> BaseException | None:
        return self._pending.error

    def close(self) -> None:
        self._plans.put(None)

    replace = close


@contextmanager
def simulated_server(num_ranks: int, *, step_s: float = 0.002, **options) -> Iterator[Served]:
    """A server on pretended ranks."""
    config = EngineConfig(
        model=served_model().path,
        context_parallel_size=num_ranks,
        executor="threads",
        measure="never",
        dtype="float32",
        hf_overrides={"max_position_embeddings": 2**20},
        **{"max_num_seqs": 2000, "kv_cache_memory": 2**20, "stripe_size": 64, "min_striped_len": 1024, **options},
    )
    with mock.patch.object(ranks_module, "start_executor", return_value=PretendedRanks(num_ranks, step_s)):
        engine = AsyncEngine(Engine(config))
    with listening(engine, config.model) as served:
        yield served


def fill(served: Served, prompt_lens: Sequence[int], max_tokens: int) -> None:
    """Submit requests that nobody reads, and wait until all of them run."""
    rng = random.Random(1)
    engine = served.state.engine
    before = engine.num_unfinished

    async def submit() -> None:
        for prompt_len in prompt_lens:
            prompt = [rng.randrange(97, 123) for _ in range(prompt_len)]
            await engine.submit(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        await asyncio.sleep(3600)  # a loop that has ended cancels its requests

    threading.Thread(target=asyncio.run, args=(submit(),), daemon=True).start()
    deadline = time.monotonic() + 120
    while engine.num_unfinished < before + len(prompt_lens):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=128)
    parser.add_argument("--requests", type=int, default=1000)
    options = parser.parse_args()
    rng = random.Random(2)
    lens = [rng.choice((30, 100, 300, 300, 700)) for _ in range(options.requests - 6)]
    lens += [rng.choice((20_000, 40_000, 6_000)) for _ in range(min(6, options.requests))]
    rng.shuffle(lens)
    with simulated_server(options.ranks, step_s=0.05) as served:
        fill(served, lens, 4000)
        print(f"ready at {served.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
