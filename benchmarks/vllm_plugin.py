"""vLLM with longspan's plugin beside vLLM alone: the same weights, prompts and two cores, in one run.

    python benchmarks/vllm_plugin.py [--model 20m|gpt_oss|...] [--length 16384] [--short 512] [--repeats 3]
                                     [--only short] [--json] [--save]

Takes about 6 minutes; `--only long` or `--only short` takes half of it, and has a result file of its own. vLLM's CPU
build gets an environment of its own in `benchmarks/.peers`, longspan in it (`peers/environments.py` says what pip
needs). Random float32 weights, 22 M parameters unless `--model` names another one of `peers/models.py`. How engines are
run is in `compare.py`; here they are

    vllm TP 2 x 1              one prompt over both cores as vLLM can: half of the heads on each
    vllm with longspan 2 x 1   half of the tokens on each
    vllm 1 x 1                 one core: what a short request, which stays on one rank, is compared to

All have KV memory for the same number of tokens. So a rank of longspan has half of what the lone rank has, and what it
could hold with as much is printed too.
"""

import tempfile
from pathlib import Path
from typing import Any

import transformers

from common import parser, report
from peers.engines import VLLM_1X1, VLLM_LONGSPAN, VLLM_TP2, Task, parse_cores
from peers.measure import Comparison
from peers.models import SIZES, make

NUM_TOKENS = 48


def measure(
    name: str, model: Path, length: int, repeats: int, engines: list[Any]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Rows by engine, and what failed."""
    comparison = Comparison(Task(model, length, NUM_TOKENS, parse_cores("0,1")), name, engines)
    rows = comparison.rows(comparison.run(repeats), engines[0].name)
    return {row["engine"]: row for row in rows}, comparison.failures


def kv_tokens_per_byte(row: dict[str, Any]) -> float:
    """Of one rank's memory."""
    facts = row["settings"]
    return float(facts["kv_tokens"] / facts["kv_bytes_per_rank"])


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--short", type=int, default=512, help="tokens of a short prompt, which stays on one rank")
    options.add_argument("--only", choices=("long", "short"), help="measure prompts of one length")
    options.add_argument("--model", choices=sorted(SIZES), default="20m", help="the model, by its name in compare.py")
    chosen = options.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        size = SIZES[chosen.model]
        model = make(size, Path(directory) / size.name)
        long, short, failures = {}, {}, []
        if chosen.only != "short":
            long, failures = measure(
                size.name, model, chosen.length, chosen.repeats, [VLLM_TP2, VLLM_LONGSPAN, VLLM_1X1]
            )
        if chosen.only != "long":
            short, more_failures = measure(
                size.name, model, chosen.short, 5 * chosen.repeats, [VLLM_1X1, VLLM_LONGSPAN]
            )
            failures += more_failures
    rows = []
    # vLLM's CPU build cannot run every model with tensor parallelism: what lives is what there is to compare with.
    beside_long = VLLM_TP2.name if VLLM_TP2.name in long else VLLM_1X1.name
    for name, found, stock, goal_of in (
        ("long", long, beside_long, {"ttft_s": 0.9, "tpot_s": 0.75}),
        ("short", short, VLLM_1X1.name, {"ttft_s": 1.0, "tpot_s": 0.9}),
    ):
        for metric, goal in goal_of.items():
            ours, theirs = found.get(VLLM_LONGSPAN.name), found.get(stock)
            if ours is None or theirs is None:
                continue
            rows.append(
                {
                    "prompt": f"{name}, {chosen.length if name == 'long' else chosen.short} tokens",
                    "what": "first token" if metric == "ttft_s" else "per output token",
                    "with longspan, ms": ours[metric] * 1e3,
                    "beside": stock,
                    "its ms": theirs[metric] * 1e3,
                    "ratio": ours[metric] / theirs[metric],
                    "goal": f"<= {goal}",
                    "tokens agree": f"{ours['first_difference'].count(None)} of {len(ours['first_difference'])}",
                }
            )
    if {VLLM_LONGSPAN.name, VLLM_1X1.name} <= long.keys():
        ours, theirs = (kv_tokens_per_byte(long[name]) for name in (VLLM_LONGSPAN.name, VLLM_1X1.name))
        rows.append(
            {"prompt": "longest", "what": "at the same KV memory per rank", "ratio": ours / theirs, "goal": ">= 1.98"}
        )
    settings = {name: row["settings"] for name, row in (long or short).items()}
    parts = ["vllm-plugin", *([chosen.only] if chosen.only else []), *([size.name] if chosen.model != "20m" else [])]
    report("-".join(parts), rows, {"settings": str(settings), "failures": str(failures)}, chosen)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
