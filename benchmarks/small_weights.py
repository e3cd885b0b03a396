"""Time per output token with weights of 8 and 4 bits beside float32.

    python benchmarks/small_weights.py [--length 1024] [--tokens 32] [--repeats 3] [--threads 2] [--llamacpp]
                                       [--json] [--save]

The model has the shape of Qwen2.5 0.5B and random weights. Runs are interleaved, numbers are medians. The floor is the
bytes of all weights that a token reads and of the prompt's KV over the read bandwidth of as many cores. With
`--llamacpp` llama.cpp runs the same weights in its Q4_0, with KV in float32, in a process of its own that is stopped
while others run.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import median, parser, random_prompt, read_bandwidth, report
from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.native import kernels
from longspan.types import SamplingParams
from peers.engines import DRIVERS, gguf_path
from peers.environments import python_of
from peers.measure import write_gguf
from peers.models import SIZES, make
from peers.process import Command, EngineProcess

KINDS = ("none", "int8", "int4")
LLAMACPP = "llama.cpp Q4_0"


@dataclass(frozen=True)
class Decode:
    """One request."""

    ttft_s: float
    tpot_s: float
    cpu_s: float | None = None
    """Seconds of all cores per token after the first: what a busy machine leaves alone. None: of another process."""


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


@contextmanager
def llamacpp(model: Path, options: argparse.Namespace) -> Iterator[Callable[[list[int]], Decode] | None]:
    """Yield a function that runs a prompt by llama.cpp in 4 bits, or None if it is not asked for."""
    if not options.llamacpp:
        yield None
        return
    write_gguf(model)
    file, python = model.with_suffix(".q4_0.gguf"), python_of("llamacpp")
    command = [str(python), str(DRIVERS / "gguf_quantize.py"), str(gguf_path(model)), str(file)]
    subprocess.run(command, check=True, capture_output=True)
    room = -(-(options.length + options.tokens + 512) // 256) * 256
    asked = {"model": str(file), "context_len": room, "num_threads": options.threads, "kv": "f32"}
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    process = EngineProcess(LLAMACPP, Command(python, DRIVERS / "llamacpp_engine.py", asked, threads), model / "log")
    process.stop()

    def run(prompt: list[int]) -> Decode:
        process.go_on()
        answer = process.ask(prompt, options.tokens)
        process.stop()
        return Decode(answer["ttft_s"], answer["tpot_s"])

    try:
        yield run
    finally:
        process.close()


def time_kinds(model: Path, threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table."""
    bandwidth = read_bandwidth(threads)
    shared = {"model": str(model), "executor": "threads", "threads_per_rank": threads, "kv_cache_memory": 2**28}
    engines = {kind: Engine(EngineConfig(**shared, dtype="float32", quantization=kind)) for kind in KINDS}
    timings: dict[str, list[Decode]] = {kind: [] for kind in (*KINDS, LLAMACPP)}
    with llamacpp(model, options) as run_peer:
        for repeat in range(options.repeats):
            prompt = random_prompt(options.length, repeat)
            for kind, engine in engines.items():
                timings[kind].append(decode(engine, prompt, options.tokens))
            if run_peer is not None:
                timings[LLAMACPP].append(run_peer(prompt))
    fields = SIZES["500m"].fields
    embedding_bytes = 4 * fields["vocab_size"] * fields["hidden_size"]
    rows = []
    for kind, engine in engines.items():
        spec, own, float32 = engine.spec, timings[kind], timings["none"]
        kv_bytes = options.length * sum(group.token_bytes for group in spec.kv_groups)
        read = spec.weight_bytes + kv_bytes - (embedding_bytes if kind != "none" else 0)  # tied: float32 reads them
        tpot_s, cpu_s = median(one.tpot_s for one in own), median(one.cpu_s or 0.0 for one in own)
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
                "cpu / float32": cpu_s / median(one.cpu_s or 0.0 for one in float32),
            }
        )
        engine.close()
    if peer := timings[LLAMACPP]:
        ttft_s, tpot_s = median(one.ttft_s for one in peer), median(one.tpot_s for one in peer)
        of_float32 = tpot_s / median(one.tpot_s for one in timings["none"])
        rows.append({"quantization": LLAMACPP, "ttft_s": ttft_s, "tpot_ms": tpot_s * 1e3, "tpot / float32": of_float32})
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    options.add_argument("--threads", type=int, default=2, help="threads of the rank")
    options.add_argument("--llamacpp", action="store_true", help="run llama.cpp's Q4_0 beside")
    options.set_defaults(length=1024)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = make(SIZES["500m"], Path(directory) / "model")
        rows = time_kinds(model, chosen.threads, chosen)
        facts = {"prompt tokens": chosen.length, "threads": chosen.threads, "compiled kernels": kernels.is_available()}
        report("small-weights", rows, facts, chosen)


if __name__ == "__main__":
    main()
