"""A server for a long time: mixed traffic, clients that go away, long prompts, lost ranks; memory stays flat.

    python tests/endurance/soak.py [--minutes 60] [--ranks 2] [--seed 0]

Clients ask `longspan serve recall` for answers that are known from before: short ones, long ones, and some that they do
not wait for. In the first half a rank is killed now and then; in the second the ranks grow old. Ends with one line
of JSON:

    streams, cancelled, losses   what happened
    lost, duplicated, wrong      as in `chaos.py`
    memory_mb                    of the server's process, of the one that forks ranks, and of the largest rank: median
                                 of the first tenth of the second half, and of its last
    left                         afterwards: requests and pages held, files, processes and shared memory left

Exit status 0 if no answer is lost, duplicated or wrong, nothing is left, and no memory has grown by more than a tenth.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import string
import sys
import time

import httpx
from chaos import Seen, ask, bodies, leaks, lose_ranks, shared_memory, stream
from hostile import resident_mb
from process_tree import parents_of_ranks
from served_command import FACT, QUESTION, Command, command

SAMPLE_S = 2.0
GROWTH = 1.1


def long_bodies(rng: random.Random) -> list[dict[str, object]]:
    """Prompts that both ranks share."""
    found: list[dict[str, object]] = []
    for length in (8_000, 20_000, 30_000):
        before, behind = ("".join(rng.choices(string.ascii_lowercase + " ", k=length // 2)) for _ in range(2))
        prompt = before + FACT + behind + QUESTION
        found.append({"model": "recall", "prompt": prompt, "max_tokens": 30, "temperature": 0})
    return found


async def go_away(
    client: httpx.AsyncClient, rng: random.Random, some: list[dict[str, object]], stop: asyncio.Event
) -> int:
    """A client that does not wait for the ends of its answers. Returns how many it has asked for."""
    count = 0
    while not stop.is_set():
        count += 1
        with contextlib.suppress(asyncio.TimeoutError, httpx.HTTPError, ValueError):
            await asyncio.wait_for(stream(client, rng.choice(some), Seen()), rng.uniform(0.01, 1.5))
    return count


async def lose_some(server: Command, rng: random.Random, half: asyncio.Event) -> int:
    """Loses ranks until half the time is over. Returns how often."""
    count = 0
    while True:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(half.wait(), rng.uniform(10.0, 40.0))
        if half.is_set():
            return count
        count += 1
        await lose_ranks(server, "kill", rng)


async def traffic(server: Command, minutes: float, seed: int) -> tuple[Seen, dict[str, int], list[tuple[int, ...]]]:
    """Returns what was seen, counts, and samples of memory in the second half: server, forking process, one rank."""
    rng = random.Random(seed)
    seen, samples, half, stop = Seen(), [], asyncio.Event(), asyncio.Event()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        short, long = bodies(rng), long_bodies(rng)
        right = {id(body): (body, "".join(await stream(client, body, Seen()))) for body in short + long}
        tasks = [
            asyncio.create_task(ask(client, random.Random(seed + i), [right[id(body)] for body in some], seen, stop))
            for i, some in enumerate([short] * 12 + [long] * 2)
        ]
        leaving = [
            asyncio.create_task(go_away(client, random.Random(seed - i), short + long, stop)) for i in range(1, 5)
        ]
        losing = asyncio.create_task(lose_some(server, rng, half))
        end = time.monotonic() + 60 * minutes
        while (left_s := end - time.monotonic()) > 0:
            if server.process.poll() is not None:
                raise RuntimeError(f"the server ended: {server.said()[-2000:]}")
            await asyncio.sleep(SAMPLE_S)
            seen.token_times.clear()
            if left_s < 30 * minutes and half.is_set() and losing.done():
                (parent,) = parents_of_ranks(server.process.pid)
                largest = max(map(resident_mb, server.workers()))
                samples.append((resident_mb(server.process.pid), resident_mb(parent), largest))
            elif left_s < 30 * minutes:
                half.set()
        stop.set()
        await asyncio.gather(*tasks)
        counts = {"cancelled": sum(await asyncio.gather(*leaving)), "losses": await losing}
    return seen, counts, samples


def run(minutes: float, ranks: int, seed: int) -> dict[str, object]:
    """Returns the counts; `problems` and `left` are empty if all is well."""
    before = shared_memory()
    options = ("--context-parallel-size", str(ranks), "--threads-per-rank", "1", "--max-restarts", "1000")
    # So little that all of it has been touched, and pages are evicted, long before the second half.
    options += ("--kv-cache-memory", "128Mi")
    with command(*options, "--check-invariants", "100") as server:
        with leaks(server, before) as left:
            seen, counts, samples = asyncio.run(traffic(server, minutes, seed))
        status = server.end()
    tenth = max(1, len(samples) // 10)
    start, end = (
        [statistics.median(column) for column in zip(*part, strict=True)]
        for part in (samples[:tenth], samples[-tenth:])
    )
    memory_mb = dict(zip(("server", "forks ranks", "largest rank"), zip(start, end, strict=True), strict=True))
    problems = (seen.lost + seen.duplicated + seen.wrong)[:5] + ([f"exit status {status}"] if status else [])
    problems += [f"{name}: {a} to {b} MB" for name, (a, b) in memory_mb.items() if b > GROWTH * a]
    return {
        "minutes": minutes,
        "streams": seen.streams,
        **counts,
        "lost": len(seen.lost),
        "duplicated": len(seen.duplicated),
        "wrong": len(seen.wrong),
        "memory_mb": memory_mb,
        "left": left,
        "problems": problems,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    found = run(**vars(parser.parse_args()))
    print(json.dumps(found))
    return 1 if found["problems"] or found["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
