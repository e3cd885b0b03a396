"""Time per output token with weights of 8 and 4 bits beside float32.

    python benchmarks/small_weights.py [--length 1024] [--tokens 32] [--repeats 3] [--threads 2] [--json] [--save]

The model has the shape of Qwen2.5 0.5B and random weights. Runs are interleaved, numbers are medians. The floor is the
bytes of all weights that a token reads and of the prompt's KV over the read bandwidth of as many cores.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import median, parser, random_prompt, read_bandwidth, report
from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.native import kernels
from longspan.types import SamplingParams

SHAPE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 151936,
    "max_position_embeddings": 2**15,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
KINDS = ("none", "int8", "int4")


def make_model(directory: Path) -> int:
    """Write the model; return the bytes of its embeddings, of which a token reads one row."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).float()
    model.save_pretrained(directory)
    return model.model.embed_tokens.weight.nbytes


@dataclass(frozen=True)
class Decode:
    """One request."""

    ttft_s: float
    tpot_s: float
    cpu_s: float
    """Seconds of all cores per token after the first: what a busy machine leaves alone."""


def decode(engine: Engine, prompt: list[int], num_tokens: int) -> Decode:
    """Run one request alone."""
    started, cpu = time.perf_counter(), time.process_time()
    request = engine.add_request(prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    first, num_first = started, 0
    while engine.has_requests:
        engine.step()
        if not num_first and request.num_generated:
            first, cpu, num_first = time.perf_counter(), time.process_time(), request.num_generated
    left = num_tokens - num_first
    return Decode(first - started, (time.perf_counter() - first) / left, (time.process_time() - cpu) / left)


def time_kinds(model: Path, embedding_bytes: int, threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table."""
    bandwidth = read_bandwidth(threads)
    shared = {"model": str(model), "executor": "threads", "threads_per_rank": threads, "kv_cache_memory": 2**28}
    engines = {kind: Engine(EngineConfig(**shared, dtype="float32", quantization=kind)) for kind in KINDS}
    timings: dict[str, list[Decode]] = {kind: [] for kind in KINDS}
    for repeat in range(options.repeats):
        prompt = random_prompt(options.length, repeat)
        for kind, engine in engines.items():
            timings[kind].append(decode(engine, prompt, options.tokens))
    rows = []
    for kind, engine in engines.items():
        spec, own, float32 = engine.spec, timings[kind], timings["none"]
        kv_bytes = options.length * sum(group.token_bytes for group in spec.kv_groups)
        read = spec.weight_bytes + kv_bytes - (embedding_bytes if kind != "none" else 0)  # tied: float32 reads them
        tpot_s, cpu_s = median(one.tpot_s for one in own), median(one.cpu_s for one in own)
        rows.append(
            {
                "quantization": kind,
                "weights, MB": spec.weight_bytes / 1e6,
                "read per token, MB": read / 1e6,
                "ttft_s": median(one.ttft_s for one in own),
                "tpot_ms": tpot_s * 1e3,
                "floor_ms": read / bandwidth * 1e3,
                "tpot / float32": tpot_s / median(one.tpot_s for one in float32),
                "cpu_ms": cpu_s * 1e3,
                "cpu / float32": cpu_s / median(one.cpu_s for one in float32),
            }
        )
        engine.close()
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    options.add_argument("--threads", type=int, default=2, help="threads of the rank")
    options.set_defaults(length=1024)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory)
        rows = time_kinds(model, make_model(model), chosen.threads, chosen)
        facts = {"prompt tokens": chosen.length, "threads": chosen.threads, "compiled kernels": kernels.is_available()}
        report("small-weights", rows, facts, chosen)


if __name__ == "__main__":
    main()
