"""A model with recurrent layers: prompts, output tokens, prefix hits and short requests, beside Transformers.

    python benchmarks/hybrids.py [--what prompts,hits,short,contexts] [--length 16384] [--repeats 1] [--json] [--save]

A Qwen3.5-like model of 106 M random weights, float32: 12 layers, of which every fourth has attention and the others the
gated delta rule. What is measured, each kind with engines of its own, which idle while others run; numbers are medians:

    prompts   first token and time per token of a long prompt: 1 x 1, 2 x 1, 1 x 2 ranks x threads, Transformers
    parts     first token of a long prompt on 1 x 1, and on 2 x 1 by the parts in which states are handed on
    hits      first token of the same prompt again, from pages and states that were kept, on 2 x 1
    short     time per token of a prompt of 512 tokens that lies on one of two ranks, and on a single one
    contexts  time per token behind 1,024 tokens and behind 65,536 on 2 x 1, and the floor of bytes of each
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common import LongspanRunner, Timing, TransformersRunner, median, parser, random_prompt, read_bandwidth, report

FIELDS = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "full_attention_interval": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "linear_num_key_heads": 6,
    "linear_num_value_heads": 12,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "vocab_size": 256,
    "max_position_embeddings": 2**18,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
SHORT, NEAR, FAR = 512, 1024, 65536
"""Tokens of prompts."""
NUM_TOKENS = 32


def make_hybrid(directory: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_5_text", **FIELDS)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def row(what: str, engine: str, prompt_len: int, timings: list[Timing], **more: Any) -> dict[str, Any]:
    return {
        "what": what,
        "engine": engine,
        "prompt tokens": prompt_len,
        "ttft_s": median(one.ttft_s for one in timings),
        "tpot_ms": median(one.tpot_s for one in timings) * 1e3,
        **more,
    }


def long_prompts(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    runners: list[Any] = [
        *(LongspanRunner(model, *size, placement="striped") for size in ((1, 1), (2, 1), (1, 2))),
        TransformersRunner(model, 2),
    ]
    timings: dict[str, list[Timing]] = {runner.name: [] for runner in runners}
    for repeat in range(options.repeats):
        prompt = random_prompt(options.length, repeat)
        for runner in runners:
            timings[runner.name].append(runner.run(prompt, NUM_TOKENS))
    for runner in runners:
        runner.close()
    first = next(iter(timings.values()))
    return [
        row(
            "prompts",
            name,
            options.length,
            own,
            same_tokens=all(a.token_ids == b.token_ids for a, b in zip(own, first, strict=True)),
        )
        for name, own in timings.items()
    ]


def state_parts(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    prompts = [random_prompt(options.length, repeat) for repeat in range(options.repeats)]
    runners = {"": LongspanRunner(model, 1, 1)}
    for num_parts in (1, 2, 4, 12, None):
        parts = "auto" if num_parts is None else str(num_parts)
        runners[parts] = LongspanRunner(model, 2, 1, placement="striped", state_parts=num_parts)
    timings: dict[str, list[Timing]] = {parts: [] for parts in runners}
    for prompt in prompts:
        for parts, runner in runners.items():
            timings[parts].append(runner.run(prompt, 2))
    rows = [row("parts", runners[parts].name, options.length, own, parts=parts) for parts, own in timings.items()]
    for runner in runners.values():
        runner.close()
    return [{**one, "speedup": rows[0]["ttft_s"] / one["ttft_s"]} for one in rows]


def prefix_hits(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    runner = LongspanRunner(model, 2, 1, placement="striped", enable_prefix_caching=True)
    prompts = [random_prompt(options.length, repeat) for repeat in range(options.repeats)]
    rows = []
    for what in ("computed", "hit"):
        timings = [runner.run(prompt, 2) for prompt in prompts]
        rows.append(row(what, runner.name, options.length, timings, cached=timings[0].num_cached))
    runner.close()
    return rows


def short_requests(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    runners = [LongspanRunner(model, 2, 1, placement="packed"), LongspanRunner(model, 1, 1)]
    timings: dict[str, list[Timing]] = {runner.name: [] for runner in runners}
    for repeat in range(5 * options.repeats):
        prompt = random_prompt(SHORT, repeat)
        for runner in runners:
            timings[runner.name].append(runner.run(prompt, NUM_TOKENS))
    for runner in runners:
        runner.close()
    return [row("short", name, SHORT, own) for name, own in timings.items()]


def contexts(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    bandwidth = read_bandwidth(2)
    runner = LongspanRunner(model, 2, 1, placement="striped", enable_prefix_caching=False)
    spec, rows = runner.engine.spec, []
    for length in (NEAR, FAR):
        timings = [runner.run(random_prompt(length, repeat), NUM_TOKENS) for repeat in range(options.repeats)]
        kv_bytes = length * sum(group.token_bytes for group in spec.kv_groups)
        floor_ms = (spec.weight_bytes + 2 * spec.state_bytes + kv_bytes) / bandwidth * 1e3
        rows.append(row("contexts", runner.name, length, timings, floor_ms=floor_ms))
    runner.close()
    return rows


KINDS = {
    "prompts": long_prompts,
    "parts": state_parts,
    "hits": prefix_hits,
    "short": short_requests,
    "contexts": contexts,
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--what", default=",".join(KINDS), help="what to measure")
    options.set_defaults(repeats=1)
    chosen = options.parse_args()
    kinds = chosen.what.split(",")
    with tempfile.TemporaryDirectory() as directory:
        model = make_hybrid(Path(directory))
        rows = [one for kind in kinds for one in KINDS[kind](model, chosen)]
    report("-".join(["hybrids", *kinds]), rows, {"runs per median": chosen.repeats}, chosen)


if __name__ == "__main__":
    main()
