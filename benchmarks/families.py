"""Mixtures of experts, sinks, chunks and latents: time of a long prompt and of its output tokens, per rank count.

    python benchmarks/families.py [--models moe,gpt_oss] [--length 8192] [--tokens 32] [--repeats 3] [--json] [--save]

Models have random float32 weights, about 100 M of which a token meets (`--models` names some). longspan with one rank
and two, and Transformers with two threads, take turns; numbers are medians. The floor of a prompt is the flops of the
weights that its tokens meet over the matrix product rate of the same cores; attention is not counted in it.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common import interleaved, matmul_rate, median, parser, report
from longspan.models.inspect import inspect_model

_COMMON = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 256,
    "max_position_embeddings": 2**18,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dense": ("llama", {"intermediate_size": 3072}),
    "moe": (
        "qwen3_moe",
        {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 384, "intermediate_size": 3072},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 768, "sliding_window": 128},
    ),
    "llama4": (
        "llama4_text",
        {
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "intermediate_size": 1536,
            "intermediate_size_mlp": 3072,
            "attention_chunk_size": 4096,
        },
    ),
    "latent": (
        "deepseek_v2",
        {
            "num_key_value_heads": 12,
            "head_dim": None,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 32,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 384,
            "intermediate_size": 3072,
            "topk_method": "greedy",
        },
    ),
}
"""Per name: model type, and its fields beside the common ones; None drops a field."""


def make(name: str, directory: Path) -> Path:
    """Write a model with random weights."""
    model_type, options = MODELS[name]
    fields = {key: value for key, value in {**_COMMON, **options}.items() if value is not None}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), dtype=torch.float32).save_pretrained(
        directory
    )
    return directory


def time_model(
    name: str, length: int, num_tokens: int, repeats: int, rate: Callable[[int], float]
) -> list[dict[str, Any]]:
    """Rows of the table for one model."""
    with tempfile.TemporaryDirectory() as directory:
        path = make(name, Path(directory))
        active = inspect_model(AutoConfig.from_pretrained(path), None, torch.float32).active_parameters
        cores, timings, agree = interleaved(path, length, num_tokens, repeats)
    alone = median(timing.ttft_s for timing in timings["longspan 1 x 1"])
    rows: list[dict[str, Any]] = []
    for engine, several in timings.items():
        ttft_s = median(timing.ttft_s for timing in several)
        rows.append(
            {
                "model": name,
                "active M": active / 1e6,
                "engine (ranks x threads)": engine,
                "ttft_s": ttft_s,
                "ttft / floor": ttft_s * rate(cores[engine]) / (2 * active * length),
                "speed-up over 1 x 1": alone / ttft_s,
                "per token, ms": 1e3 * median(timing.tpot_s for timing in several),
                "tokens agree": agree,
            }
        )
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", default="moe,gpt_oss,llama4,latent", help="names, with commas")
    options.add_argument("--tokens", type=int, default=32, help="output tokens")
    chosen = options.parse_args()
    names = chosen.models.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        sys.exit(f"--models: got {unknown[0]!r}, legal is {', '.join(MODELS)}, separated by commas")
    rates = {threads: matmul_rate(threads) for threads in (1, 2)}
    rows: list[dict[str, Any]] = []
    for name in names:
        rows += time_model(name, chosen.length, chosen.tokens, chosen.repeats, rates.__getitem__)
    facts = {
        "prompt tokens": chosen.length,
        "output tokens": chosen.tokens,
        "matmul rate, 2 threads": f"{rates[2] / 1e9:.0f} GFLOP/s",
    }
    report("families", rows, facts, chosen)


if __name__ == "__main__":
    main()
