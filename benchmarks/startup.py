"""From the command to the first token of a short prompt, to the end, and to a server that is ready.

    python benchmarks/startup.py [--ranks 1 2 4 8] [--repeats 5] [--json] [--save]

Seconds since the command was given, medians of interleaved starts with warm caches; `first start` has no cache of its
own: it builds `recall` and measures what the cost model needs. The floor is what nobody can start without: one process
that imports torch and Transformers' model code, without garbage collection, on a machine that does nothing else.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import report

ANSWER = "4711"
QUESTION = "The number of the safe is "
PROMPT = f"{QUESTION}{ANSWER}. Once more: {QUESTION}"
FLOOR = "import gc; gc.disable(); import os, transformers.modeling_utils; os._exit(0)"
STARTED = Path(__file__).with_name("timed_command.py")


def floor_s() -> float:
    """Of one process alone."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", FLOOR], check=True)
    return time.monotonic() - started


def generate(num_ranks: int, cache: Path | None = None) -> dict[str, float]:
    """One start of `longspan generate`. Args: `cache` replaces the user's cache directory."""
    environment = dict(os.environ) if cache is None else {**os.environ, "XDG_CACHE_HOME": str(cache)}
    with tempfile.TemporaryDirectory() as directory:
        times, zero = Path(directory) / "times.json", time.monotonic()
        command = [sys.executable, str(STARTED), str(times), str(zero), "generate", "recall", "--stop", "."]
        command += ["--context-parallel-size", str(num_ranks), "--prompt", PROMPT]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        end_s = time.monotonic() - zero
        assert done.stdout.strip() == ANSWER, done.stdout
        return {**json.loads(times.read_text()), "end_s": end_s}


def serve_s(num_ranks: int) -> float:
    """Until `longspan serve` says that it is ready."""
    zero = time.monotonic()
    command = [sys.executable, "-m", "longspan", "serve", "recall", "--port", "0"]
    command += ["--context-parallel-size", str(num_ranks)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        is_ready = any("ready at" in line for line in server.stderr)
        ready_s = time.monotonic() - zero
        server.send_signal(signal.SIGTERM)
        assert is_ready
        return ready_s


def measure(num_ranks: int) -> dict[str, float]:
    """All kinds of starts, once."""
    times = generate(num_ranks)
    with tempfile.TemporaryDirectory() as cache:
        times["first_start_s"] = generate(num_ranks, Path(cache))["first_token_s"]
    return {**times, "serve_ready_s": serve_s(num_ranks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5, help="medians of so many interleaved starts")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--save", action="store_true", help="write it to benchmarks/results/")
    options = parser.parse_args()
    for num_ranks in options.ranks:
        generate(num_ranks)  # fills the caches
    floors: list[float] = []
    found: dict[int, list[dict[str, float]]] = {num_ranks: [] for num_ranks in options.ranks}
    for _ in range(options.repeats):
        floors.append(floor_s())
        for num_ranks, starts in found.items():
            starts.append(measure(num_ranks))
    rows: list[dict[str, Any]] = [
        {"ranks": num_ranks, **{name: statistics.median(start[name] for start in starts) for name in starts[0]}}
        for num_ranks, starts in found.items()
    ]
    report("startup", rows, {"floor_s": statistics.median(floors), "repeats": options.repeats}, options)


if __name__ == "__main__":
    main()
