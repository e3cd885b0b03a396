"""Predicted against measured: time to first token and per output token, by rank count and prompt length.

    python benchmarks/planner.py [--lengths 2048,8192,16384] [--ranks 1,2,4] [--repeats 1] [--json] [--save]

The ranks measure kernels and links when an engine starts; `longspan.costmodel.prompt_time` predicts with these numbers
before the engine runs. Ranks have one thread each. Engines of different rank counts run one after the other, each
started (and measured) again for every repeat: numbers are medians.
"""

from pathlib import Path
from typing import Any

from common import LongspanRunner, median, parser, random_model, random_prompt, report
from longspan.costmodel.model_time import StepOptions, predict_decode
from longspan.costmodel.prompt_time import predict_prefill
from longspan.costmodel.shapes import ModelShape
from longspan.models.shape import load_shape

STEP_S = 2e-3
"""Assumed, as `longspan plan` does: fixed time of a step outside its layers."""

NUM_TOKENS = 17

KEYS = ("ranks", "prompt")
"""Of a row."""


def compare(model: Path, shape: ModelShape, num_ranks: int, lengths: list[int], repeat: int) -> list[dict[str, Any]]:
    """One start of one engine: its measurement, predictions, and runs."""
    runner = LongspanRunner(model, num_ranks, 1, placement="striped", measure="again")
    costs = runner.engine.costs
    rows = []
    for length in lengths:
        options = StepOptions(step_s=STEP_S)
        prefill = predict_prefill(shape, length, costs, options)
        decode = predict_decode(shape, length, costs, options)
        # A seed of its own: the cache must know no prompt from a shorter one.
        timing = runner.run(random_prompt(length, 31 * length + repeat), NUM_TOKENS)
        rows.append(
            {
                "ranks": num_ranks,
                "prompt": length,
                "ttft_s predicted": prefill.total_s,
                "ttft_s": timing.ttft_s,
                "predicted / measured": prefill.total_s / timing.ttft_s,
                "dense_s": prefill.dense_s,
                "attention_s": prefill.attention_s,
                "tpot_ms predicted": decode.total_s * 1e3,
                "tpot_ms": timing.tpot_s * 1e3,
                "predicted / measured (tpot)": decode.total_s / timing.tpot_s,
                "matmul GFLOP/s": costs.rates.matmul_flops_per_s / 1e9,
                "attention GFLOP/s": costs.rates.attention_rate(512) / 1e9,
            }
        )
    runner.close()
    return rows


def medians(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Row by row over the repeats."""
    return [
        {**{name: median(row[name] for row in same) for name in same[0]}, **{name: same[0][name] for name in KEYS}}
        for same in zip(*runs, strict=True)
    ]


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(repeats=1)
    options.add_argument("--lengths", default="2048,8192,16384", help="tokens of the prompts, with commas")
    options.add_argument("--ranks", default="1,2,4", help="rank counts, with commas")
    chosen = options.parse_args()
    lengths, ranks = ([int(text) for text in value.split(",")] for value in (chosen.lengths, chosen.ranks))
    with random_model() as model:
        shape = load_shape(str(model), "float32")
        rows = []
        for num_ranks in ranks:
            rows += medians([compare(model, shape, num_ranks, lengths, repeat) for repeat in range(chosen.repeats)])
    facts = {"repeats": chosen.repeats, "threads per rank": 1, "placement": "striped", "step_s assumed": STEP_S}
    report("planner", rows, facts, chosen)


if __name__ == "__main__":
    main()
