"""Time per output token behind one long prompt, per rank count, beside Transformers and the floor.

    python benchmarks/decode.py [--length 16384] [--tokens 64] [--repeats 3] [--json] [--save]

Runs are interleaved, numbers are medians. The floor is the bytes of all weights and of the prompt's KV over the read
bandwidth of the same number of cores, measured in the same run.
"""

from pathlib import Path
from typing import Any

from common import (
    interleaved,
    median,
    parser,
    random_model,
    read_bandwidth,
    report,
    work,
)
from longspan.native import kernels


def time_decode(model: Path, length: int, num_tokens: int, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and the facts above it."""
    bandwidths = {threads: read_bandwidth(threads) for threads in (1, 2)}
    num_bytes = work(model, length).decode_bytes
    cores, timings, agree = interleaved(model, length, num_tokens, repeats)
    rows = []
    for name, several in timings.items():
        tpot_s, floor_s = median(timing.tpot_s for timing in several), num_bytes / bandwidths[cores[name]]
        rows.append(
            {
                "engine (ranks x threads)": name,
                "tpot_ms": tpot_s * 1e3,
                "floor_ms": floor_s * 1e3,
                "tpot / floor": tpot_s / floor_s,
            }
        )
    facts = {
        "prompt tokens": length,
        "bytes per token": f"{num_bytes / 1e6:.0f} MB",
        "read bandwidth, 1 thread": f"{bandwidths[1] / 1e9:.1f} GB/s",
        "read bandwidth, 2 threads": f"{bandwidths[2] / 1e9:.1f} GB/s",
        "compiled kernels": kernels.is_available(),
        f"all engines agree on {num_tokens} tokens": agree,
    }
    return rows, facts


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    chosen = options.parse_args()
    with random_model() as model:
        rows, facts = time_decode(model, chosen.length, chosen.tokens, chosen.repeats)
        report("decode", rows, facts, chosen)


if __name__ == "__main__":
    main()
