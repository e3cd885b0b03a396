"""How an engine in a process of its own is asked to run prompts: one JSON object per line, over its standard streams.

Holds the engine's end. Must not import longspan, or anything outside the standard library: peers live in environments
of their own.
Read next: `peers/process.py`, the other end.

    argv    DRIVER.py '{"model": ..., ...}'      options of this driver
    stdout  {"facts": {"version": ...}}          once, when the engine is loaded and warm
    stdin   {"prompt": [3, 1, ...], "num_tokens": 64}
    stdout  {"ttft_s": 1.2, "tpot_s": 0.01, "token_ids": [...], "num_cached": 0}

The end of standard input ends the engine. `DRIVER.py imports` prints {"rss_bytes": ...} instead: what a process holds
that has imported all that the engine imports, and loaded nothing.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """What a driver wraps."""

    facts: dict[str, Any]
    """Versions, and settings worth knowing beside the numbers."""

    def run(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        """Greedy decoding to exactly `num_tokens`. Returns the answer's fields."""
        ...

    def close(self) -> None: ...


class Stopwatch:
    """Takes the time of every token as it arrives."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._times: list[float] = []

    def token(self) -> None:
        self._times.append(time.perf_counter() - self._started)

    def answer(self, token_ids: list[int], num_cached: int = 0) -> dict[str, Any]:
        """The answer's fields. `tpot_s` is None after a single token."""
        assert len(self._times) == len(token_ids), "every token's arrival is taken"
        first, last, gaps = self._times[0], self._times[-1], len(token_ids) - 1
        return {
            "ttft_s": first,
            "tpot_s": (last - first) / gaps if gaps else None,
            "token_ids": token_ids,
            "num_cached": num_cached,
        }


def warm_up_prompt(vocab_size: int = 256) -> list[int]:
    """256 tokens that no measured prompt starts with: those are random."""
    return [(7 * i) % vocab_size for i in range(256)]


def serve(import_all: Callable[[], None], start: Callable[[dict[str, Any]], Engine]) -> None:
    """Main function of a driver."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to standard error

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    if sys.argv[1] == "imports":
        import_all()
        say({"rss_bytes": _rss_bytes()})
        return
    engine = start(json.loads(sys.argv[1]))
    engine.run(warm_up_prompt(), 8)
    say({"facts": engine.facts})
    for line in sys.stdin:
        request = json.loads(line)
        say(engine.run(request["prompt"], request["num_tokens"]))
    engine.close()


def _rss_bytes() -> int:
    """Resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
