"""What others feel of a long prefill, what many short requests get out of several ranks, and what the driver costs.

    python benchmarks/serve.py [--length 65536] [--only short,alone,long,prefix,driver,http,parsers]
        [--repeats 3] [--json] [--save]

Each part runs the engines that it compares one after the other, `--repeats` times, in one process with real worker
processes; numbers are medians. Only the last two go by HTTP, and must be asked for: on two cores a client in the same
machine is much of the cost.

    short    64 requests (128 tokens in, 64 out) on 2 ranks x 1 thread, against 32 on 1 rank x 1 thread
    alone    one short request on 2 ranks x 1 thread, against 1 rank x 1 thread
    long     one prompt of --length tokens over both ranks, with short requests beside it, against the same prompt alone
    prefix   a prompt of half that length, and again with another end
    driver   time that the driver needs per step with 64 running requests: schedule, ship, collect
    http     1-token answers over 64 connections, and 64 streams, with SmolLM2; with LONGSPAN_BENCH_VLLM=PATH also by
             vLLM's server, with the Python that is there, on the same cores
    parsers  CPU time of the server's process per token of a stream, with tools and thoughts, against neither
"""

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import http_load
from common import VOCAB_SIZE, median, parser, random_model, random_prompt, report
from longspan.cli.serve import SHORT_STRIPE, STRIPED_FROM
from longspan.config import EngineConfig
from longspan.engine.async_engine import AsyncEngine
from longspan.engine.engine import Engine
from longspan.types import SamplingParams

MAX_STEP_MS = 200
"""The server's default on CPUs."""


@dataclass
class Served:
    """One request as its client saw it."""

    start_s: float
    token_times: list[float]
    num_cached: int

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.start_s

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def tpot_s(self) -> float:
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)


@dataclass
class Round:
    """One round of `take_in` and `submit_plans` that submitted something."""

    num_running: int
    wall_s: float
    cpu_s: float
    """Of the driver's thread: without what the workers, on the same cores, took from it."""


class TimedEngine(Engine):
    """Counts the driver's own time."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.rounds: list[Round] = []
        self._taken = (0.0, 0.0)

    def submit_plans(self) -> Any:
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        submitted = super().submit_plans()
        if submitted:
            wall_s, cpu_s = time.perf_counter() - wall_s, time.thread_time() - cpu_s
            num_running = len(self.scheduler.running)
            self.rounds.append(Round(num_running, self._taken[0] + wall_s, self._taken[1] + cpu_s))
            self._taken = (0.0, 0.0)
        return submitted

    def take_in(self, done: Any) -> Any:
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        advanced = super().take_in(done)
        self._taken = (self._taken[0] + time.perf_counter() - wall_s, self._taken[1] + time.thread_time() - cpu_s)
        return advanced


@contextmanager
def serving(model: Path, num_ranks: int, **options: Any) -> Any:
    """An engine as the server runs it, warmed up."""
    config = EngineConfig(
        model=str(model),
        context_parallel_size=num_ranks,
        threads_per_rank=1,
        max_step_ms=MAX_STEP_MS,
        stripe_size=SHORT_STRIPE,
        min_striped_len=STRIPED_FROM * num_ranks,
        **options,
    )
    engine = AsyncEngine(TimedEngine(config))
    try:
        asyncio.run(at_once(engine, [random_prompt(300, 990 + i) for i in range(2 * num_ranks)], 8))
        yield engine
    finally:
        engine.close()


async def serve(engine: AsyncEngine, prompt: list[int], num_tokens: int) -> Served:
    """One request to its end."""
    start_s = time.perf_counter()
    stream = await engine.submit(prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    served = Served(start_s, [], 0)
    async for update in stream:
        served.num_cached = update.num_cached
        served.token_times += [time.perf_counter()] * len(update.token_ids)
    return served


async def at_once(engine: AsyncEngine, prompts: list[list[int]], num_tokens: int) -> list[Served]:
    return list(await asyncio.gather(*(serve(engine, prompt, num_tokens) for prompt in prompts)))


def short_requests(model: Path, repeats: int, _length: int) -> dict[str, Any]:
    """Output tokens per second of many short requests."""

    def rate(engine: AsyncEngine, num_requests: int, seed: int) -> float:
        prompts = [random_prompt(128, 1000 * seed + i) for i in range(num_requests)]
        started = time.perf_counter()
        asyncio.run(at_once(engine, prompts, 64))
        return num_requests * 64 / (time.perf_counter() - started)

    with serving(model, 1) as one, serving(model, 2) as two:
        rates = [(rate(one, 32, 2 * i), rate(two, 64, 2 * i + 1)) for i in range(repeats)]
    return {
        "1 rank, 32 requests": f"{median(a for a, _ in rates):.0f} tokens/s",
        "2 ranks, 64 requests": f"{median(b for _, b in rates):.0f} tokens/s",
        "ratio": f"{median(b / a for a, b in rates):.2f}",
        "goal": "at least 1.8",
    }


def alone(model: Path, repeats: int, _length: int) -> dict[str, Any]:
    """One short request."""
    with serving(model, 1) as one, serving(model, 2) as two:
        found: list[tuple[Served, Served]] = []
        for i in range(5 * repeats):
            prompt = random_prompt(512, 2000 + i)
            pair = {engine: asyncio.run(serve(engine, prompt, 64)) for engine in random.sample([one, two], 2)}
            found.append((pair[one], pair[two]))
    return {
        "time to first token, 1 rank": f"{median(a.ttft_s for a, _ in found) * 1e3:.1f} ms",
        "time to first token, 2 ranks / 1": f"{median(b.ttft_s / a.ttft_s for a, b in found):.3f}",
        "time per token, 1 rank": f"{median(a.tpot_s for a, _ in found) * 1e3:.2f} ms",
        "time per token, 2 ranks / 1": f"{median(b.tpot_s / a.tpot_s for a, b in found):.3f}",
        "goal": "at most 1.03 each",
    }


def long_prefill(model: Path, repeats: int, length: int) -> dict[str, Any]:
    """Short requests beside a long prefill, and the long prefill beside them."""
    gaps: list[float] = []
    firsts: list[float] = []
    ratios: list[float] = []
    alone_s: list[float] = []

    async def beside(engine: AsyncEngine, prompt: list[int]) -> float:
        """The long one's time to first token; two requests decode beside it all the time, and others come and go."""
        stop = asyncio.Event()

        async def decode(seed: int) -> None:
            while not stop.is_set():
                served = await serve(engine, random_prompt(64, seed), 32)
                gaps.extend(served.gaps_s)

        decoding = [asyncio.create_task(decode(seed)) for seed in (7, 8)]
        long = asyncio.create_task(serve(engine, prompt, 2))
        while not long.done():
            await asyncio.sleep(1.0)
            served = await serve(engine, random_prompt(64, random.randrange(10**6)), 2)
            firsts.append(served.ttft_s)
        stop.set()
        await asyncio.gather(*decoding)
        return long.result().ttft_s

    with serving(model, 2) as engine:
        for i in range(repeats):
            first = asyncio.run(serve(engine, random_prompt(length, 3000 + i), 2)).ttft_s
            second = asyncio.run(beside(engine, random_prompt(length, 4000 + i)))
            alone_s.append(first)
            ratios.append(second / first)
    return {
        "prompt tokens": length,
        "time to first token, alone": f"{median(alone_s):.1f} s",
        "time to first token, beside short requests / alone": f"{median(ratios):.3f}",
        "goal (long)": "at most 1.20",
        "between tokens of short requests, p50": f"{median(gaps) * 1e3:.0f} ms",
        "between tokens of short requests, p99": f"{statistics.quantiles(gaps, n=100)[98] * 1e3:.0f} ms",
        "goal (between tokens)": f"p99 at most {1.5 * MAX_STEP_MS:.0f} ms",
        "first token of a new short request, p50": f"{median(firsts):.2f} s",
        "first token of a new short request, max": f"{max(firsts):.2f} s",
        "goal (first token)": "1 s plus its own prefill",
    }


def prefix(model: Path, repeats: int, length: int) -> dict[str, Any]:
    """The same long prompt again, with another end."""
    ratios: list[float] = []
    with serving(model, 2) as engine:
        for i in range(repeats):
            prompt = random_prompt(length // 2, 5000 + i)
            first = asyncio.run(serve(engine, prompt, 2))
            again = asyncio.run(serve(engine, [*prompt, *random_prompt(16, i)], 2))
            assert again.num_cached >= length // 2 - 16, again.num_cached
            ratios.append(again.ttft_s / first.ttft_s)
    return {
        "prompt tokens": length // 2,
        "time to first token, again / first": f"{median(ratios):.4f}",
        "goal": "at most 0.05",
    }


def driver(model: Path, repeats: int, _length: int) -> dict[str, Any]:
    """The driver's time per step."""
    full: list[Round] = []
    with serving(model, 2, max_num_seqs=64) as engine:
        for repeat in range(repeats):
            engine.engine.rounds.clear()
            prompts = [random_prompt(128, 6000 + 64 * repeat + i) for i in range(64)]
            asyncio.run(at_once(engine, prompts, 64))
            full += [round_ for round_ in engine.engine.rounds if round_.num_running == 64]
    wall_s, cpu_s = [round_.wall_s for round_ in full], [round_.cpu_s for round_ in full]
    return {
        "rounds with 64 running requests": len(full),
        "driver's time per round, p50": f"{median(wall_s) * 1e3:.2f} ms",
        "driver's time per round, p99 (workers preempt it)": f"{statistics.quantiles(wall_s, n=100)[98] * 1e3:.2f} ms",
        "driver's CPU time per round, p50": f"{median(cpu_s) * 1e3:.2f} ms",
        "driver's CPU time per round, p99": f"{statistics.quantiles(cpu_s, n=100)[98] * 1e3:.2f} ms",
        "goal": "under 1 ms",
    }


PARTS: dict[str, Callable[[Path, int, int], dict[str, Any]]] = {
    "short": short_requests,
    "alone": alone,
    "long": long_prefill,
    "prefix": prefix,
    "driver": driver,
}
OVER_HTTP = {"http": http_load.http, "parsers": http_load.parsers}
"""Parts that run only if they are named."""


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(length=65536)
    options.add_argument("--only", default=",".join(PARTS), help=f"parts to run, also {', '.join(OVER_HTTP)}")
    chosen = options.parse_args()
    rows = []
    with random_model() as model:
        for name in chosen.only.split(","):
            repeats = 1 if name == "long" and chosen.length > 20_000 else chosen.repeats
            found = (PARTS | OVER_HTTP)[name](model, repeats, chosen.length)
            rows += [{"part": name, "what": key, "value": value} for key, value in found.items()]
    report("serve", rows, {"vocabulary": VOCAB_SIZE, "max_step_ms": MAX_STEP_MS}, chosen)


if __name__ == "__main__":
    main()
