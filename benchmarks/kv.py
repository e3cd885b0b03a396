"""First token and time per output token by the dtype of stored keys and values, on two ranks.

    python benchmarks/kv.py [--length 65536] [--tokens 48] [--repeats 3] [--dtypes auto,bfloat16,int8,fp8_e4m3] [--json]
                            [--save]

The model of `common.py` (22.4 M parameters, float32). Every dtype has an engine of two worker processes, which idle
while others run; prompts are the same, runs are interleaved, numbers are medians. The floor of a token is the bytes of
all weights and of the prompt's keys and values over the read bandwidth of two cores, measured in the same run.
"""

import argparse
from pathlib import Path
from typing import Any

from common import LongspanRunner, Timing, median, parser, random_model, random_prompt, read_bandwidth, report


def time_dtypes(model: Path, dtypes: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table, the first dtype being what ratios compare with."""
    bandwidth = read_bandwidth(2)
    shared: dict[str, Any] = {"placement": "striped", "enable_prefix_caching": False}
    runners = {dtype: LongspanRunner(model, 2, 1, kv_cache_dtype=dtype, **shared) for dtype in dtypes}
    timings: dict[str, list[Timing]] = {dtype: [] for dtype in dtypes}
    for repeat in range(options.repeats):
        prompt = random_prompt(options.length, repeat)
        for dtype, runner in runners.items():
            timings[dtype].append(runner.run(prompt, options.tokens))
    rows, first = [], timings[dtypes[0]]
    for dtype, runner in runners.items():
        spec, own = runner.engine.spec, timings[dtype]
        token_bytes = sum(group.token_bytes for group in spec.kv_groups)
        read = spec.weight_bytes + options.length * token_bytes
        ttft_s, tpot_s = median(one.ttft_s for one in own), median(one.tpot_s for one in own)
        rows.append(
            {
                "kv_cache_dtype": dtype,
                "KV per token, B": token_bytes,
                "ttft_s": ttft_s,
                f"ttft / {dtypes[0]}": ttft_s / median(one.ttft_s for one in first),
                "tpot_ms": tpot_s * 1e3,
                f"tpot / {dtypes[0]}": tpot_s / median(one.tpot_s for one in first),
                "floor_ms": read / bandwidth * 1e3,
            }
        )
        runner.close()
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=48, help="tokens to generate")
    options.add_argument("--dtypes", default="auto,bfloat16,int8,fp8_e4m3", help="values of --kv-cache-dtype")
    options.set_defaults(length=65536)
    chosen = options.parse_args()
    with random_model() as model:
        rows = time_dtypes(model, chosen.dtypes.split(","), chosen)
        report("kv", rows, {"prompt tokens": chosen.length, "ranks x threads": "2 x 1"}, chosen)


if __name__ == "__main__":
    main()
