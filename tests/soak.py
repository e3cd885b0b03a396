"""A server for a long time: mixed traffic, clients that go away, long prompts, lost ranks; memory stays flat.

    python tests/soak.py [--minutes 60] [--ranks 2] [--seed 0]

Clients ask `longspan serve recall` for answers that are known from before: short ones, long ones, and some that they do
not wait for. Now and then a rank is killed. Ends with one line of JSON:

    streams, cancelled, losses   what happened
    lost, duplicated, wrong      as in `chaos.py`
    memory_mb                    of the server's process, of the one that forks ranks, and of the largest rank: median
                                 of the second tenth of the time, and of the last
    left                         afterwards: requests and pages held, files, processes and shared memory left

Exit status 0 if no answer is lost, duplicated or wrong, nothing is left, and the server's memory has not grown by more
than a tenth.
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

from chaos import Seen, ask, bodies, lose_ranks, shared_memory, stream
from hostile import held, open_files, resident_mb
from process_tree import children, parents_of_ranks
from test_server_processes import FACT, QUESTION, Command, command

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


async def lose_some(server: Command, rng: random.Random, stop: asyncio.Event) -> int:
    """Returns how often ranks were lost."""
    count = 0
    while True:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), rng.uniform(10.0, 40.0))
        if stop.is_set():
            return count
        count += 1
        await lose_ranks(server, "kill", rng)


async def traffic(server: Command, minutes: float, seed: int) -> tuple[Seen, dict[str, int], list[tuple[int, ...]]]:
    """Returns what was seen, counts, and samples of memory: server, forking process, largest rank."""
    rng = random.Random(seed)
    seen, samples, stop = Seen(), [], asyncio.Event()
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
        losing = asyncio.create_task(lose_some(server, rng, stop))
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            if server.process.poll() is not None:
                raise RuntimeError(f"the server ended: {server.said()[-2000:]}")
            await asyncio.sleep(SAMPLE_S)
            seen.token_times.clear()
            with contextlib.suppress(OSError, ValueError):  # one of them is being replaced
                parent = parents_of_ranks(server.process.pid)[0]
                largest = max(map(resident_mb, server.workers()))
                samples.append((resident_mb(server.process.pid), resident_mb(parent), largest))
        stop.set()
        await asyncio.gather(*tasks)
        counts = {"cancelled": sum(await asyncio.gather(*leaving)), "losses": await losing}
    return seen, counts, samples


def run(minutes: float, ranks: int, seed: int) -> dict[str, object]:
    """Returns the counts; `problems` and `left` are empty if all is well."""
    before = shared_memory()
    options = ("--context-parallel-size", str(ranks), "--threads-per-rank", "1", "--max-restarts", "1000")
    with command(*options, "--check-invariants", "100") as server:
        pid = server.process.pid
        files, processes, shared = open_files(pid), len(children(pid)), len(shared_memory() - before)
        seen, counts, samples = asyncio.run(traffic(server, minutes, seed))
        deadline = time.monotonic() + 30
        while (held(server.url) or open_files(pid) > files + 2) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = {
            "requests and pages": held(server.url),
            "files": max(0, open_files(pid) - files - 2),  # the question of this very moment
            "processes": len(children(pid)) - processes,
            "shared memory": len(shared_memory() - before) - shared,
        }
        status = server.end()
    tenth = max(1, len(samples) // 10)
    start, end = (
        [statistics.median(column) for column in zip(*part, strict=True)]
        for part in (samples[tenth : 2 * tenth] or samples, samples[-tenth:])
    )
    problems = (seen.lost + seen.duplicated + seen.wrong)[:5] + ([f"exit status {status}"] if status else [])
    if end[0] > GROWTH * start[0]:
        problems.append(f"the server's memory has grown from {start[0]} to {end[0]} MB")
    return {
        "minutes": minutes,
        "streams": seen.streams,
        **counts,
        "lost": len(seen.lost),
        "duplicated": len(seen.duplicated),
        "wrong": len(seen.wrong),
        "memory_mb": {name: [start[i], end[i]] for i, name in enumerate(("server", "forks ranks", "largest rank"))},
        "left": {what: count for what, count in left.items() if count},
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
