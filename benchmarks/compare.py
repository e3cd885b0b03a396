"""longspan beside Transformers, vLLM and llama.cpp: the same weights, prompts and two cores, in one run.

    python benchmarks/compare.py [--models 20m,500m] [--lengths 1024,16384,65536] [--tokens 48] [--repeats 3]
                                 [--peers transformers,vllm,llamacpp|none] [--cores 0,1]
                                 [--neighbours none|low|equal|server] [--json] [--save]

Takes about an hour by default (model 20m; prompts of 1k and 16k tokens three times, of 64k once); `--models 500m` takes
another, at 1k and 16k only, and each model of `families.py` half an hour. Needs two cores, 24 GiB of memory and, for
vLLM and llama.cpp, pip, a C++ compiler and 4 GB of disk: they get environments of their own in `benchmarks/.peers` (see
`peers/environments.py`).

Every engine is a process group of its own, with random float32 weights from the same files. All are started for each
model and length, one after the other, and warmed up; then each repeat gives one new prompt to one engine after the
other, while all others are stopped. Greedy decoding, a fixed number of tokens, times as tokens arrive, medians.

Settings: what a user gets by default, with both cores. longspan: 1 rank x 2 threads, 2 x 1, and 1 x 1 for the speed-up.
vLLM: compiled, 2048 tokens per step (the whole prompt in one step and eager mode were slower), its threads bound to the
cores (its default leaves one idle), Intel's OpenMP preloaded as its documentation asks. llama.cpp: no flash attention;
its cache in F16, its default, and in F32 like everyone's. The floor: flops over the rate of `torch.mm`, bytes over the
read bandwidth, of both cores, in this run. An engine with a faster matrix product than `torch.mm` can be below the
first one, so oneDNN's rate is printed too.

`--neighbours` measures each engine beside other programs on the same cores (`peers/neighbours.py`).

Memory is the peak of an engine's largest compute process (VmHWM) after the first prompt, above what a process holds
that has made the same imports and loaded nothing. Agreement is against Transformers' tokens: the index of the first
token that differs, per repeat.
"""

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import transformers

from common import hardware, print_table, result_path
from peers.engines import PEERS, TRANSFORMERS, Task, chosen, parse_cores
from peers.environments import InstallationError
from peers.goals import goal_table
from peers.measure import Comparison, say, write_gguf
from peers.models import SIZES, BenchmarkModel, make
from peers.neighbours import NEIGHBOURS
from peers.plot import draw

LONG = 32768
"""Longer prompts run once: one takes minutes per engine."""


def names(text: str, legal: tuple[str, ...]) -> list[str]:
    """Of a list with commas."""
    chosen_names = list(dict.fromkeys(text.split(",")))
    for name in chosen_names:
        if name not in legal:
            raise argparse.ArgumentTypeError(f"got {name!r}, legal are {', '.join(legal)}, separated by commas")
    return chosen_names


def lengths(text: str) -> list[int]:
    """Tokens of prompts, ascending."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = [0]
    if not 64 <= numbers[0] <= numbers[-1] <= 2**17:
        raise argparse.ArgumentTypeError(f"got {text!r}, legal are numbers from 64 to {2**17}, separated by commas")
    return numbers


def count(low: int, high: int) -> Any:
    """The type of a whole number within limits."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"got {text!r}, legal is a whole number from {low} to {high}")
        return int(text)

    return parse


def cores(text: str) -> tuple[int, int]:
    """Two cores that this process may use."""
    allowed = os.sched_getaffinity(0)
    try:
        found = parse_cores(text)
    except ValueError:
        found = (-1, -1)
    if not set(found) <= allowed:
        usable = ",".join(map(str, sorted(allowed)))
        raise argparse.ArgumentTypeError(f"got {text!r}, legal are two different numbers out of {usable}, such as 0,1")
    return found


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Exits with an error that names the option, the value and the legal values."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", type=lambda text: names(text, tuple(SIZES)), default=["20m"])
    options.add_argument("--lengths", type=lengths, default=[1024, 16384, 65536], help="tokens of prompts")
    options.add_argument("--peers", type=lambda text: names(text, (*PEERS, "none")), default=list(PEERS))
    options.add_argument("--tokens", type=count(2, 1024), default=48, help="tokens to generate")
    options.add_argument(
        "--repeats", type=count(1, 100), default=3, help=f"up to {LONG} tokens; longer prompts run once"
    )
    options.add_argument("--cores", type=cores, help="two cores for all engines; default: the first two allowed")
    options.add_argument("--neighbours", choices=NEIGHBOURS, default="none", help="other programs on the same cores")
    options.add_argument("--json", action="store_true", help="print the result as JSON")
    options.add_argument("--save", action="store_true", help="write it, and a plot, to benchmarks/results/")
    parsed = options.parse_args(arguments)
    if parsed.cores is None:
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) < 2:
            options.error(f"--cores: got 1 core ({allowed[0]}) that this process may use, legal is 2 or more")
        parsed.cores = (allowed[0], allowed[1])
    return parsed


def compare_model(
    size: BenchmarkModel, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """Rows, facts per length, and what failed."""
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        model = make(size, Path(directory) / size.name)
        if "llamacpp" in options.peers and size.has_gguf:
            write_gguf(model)
        for length in options.lengths:
            if length > size.max_length:
                say(f"{size.name} at {length} tokens is left out: its limit is {size.max_length} (too slow beyond)")
                continue
            repeats = 1 if length > LONG else options.repeats
            say(f"{size.name}, {length} tokens, {repeats} times")
            task = Task(model, length, options.tokens, options.cores)
            comparison = Comparison(task, size.name, chosen(size, length, options.peers), options.neighbours)
            measured = comparison.run(repeats)
            rows += comparison.rows(measured, TRANSFORMERS.name)
            facts[f"{size.name} {length}"] = comparison.facts() | {"repeats": repeats}
            failures += comparison.failures
    return rows, facts, failures


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the printed table."""
    differences = row["first_difference"]
    agrees = sum(index is None for index in differences)
    firsts = sorted(index for index in differences if index is not None)
    return {
        "model": row["model"],
        "prompt": row["length"],
        "engine (ranks x threads)": row["engine"],
        "ttft_s": row["ttft_s"],
        "/ floor": row["ttft / floor"],
        "tpot_ms": row["tpot_s"] * 1e3,
        "/ floor ": row["tpot / floor"],
        "peak MiB per rank": round(row["peak_bytes"] / 2**20),
        "tokens agree": f"{agrees} of {len(differences)}" + (f", else from token {firsts[0]}" if firsts else ""),
    }


def print_result(result: dict[str, Any]) -> None:
    """Facts, the table, the goals."""
    print(f"{result['date']}, {result['hardware']['cpu']}, cores {result['options']['cores']}")
    for name, facts in result["facts"].items():
        onednn = facts["onednn_flops_per_s"]
        print(
            f"{name}: {facts['prefill_flops'] / 1e12:.2f} Tflop at {facts['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s "
            f"(oneDNN: {'none' if onednn is None else round(onednn / 1e9)}), {facts['decode_bytes'] / 1e6:.0f} MB per "
            f"token at {facts['read_bytes_per_s'] / 1e9:.1f} GB/s, {facts['repeats']} repeats"
        )
    print()
    print_table([shown(row) for row in result["rows"]])
    print()
    print_table(result["goals"])
    for failure in result["failures"]:
        print(f"\nFAILED: {failure}")


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    os.sched_setaffinity(0, options.cores)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    failures: list[str] = []
    try:
        for name in options.models:
            more_rows, more_facts, more_failures = compare_model(SIZES[name], options)
            rows, facts, failures = rows + more_rows, facts | more_facts, failures + more_failures
    except InstallationError as error:
        print(
            f"compare: {error}; peers/environments.py says what pip needs, --peers leaves a peer out", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("compare: interrupted; all engines are ended", file=sys.stderr)
        return 130
    result = {
        "theme": "compare",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": hardware(),
        "options": vars(options),
        "facts": facts,
        "rows": rows,
        "goals": goal_table(rows),
        "failures": failures,
    }
    text = json.dumps(result, indent=1)
    if options.save:
        theme = "compare" if options.neighbours == "none" else f"neighbours-{options.neighbours}"
        result_path(theme, "json").write_text(text + "\n")
        draw(rows, result_path(theme, "png"))
    if options.json:
        print(text)
    else:
        print_result(result)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
