"""One part of `gpu.py`, which starts it as a process: `gpu_parts.py PART [options of gpu.py] --rows FILE`.

It writes a line of JSON per row to FILE. See `gpu.py` for the parts.
"""

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from transformers import AutoModelForCausalLM, LlamaConfig

import gpu
import gpu_kernels
from common import Timing, median, random_prompt, run_request
from gpu_kernels import SMOKE, Ceilings, Sizes
from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.models.hook import ATTENTION_NAME
from longspan.models.speedups import speed_up_
from longspan.quantities import parse_tokens

name, *arguments, _, rows_file = sys.argv[1:]
chosen = gpu.options(arguments)
if chosen.smoke:
    chosen.lengths, chosen.chunk, chosen.repeats = "40,longest", 64, 1

Row = dict[str, Any]

DEVICE = torch.device("cpu" if chosen.smoke else "cuda")
SIZES = SMOKE if chosen.smoke else Sizes()
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
NUM_TOKENS = 5 if chosen.smoke else 65
VARIANTS: dict[str, dict[str, Any]] = {
    "engine": {},
    "launched": {"cuda_graphs": "never"},
    "compiled": {"compile_dense": True},
}


def hardware() -> Iterator[Row]:
    if not chosen.smoke and not torch.cuda.is_available():
        sys.exit("this machine has no GPU that PyTorch can use; --smoke shows that the program runs")
    found: Row = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
    }
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        found |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "memory_bytes": properties.total_memory,
            "processors": properties.multi_processor_count,
        }
    yield found


class Llama:
    """The random model, and what one request of it needs of the hardware at least."""

    def __init__(self, directory: Path) -> None:
        self.config = LlamaConfig(**(LLAMA_SMOKE if chosen.smoke else LLAMA_8B))
        self.config.architectures = ["LlamaForCausalLM"]
        self.config.save_pretrained(directory)
        self.path = str(directory)
        torch.manual_seed(0)
        with torch.device(DEVICE):
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


def median_timing(engine: Engine, length: int, vocab_size: int, repeats: int) -> Timing:
    """Of requests with prompts that no cache knows, after one that compiles; with the tokens of the first of them."""
    run_request(engine, random_prompt(min(length, 600), 99, vocab_size), 8)
    timings = [run_request(engine, random_prompt(length, seed, vocab_size), NUM_TOKENS) for seed in range(repeats)]
    return Timing(
        median(timing.ttft_s for timing in timings), median(timing.tpot_s for timing in timings), timings[0].token_ids
    )


def engine_options() -> dict[str, Any]:
    """What all engines have in common."""
    return {
        "device": DEVICE.type,
        "dtype": "bfloat16",
        "attention_backend": "triton",
        "max_num_batched_tokens": chosen.chunk,
        "enable_prefix_caching": False,
        "page_size": 64,
    }


def measure_engine(ceilings: Ceilings) -> Iterator[Row]:
    """End to end, on one rank in this process; one engine for all lengths."""
    with tempfile.TemporaryDirectory() as directory:
        llama = Llama(Path(directory))
        memory = 1 << 22 if chosen.smoke else None
        extra = {} if chosen.smoke and name == "compiled" else VARIANTS[name]  # compiling is for GPUs
        config = EngineConfig(model=llama.path, executor="threads", kv_cache_memory=memory, **engine_options(), **extra)
        free_caches()
        rate = 0.0  # flops per second of the longest prefill so far
        with Engine(config, llama.module) as engine:
            for length_name in chosen.lengths.split(","):
                if length_name == "longest" and name != "engine":
                    continue
                is_longest = length_name == "longest"
                length = longest(engine, llama, rate) if is_longest else parse_tokens(length_name)
                if length + NUM_TOKENS > tokens_that_fit(engine):
                    yield {"prompt": length, "note": "does not fit"}
                    continue
                timing = median_timing(engine, length, llama.config.vocab_size, 1 if is_longest else chosen.repeats)
                flops, num_bytes = llama.prefill_flops(length), llama.decode_bytes(length)
                rate = flops / timing.ttft_s
                yield {
                    "prompt": length,
                    "first token s": timing.ttft_s,
                    "x floor of flops": timing.ttft_s * ceilings.flops_per_s / flops,
                    "ms per token": timing.tpot_s * 1e3,
                    "x floor of bytes": timing.tpot_s * ceilings.copy_bytes_per_s / num_bytes,
                }


def free_caches() -> None:
    """Give what is free back to the GPU: an engine looks at what is left."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def tokens_that_fit(engine: Engine) -> int:
    return min(stats.kv_pages_total for stats in engine.rank_stats()) * engine.config.page_size


def longest(engine: Engine, llama: Llama, rate: float) -> int:
    """Tokens that memory holds and that the rate seen so far computes in time."""
    length = tokens_that_fit(engine) - 2 * NUM_TOKENS
    if chosen.smoke:
        return min(length, 300)
    while rate and llama.prefill_flops(length) / rate > chosen.most_s:
        length -= 1024
    return length


def measure_scaling() -> Iterator[Row]:
    """Ranks as processes, one on every GPU."""
    counts = [1] if DEVICE.type == "cpu" else [n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()]
    with tempfile.TemporaryDirectory() as directory:
        llama = Llama(Path(directory))
        llama.module.save_pretrained(directory)
        vocab_size = llama.config.vocab_size
        del llama
        free_caches()
        alone: dict[int, list[int]] = {}  # length to the tokens of one rank
        lengths = [parse_tokens(text) for text in chosen.lengths.split(",") if text != "longest"]
        for count in counts:
            config = EngineConfig(model=directory, context_parallel_size=count, placement="striped", **engine_options())
            with Engine(config) as engine:
                for length in lengths:
                    timing = median_timing(engine, length, vocab_size, chosen.repeats)
                    alone.setdefault(length, timing.token_ids)
                    yield {
                        "ranks": count,
                        "prompt": length,
                        "first token s": timing.ttft_s,
                        "ms per token": timing.tpot_s * 1e3,
                        "tokens as one rank": timing.token_ids == alone[length],
                    }


def attempt(what: str, measure: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Rows of one measurement, then what went wrong, if anything did: the other measurements go on."""
    try:
        yield from measure()
    except Exception as error:
        yield {"kernel": what, "failed": f"{type(error).__name__}: {error}"[:300]}


def measure_kernels(ceilings: Ceilings) -> Iterator[Row]:
    """Our own kernels."""
    yield {"kernel": "matrix product, bfloat16", "TFLOP/s": ceilings.flops_per_s / 1e12}
    yield {"kernel": "copy, read and written", "GB/s": ceilings.copy_bytes_per_s / 1e9}
    ours, _ = gpu_kernels.backends(DEVICE, ("triton",))
    for backend in ours.values():
        yield from attempt("decode", lambda b=backend: gpu_kernels.measure_decode(b, SIZES, ceilings, DEVICE))
        yield from attempt("prefill", lambda b=backend: gpu_kernels.measure_prefill(b, SIZES, ceilings, DEVICE))
    yield from attempt("merge", lambda: gpu_kernels.measure_merge(SIZES, ceilings, DEVICE))
    yield from attempt("accumulate", lambda: gpu_kernels.measure_accumulate(SIZES, ceilings, DEVICE))


def measure_libraries(ceilings: Ceilings) -> Iterator[Row]:
    """Kernels of other libraries."""
    found, missing = gpu_kernels.backends(DEVICE, gpu_kernels.LIBRARIES)
    yield from ({"backend": name, "missing": reason} for name, reason in missing.items())
    for name, backend in found.items():
        yield from attempt(name, lambda b=backend: gpu_kernels.measure_prefill(b, SIZES, ceilings, DEVICE))
        if name == "torch":  # the others leave decode to triton
            yield from attempt(name, lambda b=backend: gpu_kernels.measure_decode(b, SIZES, ceilings, DEVICE))


def measure_checks() -> Iterator[Row]:
    found, _ = gpu_kernels.backends(DEVICE, ("triton", *gpu_kernels.LIBRARIES))
    for backend in found.values():
        yield from gpu_kernels.check(backend, SIZES, DEVICE)


def measure_share(ceilings: Ceilings) -> Iterator[Row]:
    found, _ = gpu_kernels.backends(DEVICE, ("triton", *gpu_kernels.LIBRARIES))
    for what, backend in found.items():
        yield from attempt(what, lambda b=backend: gpu_kernels.measure_share(b, SIZES, ceilings, DEVICE))


def main() -> None:
    if name in ("hardware", "checks", "scaling"):
        rows = {"hardware": hardware, "checks": measure_checks, "scaling": measure_scaling}[name]()
    else:
        measure = {"kernels": measure_kernels, "libraries": measure_libraries, "share": measure_share}
        rows = measure.get(name, measure_engine)(gpu_kernels.measure_ceilings(SIZES, DEVICE))
    with Path(rows_file).open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
