"""A rank of two processes beside a rank of two threads, and vLLM with tensor parallelism: the same weights, two cores.

    python benchmarks/tensor_parallel.py [--model 500m] [--length 4096] [--repeats 3] [--peers vllm|none] [--json]
                                         [--save]

Takes about 10 minutes. Random float32 weights. How engines are run is in `compare.py`; here they are

    longspan 1 x 2             one process with two threads
    longspan TP 2 x 1          one rank of two processes with a thread each
    vllm TP 2 x 1              vLLM's two processes with a thread each
"""

import tempfile
from pathlib import Path

import transformers

from common import parser, report
from peers.engines import LONGSPAN_1X2, LONGSPAN_TP2, VLLM_TP2, Task, parse_cores
from peers.measure import Comparison
from peers.models import SIZES, make

NUM_TOKENS = 48
GOALS = {LONGSPAN_1X2.name: 1.15, VLLM_TP2.name: 0.95}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", choices=sorted(SIZES), default="500m", help="the model, by its name in compare.py")
    options.add_argument("--peers", choices=("vllm", "none"), default="vllm", help="what to compare with")
    options.set_defaults(length=4096)
    chosen = options.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    engines = [LONGSPAN_1X2, LONGSPAN_TP2, *([VLLM_TP2] if chosen.peers == "vllm" else [])]
    with tempfile.TemporaryDirectory() as directory:
        model = make(SIZES[chosen.model], Path(directory) / chosen.model)
        task = Task(model, chosen.length, NUM_TOKENS, parse_cores("0,1"))
        comparison = Comparison(task, chosen.model, engines)
        found = {row["engine"]: row for row in comparison.rows(comparison.run(chosen.repeats), LONGSPAN_1X2.name)}
        facts = comparison.facts()
    rows = []
    for name, goal in GOALS.items():
        ours, theirs = found.get(LONGSPAN_TP2.name), found.get(name)
        if ours is None or theirs is None:
            continue
        for metric, what in (("ttft_s", "first token"), ("tpot_s", "per output token")):
            rows.append(
                {
                    "what": what,
                    f"{LONGSPAN_TP2.name}, ms": ours[metric] * 1e3,
                    "beside": name,
                    "its ms": theirs[metric] * 1e3,
                    "ratio": ours[metric] / theirs[metric],
                    "goal": f"<= {goal}",
                    "floor, ms": ours[metric.replace("_s", "_floor_s")] * 1e3,
                    "tokens agree": f"{ours['first_difference'].count(None)} of {len(ours['first_difference'])}",
                }
            )
    memory = {name: [round(peak / 1e6) for peak in row["peaks_bytes"]] for name, row in found.items()}
    notes = {"weights, MB": round(facts["weights_bytes"] / 1e6), "peaks of processes, MB": str(memory)}
    report("tensor-parallel", rows, {**notes, "failures": str(comparison.failures)}, chosen)
    return 1 if comparison.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
