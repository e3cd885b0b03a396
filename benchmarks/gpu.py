"""What longspan does on this machine's GPU, beside what the GPU can do. One command, nothing to download.

    python benchmarks/gpu.py [--parts checks,kernels,engine,share,scaling] [--lengths 8k,64k,128k,longest] [--save]

    checks    every backend that is installed, beside the reference: head sizes, dtypes, softcaps, windows
    kernels   prefill, decode and merge, in per cent of a matrix product's flops or a copy's bytes, measured here
    engine    a Llama of 8 billion random weights: time to the first token, time per token with CUDA graphs, without,
              and with compiled norms and MLPs; beside the floor of bytes and flops
    share     attention of one rank's share of a prompt of a million tokens on 2, 4 and 8 ranks, one layer
    scaling   the same Llama on 1, 2, 4, 8 GPUs, as many as there are (left out unless named: it writes 16 GB)

FlashInfer is measured where it is installed. On a machine without a network that takes its wheel and that of
apache-tvm-ffi (pip install --no-deps), and modules that were built before for the same GPU, in
flashinfer/data/aot/NAME/NAME.so, with FLASHINFER_DISABLE_JIT=1; else it compiles for minutes. Our own kernels compile
in seconds, on first use.

All parts together take about ten minutes of an H200; --parts runs some, --out gives each its file.

`longest` is the longest prompt that the memory left for KV holds, or that is computed in --most-s. `--smoke` runs
everything at tiny sizes, in Triton's interpreter on a CPU, to show that the program works: its times mean nothing, and
cannot be saved.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if "--smoke" in sys.argv:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import transformers
import triton
from transformers import AutoModelForCausalLM, LlamaConfig

import gpu_kernels
from common import RESULTS, Timing, median, print_table, random_prompt, run_request
from gpu_kernels import SMOKE, Ceilings, Sizes
from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.models.hook import ATTENTION_NAME
from longspan.models.speedups import speed_up_
from longspan.quantities import parse_tokens

PARTS = ("checks", "kernels", "engine", "share", "scaling")
BACKENDS = ("triton", "flashinfer", "torch")
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 1 << 21,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA_SMOKE = {
    **LLAMA_8B,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
}
NUM_TOKENS = 65


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS[:-1]), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--lengths", default="8k,64k,128k,longest", help="of prompts, with k and M")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--repeats", type=int, default=3, help="medians of so many requests")
    parser.add_argument("--most-s", type=float, default=120.0, help="of prefill of the longest prompt")
    parser.add_argument("--chunk", type=int, default=8192, help="most tokens of a step")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="write it to benchmarks/results/, after every part")
    parser.add_argument("--out", type=Path, help="with --save: write it to this file")
    chosen = parser.parse_args()
    unknown = [part for part in chosen.parts.split(",") if part not in PARTS]
    if unknown:
        parser.error(f"--parts: got {', '.join(unknown)}, legal is {', '.join(PARTS)}")
    if chosen.smoke and chosen.save:
        parser.error("--save: got it with --smoke, whose times mean nothing")
    if not chosen.smoke and not torch.cuda.is_available():
        parser.error("this machine has no GPU that PyTorch can use; --smoke shows that the program runs")
    return chosen


def hardware(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "memory_bytes": properties.total_memory,
            "processors": properties.multi_processor_count,
        }
    return found


class Llama:
    """The random model, and what one request of it needs of the hardware at least."""

    def __init__(self, fields: dict[str, Any], directory: Path, device: torch.device) -> None:
        self.config = LlamaConfig(**fields)
        self.config.architectures = ["LlamaForCausalLM"]
        self.config.save_pretrained(directory)
        self.path = str(directory)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                self.config, dtype=torch.bfloat16, attn_implementation=ATTENTION_NAME
            )
        self.module = model.eval().requires_grad_(False)
        speed_up_(self.module)
        layers = self.config.num_hidden_layers
        self.layer_weights = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
        self.read_bytes = 2.0 * (self.layer_weights + model.lm_head.weight.numel())
        c = self.config
        self.kv_bytes_per_token = 2.0 * 2 * layers * c.num_key_value_heads * c.head_dim

    def prefill_flops(self, num_tokens: int) -> float:
        """Matrix products of all layers, and attention's two."""
        c = self.config
        pairs = num_tokens * (num_tokens + 1) / 2
        return (
            2.0 * self.layer_weights * num_tokens
            + 4.0 * pairs * c.num_attention_heads * c.head_dim * c.num_hidden_layers
        )

    def decode_bytes(self, num_tokens: int) -> float:
        """All weights once, and all of the KV."""
        return self.read_bytes + self.kv_bytes_per_token * num_tokens


def median_timing(engine: Engine, length: int, vocab_size: int, repeats: int, num_tokens: int) -> Timing:
    """Of requests with prompts that no cache knows, after one that compiles; with the tokens of the first of them."""
    run_request(engine, random_prompt(min(length, 600), 99, vocab_size), 8)
    timings = [run_request(engine, random_prompt(length, seed, vocab_size), num_tokens) for seed in range(repeats)]
    return Timing(
        median(timing.ttft_s for timing in timings), median(timing.tpot_s for timing in timings), timings[0].token_ids
    )


def engine_options(chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What all engines have in common."""
    return {
        "device": device.type,
        "dtype": "bfloat16",
        "attention_backend": "triton",
        "max_num_batched_tokens": chosen.chunk,
        "enable_prefix_caching": False,
        "page_size": 64,
    }


def measure_engine(chosen: argparse.Namespace, ceilings: Ceilings, device: torch.device) -> Iterator[dict[str, Any]]:
    """End to end, on one rank in this process."""
    num_tokens = 5 if chosen.smoke else NUM_TOKENS
    with tempfile.TemporaryDirectory() as directory:
        llama = Llama(LLAMA_SMOKE if chosen.smoke else LLAMA_8B, Path(directory), device)
        variants: dict[str, dict[str, Any]] = {
            "graphs": {},
            "launched": {"cuda_graphs": "never"},
            "graphs, compiled": {"compile_dense": True},
        }
        if chosen.smoke:
            del variants["graphs, compiled"]  # it is for GPUs
        rate = 0.0  # flops per second of the longest prefill so far
        for variant, extra in variants.items():  # compiled last: the model stays compiled
            for name in chosen.lengths.split(","):
                if variant != "graphs" and name == "longest":
                    continue
                config = EngineConfig(
                    model=llama.path,
                    executor="threads",
                    kv_cache_memory=1 << 22 if chosen.smoke else None,
                    **engine_options(chosen, device),
                    **extra,
                )
                free_caches(device)
                with Engine(config, llama.module) as engine:
                    length = longest(engine, llama, rate, chosen) if name == "longest" else parse_tokens(name)
                    if length + num_tokens > tokens_that_fit(engine):
                        yield {"variant": variant, "prompt": length, "note": "does not fit"}
                        continue
                    repeats = 1 if name == "longest" else chosen.repeats
                    timing = median_timing(engine, length, llama.config.vocab_size, repeats, num_tokens)
                flops, num_bytes = llama.prefill_flops(length), llama.decode_bytes(length)
                if variant == "graphs":
                    rate = flops / timing.ttft_s
                row = {
                    "variant": variant,
                    "prompt": length,
                    "first token s": timing.ttft_s,
                    "x floor of flops": timing.ttft_s * ceilings.flops_per_s / flops,
                    "ms per token": timing.tpot_s * 1e3,
                    "x floor of bytes": timing.tpot_s * ceilings.copy_bytes_per_s / num_bytes,
                }
                print_table([row])
                yield row


def free_caches(device: torch.device) -> None:
    """Give what earlier engines had back to the GPU: an engine looks at what is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def tokens_that_fit(engine: Engine) -> int:
    return min(stats.kv_pages_total for stats in engine.rank_stats()) * engine.config.page_size


def longest(engine: Engine, llama: Llama, rate: float, chosen: argparse.Namespace) -> int:
    """Tokens that memory holds and that the rate seen so far computes in time."""
    length = tokens_that_fit(engine) - 2 * NUM_TOKENS
    if chosen.smoke:
        return min(length, 300)
    while rate and llama.prefill_flops(length) / rate > chosen.most_s:
        length -= 1024
    return length


def measure_scaling(chosen: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Ranks as processes, one on every GPU."""
    rows: list[dict[str, Any]] = []
    counts = [1] if device.type == "cpu" else [n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()]
    num_tokens = 5 if chosen.smoke else NUM_TOKENS
    with tempfile.TemporaryDirectory() as directory:
        llama = Llama(LLAMA_SMOKE if chosen.smoke else LLAMA_8B, Path(directory), device)
        llama.module.save_pretrained(directory)
        vocab_size = llama.config.vocab_size
        del llama
        free_caches(device)
        alone: dict[str, list[int]] = {}  # length to the tokens of one rank
        for count in counts:
            config = EngineConfig(
                model=directory,
                context_parallel_size=count,
                placement="striped",
                **engine_options(chosen, device),
            )
            for name in chosen.lengths.split(","):
                if name == "longest":
                    continue
                with Engine(config) as engine:
                    length = parse_tokens(name)
                    timing = median_timing(engine, length, vocab_size, chosen.repeats, num_tokens)
                alone.setdefault(name, timing.token_ids)
                rows.append(
                    {
                        "ranks": count,
                        "prompt": length,
                        "first token s": timing.ttft_s,
                        "ms per token": timing.tpot_s * 1e3,
                        "tokens as one rank": timing.token_ids == alone[name],
                    }
                )
                print_table(rows[-1:])
    return rows


def attempt(name: str, measure: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of one measurement, or what went wrong: one kernel's failure must not lose the others' figures.

    It is in the table, and the program's exit code is 1.
    """
    try:
        return list(measure())
    except Exception as error:
        return [{"kernel": name, "failed": f"{type(error).__name__}: {error}"[:300]}]


def save(result: dict[str, Any], chosen: argparse.Namespace) -> None:
    """If asked to; after every part, so that nothing is lost with a later one."""
    if chosen.save:
        gpu = result["hardware"]["gpu"].lower().replace(" ", "-")
        path = chosen.out or RESULTS / f"gpu-{datetime.now(UTC).strftime('%Y-%m-%d')}-{gpu}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    chosen = options()
    device = torch.device("cpu" if chosen.smoke else "cuda")
    sizes = SMOKE if chosen.smoke else Sizes()
    if chosen.smoke:
        chosen.lengths, chosen.chunk, chosen.repeats = "40,longest", 64, 1
    parts = chosen.parts.split(",")
    result: dict[str, Any] = {
        "theme": "gpu",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": hardware(device),
    }
    found, missing = gpu_kernels.backends(device, tuple(chosen.backends.split(",")))
    result["missing"] = missing
    ceilings = gpu_kernels.measure_ceilings(sizes, device)
    result["ceilings"] = {
        "bfloat16 matmul TFLOP/s": ceilings.flops_per_s / 1e12,
        "copy GB/s, read and written": ceilings.copy_bytes_per_s / 1e9,
    }
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    for name, value in result["ceilings"].items():
        print(f"{name:<40} {value:.4g}")
    if "checks" in parts:
        result["checks"] = [row for backend in found.values() for row in gpu_kernels.check(backend, sizes, device)]
        print_table(result["checks"])
        save(result, chosen)
    if "kernels" in parts:
        rows: list[dict[str, Any]] = []
        for name, backend in found.items():
            rows += attempt(name, lambda b=backend: gpu_kernels.measure_prefill(b, sizes, ceilings, device))
            if name != "flashinfer":  # which leaves decode to triton
                rows += attempt(name, lambda b=backend: gpu_kernels.measure_decode(b, sizes, ceilings, device))
        rows += attempt("merge", lambda: gpu_kernels.measure_merge(sizes, ceilings, device))
        rows += attempt("accumulate", lambda: gpu_kernels.measure_accumulate(sizes, ceilings, device))
        result["kernels"] = rows
        print_table(rows)
        save(result, chosen)
    free_caches(device)
    if "engine" in parts:
        result["engine"] = []
        for row in measure_engine(chosen, ceilings, device):
            result["engine"].append(row)
            save(result, chosen)
    free_caches(device)
    if "share" in parts:
        result["share"] = [
            row
            for name, backend in found.items()
            for row in attempt(name, lambda b=backend: gpu_kernels.measure_share(b, sizes, ceilings, device))
        ]
        print_table(result["share"])
        save(result, chosen)
    if "scaling" in parts:
        result["scaling"] = measure_scaling(chosen, device)
    save(result, chosen)
    if chosen.json:
        print(json.dumps(result, indent=1))
    rows = [row for part in ("checks", "kernels", "share") for row in result.get(part, [])]
    if any("failed" in row or row.get("result", "").startswith(("WRONG", "FAILED")) for row in rows):
        sys.exit("some kernels are wrong, or failed: see the tables above")


if __name__ == "__main__":
    main()
