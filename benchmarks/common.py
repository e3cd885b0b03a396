"""What the benchmarks share: a random model, the floor of this machine, timed runs, result files.

A floor is what the hardware needs at least: flops over the measured matrix product rate for prefill, bytes over the
measured read bandwidth for decode. Both are measured in the same run as the engines, on the same cores.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longspan.config import EngineConfig
from longspan.costmodel.model_time import decode_bytes, prefill_flops
from longspan.costmodel.shapes import ModelShape
from longspan.engine.engine import Engine
from longspan.models.shape import load_shape
from longspan.types import SamplingParams

VOCAB_SIZE = 256
RESULTS = Path(__file__).parent / "results"


def make_model(directory: Path) -> Path:
    """A Llama of 22.4 M parameters with random weights: 8 layers, 8 query and 2 KV heads of 64, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=2**20,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).float().save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Work:
    """What one request asks of the hardware."""

    prefill_flops: float
    decode_bytes: float
    """Per output token: all weights, and the KV of the prompt."""


def shape(model: Path) -> ModelShape:
    """Of a model's files, with float32 weights and KV."""
    return load_shape(str(model), "float32")


def work(model: Path, prompt_len: int) -> Work:
    """What the cost model counts: the fewest flops of a prompt, the fewest bytes of an output token."""
    known = shape(model)
    return Work(prefill_flops(known, prompt_len), decode_bytes(known, prompt_len))


def matmul_rate(num_threads: int) -> float:
    """float32 flops per second of a large matrix product, best of 5."""
    torch.set_num_threads(num_threads)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return max(2 * 2048**3 / seconds(lambda: torch.mm(a, b)) for _ in range(5))


def read_bandwidth(num_threads: int) -> float:
    """Bytes per second of summing 1 GiB, best of 5."""
    torch.set_num_threads(num_threads)
    data = torch.ones(2**28)
    return max(data.numel() * 4 / seconds(lambda: data.sum()) for _ in range(5))


def seconds(function: Callable[[], object]) -> float:
    """Time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def random_prompt(length: int, seed: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Token ids."""
    return [random.Random(seed * 7919 + i).randrange(vocab_size) for i in range(length)]


@dataclass(frozen=True)
class Timing:
    """One request."""

    ttft_s: float
    tpot_s: float
    token_ids: list[int]
    num_cached: int = 0
    """Tokens of the prompt that a prefix cache had."""


def run_request(engine: Engine, prompt: list[int], num_tokens: int) -> Timing:
    """One request alone."""
    started = time.perf_counter()
    request = engine.add_request(prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    first, num_first = started, 0
    while engine.has_requests:
        engine.step()
        if not num_first and request.num_generated:  # a step may take in two tokens
            first, num_first = time.perf_counter(), request.num_generated
    tpot_s = (time.perf_counter() - first) / max(1, num_tokens - num_first)
    return Timing(first - started, tpot_s, request.output_token_ids, request.num_cached)


class LongspanRunner:
    """longspan with real worker processes, started once."""

    def __init__(self, model: Path, num_ranks: int, num_threads: int, **options: Any) -> None:
        self.name = f"longspan {num_ranks} x {num_threads}"
        self.engine = Engine(
            EngineConfig(model=str(model), context_parallel_size=num_ranks, threads_per_rank=num_threads, **options)
        )
        self.run(random_prompt(256, 99), 2)

    def run(self, prompt: list[int], num_tokens: int) -> Timing:
        return run_request(self.engine, prompt, num_tokens)

    def close(self) -> None:
        self.engine.close()


class TransformersRunner:
    """Transformers with the attention that it chooses (sdpa where a family has it) and its default cache."""

    def __init__(self, model: Path, num_threads: int) -> None:
        self.name = f"transformers sdpa 1 x {num_threads}"
        self._num_threads = num_threads
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.run(random_prompt(256, 99), 2)

    @torch.inference_mode()
    def run(self, prompt: list[int], num_tokens: int) -> Timing:
        torch.set_num_threads(self._num_threads)
        started = time.perf_counter()
        output = self._model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        tokens = [int(output.logits[0, -1].argmax())]
        first = time.perf_counter()
        for _ in range(num_tokens - 1):
            output = self._model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
            tokens.append(int(output.logits[0, -1].argmax()))
        return Timing(first - started, (time.perf_counter() - first) / max(1, num_tokens - 1), tokens)

    def close(self) -> None:
        """Nothing to release."""


def interleaved(
    model: Path, length: int, num_tokens: int, repeats: int
) -> tuple[dict[str, int], dict[str, list[Timing]], bool]:
    """Run every engine on the same prompts, one after the other, `repeats` times.

    Returns:
        Cores that each engine uses, its timings, and whether all engines gave the same tokens every time.
    """
    runners = [
        (LongspanRunner(model, 1, 1, placement="striped"), 1),
        (LongspanRunner(model, 2, 1, placement="striped"), 2),
        (LongspanRunner(model, 1, 2, placement="striped"), 2),
        (TransformersRunner(model, 2), 2),
    ]
    timings: dict[str, list[Timing]] = {runner.name: [] for runner, _ in runners}
    for repeat in range(repeats):
        prompt = random_prompt(length, repeat)
        for runner, _ in runners:
            timings[runner.name].append(runner.run(prompt, num_tokens))
    for runner, _ in runners:
        runner.close()
    agree = all(len({tuple(timing.token_ids) for timing in same}) == 1 for same in zip(*timings.values(), strict=True))
    return {runner.name: cores for runner, cores in runners}, timings, agree


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


@contextmanager
def random_model() -> Iterator[Path]:
    """The benchmark model in a directory that is removed afterwards."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        yield make_model(Path(directory))


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--length", type=int, default=16384, help="tokens of the prompt")
    options.add_argument("--repeats", type=int, default=3, help="medians of so many interleaved runs")
    options.add_argument("--json", action="store_true", help="print the result as JSON")
    options.add_argument("--save", action="store_true", help="write it to benchmarks/results/")
    return options


def hardware() -> dict[str, Any]:
    """What this machine is."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def report(theme: str, rows: list[dict[str, Any]], facts: dict[str, Any], options: argparse.Namespace) -> None:
    """Print a table, or JSON; save if asked to."""
    result = {"theme": theme, "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "hardware": hardware()}
    result |= {"facts": facts, "rows": rows}
    text = json.dumps(result, indent=1)
    if options.save:
        result_path(theme, "json").write_text(text + "\n")
    if options.json:
        print(text)
        return
    for name, value in facts.items():
        print(f"{name:<40} {value}")
    print_table(rows)


def result_path(theme: str, suffix: str) -> Path:
    """Where today's result belongs."""
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{theme}-{datetime.now(UTC).strftime('%Y-%m-%d')}-{os.cpu_count()}-core-cpu.{suffix}"


def print_table(rows: list[dict[str, Any]]) -> None:
    """Columns in the order in which rows name them."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    for row in cells:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))
    sys.stdout.flush()


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
