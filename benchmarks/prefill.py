"""Time to first token of one long prompt, per rank count, beside Transformers and the floor.

    python benchmarks/prefill.py [--length 16384] [--repeats 3] [--json] [--save]

Runs are interleaved, numbers are medians. The floor is the prompt's flops over the matrix product rate of the same
number of cores, measured in the same run. With `--memory` it measures instead what a worker holds at most beside its KV
with `pass_kv` forced, per rank count and context: the ring's blocks are of fixed size, so that stays flat.
"""

from pathlib import Path
from typing import Any

from common import (
    LongspanRunner,
    interleaved,
    matmul_rate,
    median,
    parser,
    random_model,
    random_prompt,
    report,
    work,
)


def time_prefill(model: Path, length: int, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and the facts above it."""
    rates = {threads: matmul_rate(threads) for threads in (1, 2)}
    flops = work(model, length).prefill_flops
    cores, timings, agree = interleaved(model, length, 1, repeats)
    ttft_s = {name: median(timing.ttft_s for timing in several) for name, several in timings.items()}
    rows = [
        {
            "engine (ranks x threads)": name,
            "ttft_s": ttft_s[name],
            "floor_s": flops / rates[cores[name]],
            "floor / ttft": flops / rates[cores[name]] / ttft_s[name],
            "speed-up over longspan 1 x 1": ttft_s["longspan 1 x 1"] / ttft_s[name],
        }
        for name in timings
    ]
    facts = {
        "prompt tokens": length,
        "flops": f"{flops / 1e12:.2f} T",
        "matmul rate, 1 thread": f"{rates[1] / 1e9:.0f} GFLOP/s",
        "matmul rate, 2 threads": f"{rates[2] / 1e9:.0f} GFLOP/s",
        "all engines agree on the first token": agree,
    }
    return rows, facts


def _status_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure_memory(model: Path) -> list[dict[str, Any]]:
    """Peak memory of a worker process without its KV, in prefills of growing length with `pass_kv` forced."""
    rows = []
    for num_ranks in (2, 4):
        runner = LongspanRunner(model, num_ranks, 1, placement="striped", strategy="pass_kv")
        runner.run(random_prompt(8192, 98), 1)  # what is allocated once is there now
        pids = [member.hello.pid for member in runner.engine.executor.membership.members]
        for length in (8192, 16384, 32768):
            runner.run(random_prompt(length, 1), 1)
            kv = [stats.kv_bytes for stats in runner.engine.rank_stats()]
            peaks = [_status_bytes(pid, "VmHWM") - held for pid, held in zip(pids, kv, strict=True)]
            rows.append(
                {
                    "ranks": num_ranks,
                    "context": length,
                    "KV per rank, MiB": max(kv) / 2**20,
                    "peak memory without KV, MiB": max(peaks) / 2**20,
                }
            )
        runner.close()
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--memory", action="store_true", help="measure the temporary memory of pass_kv instead")
    chosen = options.parse_args()
    with random_model() as model:
        if chosen.memory:
            report("pass-kv-memory", measure_memory(model), {"strategy": "pass_kv, blocks of 2048 tokens"}, chosen)
        else:
            rows, facts = time_prefill(model, chosen.length, chosen.repeats)
            report("prefill", rows, facts, chosen)


if __name__ == "__main__":
    main()
