"""What longspan does on this machine's GPU, beside what the GPU can do. One command, nothing to download.

    python benchmarks/gpu.py [--budget-s 420] [--parts kernels,engine,...] [--lengths 8k,64k,128k,longest] [--save]

    kernels    our prefill, decode and merge, in per cent of a matrix product's flops or a copy's bytes, measured here
    engine     a Llama of 8 billion random weights: time to the first token, and per token with CUDA graphs; beside the
               floor of bytes and flops
    launched   the same without CUDA graphs
    libraries  prefill and decode of the other backends that are installed
    share      attention of one rank's share of a prompt of a million tokens on 2, 4 and 8 ranks, one layer
    checks     every backend beside the reference: head sizes, dtypes, softcaps, windows
    compiled   as `engine`, with compiled norms and MLPs
    scaling    the same Llama on 1, 2, 4, 8 GPUs, as many as there are: it writes 16 GB

Needs torch, triton and transformers, and of longspan's requirements msgspec, pyzmq and platformdirs; longspan itself
need not be installed. Every part is a process of its own with a time limit, so that none can take the others' figures
with it; its rows are printed, and with --save written, as they come. --budget-s takes parts in the order above while
their expected time lasts, which nobody has measured yet. Last comes a table of the goals of docs/gpus.md.

FlashInfer is measured where it is installed. On a machine without a network that takes its wheel and that of
apache-tvm-ffi (pip install --no-deps), and modules that were built before for the same GPU, in
flashinfer/data/aot/NAME/NAME.so, with FLASHINFER_DISABLE_JIT=1; else it compiles for minutes. Our own kernels compile
in seconds, on first use.

`longest` is the longest prompt that the memory left for KV holds, or that is computed in --most-s. `--smoke` runs
everything at tiny sizes, in Triton's interpreter on a CPU, to show that the program works: its times mean nothing, and
cannot be saved.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
REQUIRED = {"msgspec": "msgspec", "zmq": "pyzmq", "platformdirs": "platformdirs"}
"""Modules that longspan needs here beside torch, triton and transformers, and the packages that have them."""

Row = dict[str, Any]


class Part(NamedTuple):
    """A part, by its value: the first ones are worth most."""

    expected_s: float
    """Seconds that it is expected to take on an H200."""
    limit_s: float


PARTS = {
    "kernels": Part(60, 180),
    "engine": Part(150, 400),
    "launched": Part(90, 300),
    "libraries": Part(45, 180),
    "share": Part(60, 240),
    "checks": Part(60, 240),
    "compiled": Part(120, 400),
    "scaling": Part(600, 1800),
}


class Goal(NamedTuple):
    """A line of the table in docs/gpus.md."""

    what: str
    goal: str
    measured: Callable[[Sequence[Row]], float | None]


def best(column: str, lowest: bool = False, **wanted: str) -> Callable[[Sequence[Row]], float | None]:
    """Best number in a column of the rows whose other columns hold some texts; None without such rows."""

    def of(rows: Sequence[Row]) -> float | None:
        found = [
            row[column] for row in rows if column in row and all(t in str(row.get(c, "")) for c, t in wanted.items())
        ]
        return (min if lowest else max)(found, default=None)

    return of


GOALS = [
    Goal("prefill, best backend, 8k queries x 64k keys and more", "65 %", best("% of ceiling", kernel="prefill")),
    Goal("prefill, triton", "45 %", best("% of ceiling", kernel="prefill", backend="triton")),
    Goal("decode, 16 x 16384 keys, merge included", "80 %", best("% of ceiling", kernel="decode", shape="16 x 16384")),
    Goal("decode, one request, 128k keys", "70 %", best("% of ceiling", kernel="decode", shape="1 x 131072 ")),
    Goal("merge of 8 partials, at least 100 MB", "70 %", best("% of ceiling", kernel="merge")),
    Goal(
        "decode step of an 8 B Llama at 128k, with graphs",
        "1.25 x floor",
        best("x floor of bytes", lowest=True, part="engine", prompt="131072"),
    ),
]


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, of this program and of its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help=f"of {', '.join(PARTS)}; else as many as fit into --budget-s")
    parser.add_argument("--budget-s", type=float, default=600.0, help="seconds for all parts together")
    parser.add_argument("--lengths", default="8k,64k,128k,longest", help="of prompts, with k and M")
    parser.add_argument("--repeats", type=int, default=3, help="medians of so many requests")
    parser.add_argument("--most-s", type=float, default=60.0, help="of prefill of the longest prompt")
    parser.add_argument("--chunk", type=int, default=8192, help="most tokens of a step")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--json", action="store_true", help="print JSON at the end")
    parser.add_argument("--save", action="store_true", help="write it to benchmarks/results/, after every row")
    parser.add_argument("--out", type=Path, help="with --save: write it to this file")
    chosen = parser.parse_args(arguments)
    unknown = [part for part in (chosen.parts or "").split(",") if part and part not in PARTS]
    if unknown:
        parser.error(f"--parts: got {', '.join(unknown)}, legal is {', '.join(PARTS)}")
    if chosen.smoke and chosen.save:
        parser.error("--save: got it with --smoke, whose times mean nothing")
    return chosen


def pick(budget_s: float, num_gpus: int) -> list[str]:
    """Parts in the order of their value, while their expected seconds fit into a budget."""
    picked: list[str] = []
    for name, part in PARTS.items():
        if part.expected_s <= budget_s and (name != "scaling" or num_gpus > 1):
            picked.append(name)
            budget_s -= part.expected_s
    return picked


def missing_packages() -> list[str]:
    """Packages to install."""
    needed = {"torch": "torch", "triton": "triton", "transformers": "transformers", **REQUIRED}
    return [package for module, package in needed.items() if find_spec(module) is None]


def run_part(command: Sequence[str], limit_s: float) -> Iterator[Row]:
    """Run a part as a process; yield its rows as they come, and one that says what went wrong, if anything did.

    Args:
        command: program and arguments; the file for rows is added.
        limit_s: seconds after which the process is killed.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), *sys.path[1:]])}
    if "--smoke" in command:
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows"
        path.touch()
        said = path.with_name("said")
        deadline = time.monotonic() + limit_s
        with said.open("w") as output, path.open() as rows:
            process = subprocess.Popen(
                [*command, str(path)], stdout=output, stderr=output, env=environment, start_new_session=True
            )
            try:
                while True:
                    ended = process.poll() is not None  # asked first: a process that has ended writes no more
                    line = rows.readline()
                    if line.endswith("\n"):
                        yield json.loads(line)
                    elif ended or time.monotonic() > deadline:
                        break
                    else:
                        rows.seek(rows.tell() - len(line))
                        time.sleep(0.2)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, 9)
                process.wait()
        if process.returncode:
            last = [line for line in said.read_text(errors="replace").splitlines() if line.strip()][-1:]
            late = time.monotonic() > deadline
            yield {
                "failed": f"took more than {limit_s:.0f} s" if late else f"{process.returncode}: {' '.join(last)[:300]}"
            }


def goals(rows: Sequence[Row]) -> list[Row]:
    """The goals, each beside what was measured."""
    return [{"what": g.what, "goal": g.goal, "measured": g.measured(rows) or "not measured"} for g in GOALS]


def print_table(rows: Sequence[Row]) -> None:
    """Columns in the order in which rows name them."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    for row in cells:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)), flush=True)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(result: dict[str, Any], chosen: argparse.Namespace) -> None:
    """If asked to; after every row, so that nothing is lost with a later one."""
    if chosen.save:
        gpu = str(result["hardware"].get("gpu", "unknown")).lower().replace(" ", "-")
        name = f"gpu-{datetime.now(UTC).strftime('%Y-%m-%d')}-{gpu}.json"
        path = chosen.out or HERE / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    chosen = options()
    if missing := missing_packages():
        sys.exit(f"gpu.py: pip install {' '.join(missing)}")
    started = time.monotonic()
    rows: list[Row] = []
    result: dict[str, Any] = {
        "theme": "gpu",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": {},
        "rows": rows,
    }
    command = [sys.executable, str(HERE / "gpu_parts.py")]
    for row in run_part([*command, "hardware", *sys.argv[1:], "--rows"], 120):
        result["hardware"] = row
    if "failed" in result["hardware"]:
        sys.exit(f"gpu.py: {result['hardware']['failed']}")
    print_table([result["hardware"]])
    names = chosen.parts.split(",") if chosen.parts else pick(chosen.budget_s, result["hardware"].get("gpus", 0))
    for name in names:
        left_s = chosen.budget_s - (time.monotonic() - started)
        limit_s = PARTS[name].limit_s if chosen.parts else min(PARTS[name].limit_s, left_s)
        if limit_s < 10:
            rows.append({"part": name, "failed": "no time was left"})
            continue
        for row in run_part([*command, name, *sys.argv[1:], "--rows"], limit_s):
            rows.append({"part": name, **row})
            print(", ".join(f"{key} {_cell(value)}" for key, value in rows[-1].items()), flush=True)
            save(result, chosen)
    result["goals"] = goals(rows)
    save(result, chosen)
    print()
    print_table(result["goals"])
    if chosen.json:
        print()
        print(json.dumps(result, indent=1))
    if any("failed" in row or str(row.get("result", "")).startswith(("WRONG", "FAILED")) for row in rows):
        sys.exit("some kernels are wrong, or parts failed: see the rows above")


if __name__ == "__main__":
    main()
