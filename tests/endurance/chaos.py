"""Ranks are lost at random moments under many streams, and no client may notice more than a pause.

    python tests/endurance/chaos.py [--kills 200] [--streams 50] [--ranks 2] [--seed 0]

Starts `longspan serve recall`, and gets the answers to some prompts (half of them drawn with a seed, half greedy) once
in peace. Then `--streams` clients ask for them again and again, while at random moments a random rank is killed
(SIGKILL; sometimes one of the new ones too, while it starts), a rank is stopped (SIGSTOP), or the process that forks
ranks is killed. Ends with one line of JSON:

    kills, of_which      how often in all, and per kind
    streams              answers that were streamed meanwhile
    lost                 answers that ended early, or with an error
    duplicated           answers that went on after their end
    wrong                answers that differ otherwise
    median_recovery_s    from a kill to the first new token of any stream; and per kind
    of_which_start_s     from the notice to new ranks that are ready, as the server counts it; mean
    leaks                afterwards: requests and pages held, files, processes and shared memory left
    grown_mb             memory of the server's process, from after the first loss to the end

Exit status 0 if nothing is lost, duplicated or wrong, and nothing leaks.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from hostile import held, open_files, resident_mb
from process_tree import children, parents_of_ranks
from served_command import FACT, QUESTION, Command, command


def bodies(rng: random.Random) -> list[dict[str, object]]:
    """Requests: short and long ones, greedy and drawn. Nothing occurs twice in a prompt but the fact that is asked for:
    of two equally good continuations rounding would choose, with or without a loss."""
    found: list[dict[str, object]] = []
    for i in range(16):
        before, behind = (
            "".join(rng.choices(string.ascii_lowercase + " ", k=k)) for k in (rng.choice((50, 300, 1500, 4000)), 300)
        )
        prompt = before + FACT + behind + QUESTION
        drawn = {"temperature": 1.0, "seed": i} if i % 2 else {"temperature": 0}
        found.append({"model": "recall", "prompt": prompt, "max_tokens": rng.choice((8, 40, 120)), **drawn})
    return found


@dataclass
class Seen:
    """What the clients saw."""

    streams: int = 0
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    """Of all streams."""


async def stream(client: httpx.AsyncClient, body: dict[str, object], seen: Seen) -> list[str]:
    """The texts of an answer's chunks; raises if it has no end."""
    texts: list[str] = []
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code} {(await answer.aread())[:200]!r}")
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return texts
            if line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ValueError(chunk["error"]["message"])
                seen.token_times.append(time.monotonic())
                texts.append(chunk["choices"][0]["text"])
    raise ValueError("no end")


async def ask(
    client: httpx.AsyncClient,
    rng: random.Random,
    right: list[tuple[dict[str, object], str]],
    seen: Seen,
    stop: asyncio.Event,
) -> None:
    """One client, until it is told to stop."""
    while not stop.is_set():
        body, wanted = rng.choice(right)
        seen.streams += 1
        try:
            found = "".join(await stream(client, body, seen))
        except (ValueError, httpx.HTTPError) as error:
            seen.lost.append(f"{type(error).__name__}: {error}")
            continue
        if found == wanted:
            continue
        if wanted.startswith(found):
            seen.lost.append(f"{found!r} of {wanted!r}")
        elif found.startswith(wanted):
            seen.duplicated.append(f"{found!r} for {wanted!r}")
        else:
            seen.wrong.append(f"{found!r} for {wanted!r}")


KINDS = {"kill": 84, "kill again": 6, "kill parent": 5, "stop": 5}
"""Ways to lose a rank, and how often of 100 times."""


async def lose_ranks(server: Command, kind: str, rng: random.Random) -> None:
    """Returns when there are processes of new ranks."""
    victims = server.workers()
    with contextlib.suppress(ProcessLookupError):  # another death may have ended it
        if kind == "kill parent":
            os.kill(*parents_of_ranks(server.process.pid), signal.SIGKILL)
        else:
            os.kill(rng.choice(victims), signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
    new = await successors(server, victims)
    if kind == "kill again":
        await asyncio.sleep(rng.uniform(0.0, 0.2))
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(new), signal.SIGKILL)
        await successors(server, new)


async def successors(server: Command, victims: list[int]) -> list[int]:
    """Ranks that replace these, when they are there."""
    while set(victims) & set(found := server.workers()) or len(found) < len(victims):
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended: {server.said()[-2000:]}")
        await asyncio.sleep(0.005)
    return found


async def killing(server: Command, kinds: list[str], streams: int, seed: int, seen: Seen) -> list[float]:
    """Returns the seconds of every recovery. Args: `seen` is added to."""
    rng = random.Random(seed)
    recoveries: list[float] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        right = [(body, "".join(await stream(client, body, Seen()))) for body in bodies(rng)]
        stop = asyncio.Event()
        asking = [asyncio.create_task(ask(client, random.Random(seed + i), right, seen, stop)) for i in range(streams)]
        for kind in kinds:
            await asyncio.sleep(rng.uniform(0.0, 1.5))
            killed_s = time.monotonic()
            await lose_ranks(server, kind, rng)
            started_s = time.monotonic()  # tokens that were on their way before are not new ones
            while not seen.token_times or seen.token_times[-1] < started_s:
                if server.process.poll() is not None:
                    raise RuntimeError(f"the server ended: {server.said()[-2000:]}")
                await asyncio.sleep(0.005)
            recoveries.append(next(t for t in seen.token_times if t >= started_s) - killed_s)
            seen.token_times.clear()
        stop.set()
        await asyncio.gather(*asking)
    return recoveries


def shared_memory() -> set[str]:
    """Names of shared memory, and of the directories where groups of ranks meet."""
    return {path.name for path in (*Path("/dev/shm").iterdir(), *Path(tempfile.gettempdir()).glob("longspan-*"))}


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@contextlib.contextmanager
def leaks(server: Command, before: set[str]) -> Iterator[dict[str, float]]:
    """What a server holds at the end beyond what it held at the start. Args: `before` it came, `shared_memory`.

    Yields:
        Counts that are above 0, filled in at the end.
    """
    pid = server.process.pid
    files, processes, shared = open_files(pid), len(children(pid)), len(shared_memory() - before)
    found: dict[str, float] = {}
    yield found
    deadline = time.monotonic() + 30
    while (held(server.url) or open_files(pid) > files + 2) and time.monotonic() < deadline:
        time.sleep(0.2)
    counts = {
        "requests and pages": held(server.url),
        "files": open_files(pid) - files - 2,  # the question of this very moment
        "processes": len(children(pid)) - processes,
        "shared memory": len(shared_memory() - before) - shared,
    }
    found.update({what: count for what, count in counts.items() if count > 0})


def run(kills: int, streams: int, ranks: int, seed: int) -> dict[str, object]:
    """Returns the counts; `problems` is empty if all is well."""
    before = shared_memory()
    kinds = random.Random(seed).choices(list(KINDS), KINDS.values(), k=kills)
    options = ("--context-parallel-size", str(ranks), "--threads-per-rank", "1", "--max-restarts", str(4 * kills + 4))
    with command(*options, "--check-invariants", "20", "--exchange-timeout-s", "3") as server:
        seen = Seen()
        asyncio.run(killing(server, ["kill"], streams, seed - 1, seen))  # whatever is made once and kept
        grown_mb = -resident_mb(server.process.pid)
        with leaks(server, before) as left:
            recoveries = asyncio.run(killing(server, kinds, streams, seed, seen))
        grown_mb += resident_mb(server.process.pid)
        restarts = metric(server.url, "longspan:restarts_total")
        start_s = metric(server.url, "longspan:recovery_seconds_total") / max(1.0, restarts)
        status = server.end()
    found = {kind: [s for s, one in zip(recoveries, kinds, strict=True) if one == kind] for kind in KINDS}
    return {
        "kills": kills,
        "of_which": {kind: len(times) for kind, times in found.items()},
        "streams": seen.streams,
        "lost": len(seen.lost),
        "duplicated": len(seen.duplicated),
        "wrong": len(seen.wrong),
        "median_recovery_s": round(statistics.median(recoveries), 2),
        "per_kind": {kind: round(statistics.median(times), 2) for kind, times in found.items() if times},
        "of_which_start_s": round(start_s, 2),
        "leaks": left,
        "grown_mb": grown_mb,
        "problems": (seen.lost + seen.duplicated + seen.wrong)[:5] + ([f"exit status {status}"] if status else []),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    found = run(**vars(parser.parse_args()))
    print(json.dumps(found))
    return 1 if found["problems"] or found["leaks"] else 0


if __name__ == "__main__":
    sys.exit(main())
