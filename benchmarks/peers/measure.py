"""Runs all engines on the same prompts, one after the other, and makes rows of what they answered.

Holds the order of runs, medians, floors and agreement. Must not know how an engine works.
Read next: `process.py`; `goals.py`, what rows are compared to.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import matmul_rate, median, random_prompt, read_bandwidth, seconds, work
from peers.engines import DRIVERS, EngineSpec, Task, gguf_path
from peers.environments import python_of
from peers.models import sizes
from peers.neighbours import neighbours
from peers.process import EngineError, EngineProcess, imports_bytes

WAKE_LEN = 64
"""Tokens of the prompt, not timed, that follows a pause: threads and caches are awake then."""


@dataclass
class Measured:
    """One engine's runs of one length."""

    spec: EngineSpec
    facts: dict[str, Any]
    imports_bytes: int
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    peaks_bytes: list[int] = field(default_factory=list)
    """Per rank, after the first prompt."""

    @property
    def peak_bytes(self) -> int:
        """Of the largest rank, above what its imports take."""
        return max(self.peaks_bytes) - self.imports_bytes


@dataclass(frozen=True)
class Rates:
    """What the two cores can do."""

    matmul_flops_per_s: float
    onednn_flops_per_s: float | None
    read_bytes_per_s: float


def measure_rates() -> Rates:
    return Rates(matmul_rate(2), onednn_rate(2), read_bandwidth(2))


def onednn_rate(num_threads: int) -> float | None:
    """As `matmul_rate`, with oneDNN and a weight in its own layout. None if torch has no oneDNN.

    `torch.mm` takes MKL on x86, which is far from the peak of some CPUs; vLLM takes this.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    torch.set_num_threads(num_threads)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    weight = torch.ops.mkldnn._reorder_linear_weight(b, 2048)
    times = [seconds(lambda: torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")) for _ in range(6)]
    return 2 * 2048**3 / min(times)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs; None if all agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def say(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


def write_gguf(model: Path) -> None:
    """The model's weights for llama.cpp."""
    command = [str(python_of("llamacpp")), str(DRIVERS / "gguf_file.py"), str(model), str(gguf_path(model))]
    subprocess.run(command, check=True, stdout=sys.stderr)


class Comparison:
    """Engines started afresh for one model and one length."""

    def __init__(self, task: Task, model_name: str, specs: Sequence[EngineSpec], neighbours: str = "none") -> None:
        """Args: `neighbours` says which other programs run beside each engine (`peers/neighbours.py`)."""
        self.task = task
        self.neighbours = neighbours
        self.failures: list[str] = []
        self._model_name = model_name
        self._specs = specs
        self._sizes = sizes(task.model)
        self._rates: list[Rates] = []

    def run(self, repeats: int) -> list[Measured]:
        """All engines, `repeats` times; each repeat has its own prompt, and begins with another engine."""
        with ExitStack() as stack:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            live = self._start(stack, logs)
            for repeat in range(repeats):
                self._rates.append(measure_rates())
                prompt = random_prompt(self.task.length, self.task.length + repeat, self._sizes.vocab_size)
                first = repeat % max(1, len(live))
                for process, measured in live[first:] + live[:first]:
                    try:
                        self._ask(process, measured, prompt, is_first=repeat == 0)
                    except EngineError as error:
                        self._fail(error)
                        live = [pair for pair in live if pair[0] is not process]
        return [measured for _, measured in live]

    def _start(self, stack: ExitStack, logs: Path) -> list[tuple[EngineProcess, Measured]]:
        """Start all engines, one after the other, each alone on the cores, and stop them."""
        live = []
        for i, spec in enumerate(self._specs):
            started = time.monotonic()
            command = spec.command(self.task)
            try:
                process = EngineProcess(spec.name, command, logs / f"{i}.log")
            except EngineError as error:
                self._fail(error)
                continue
            stack.callback(process.close)
            process.stop()
            live.append((process, Measured(spec, process.facts, imports_bytes(command))))
            say(f"  {spec.name}: started in {time.monotonic() - started:.0f} s")
        return live

    def _ask(self, process: EngineProcess, measured: Measured, prompt: list[int], *, is_first: bool) -> None:
        """One timed run.

        Raises:
            EngineError: it failed.
        """
        process.go_on()
        try:
            process.ask([(7 * i) % 256 for i in range(WAKE_LEN)], 2)
            with neighbours(self.neighbours, self.task.cores):
                answer = process.ask(prompt, self.task.num_tokens)
            if is_first:
                measured.peaks_bytes = process.peaks_bytes(measured.spec.rank_pattern)
        finally:
            process.stop()
        if answer["num_cached"]:
            raise EngineError(f"{process.name} found {answer['num_cached']} tokens of a new prompt in its prefix cache")
        measured.ttft_s.append(answer["ttft_s"])
        measured.tpot_s.append(answer["tpot_s"])
        measured.token_ids.append(answer["token_ids"])
        say(
            f"  {self._model_name} {self.task.length} {process.name}: {answer['ttft_s']:.3f} s to the first token, "
            f"{answer['tpot_s'] * 1e3:.2f} ms per token"
        )

    def _fail(self, error: EngineError) -> None:
        self.failures.append(f"{self._model_name} {self.task.length}: {error}")
        say(f"  FAILED: {error}")

    def facts(self) -> dict[str, Any]:
        """The floor's ingredients: medians over the repeats."""
        work_ = work(self.task.model, self.task.length)
        onednn = [rates.onednn_flops_per_s for rates in self._rates if rates.onednn_flops_per_s is not None]
        return {
            "prefill_flops": work_.prefill_flops,
            "decode_bytes": work_.decode_bytes,
            "matmul_flops_per_s": median(rates.matmul_flops_per_s for rates in self._rates),
            "onednn_flops_per_s": median(onednn) if onednn else None,
            "read_bytes_per_s": median(rates.read_bytes_per_s for rates in self._rates),
            "weights_bytes": self._sizes.weights_bytes,
            "kv_bytes": self._sizes.kv_bytes_per_token * (self.task.length + self.task.num_tokens),
        }

    def rows(self, all_measured: Sequence[Measured], reference: str) -> list[dict[str, Any]]:
        """What `goals.py` and the table show.

        Args:
            all_measured: of `run`.
            reference: the engine whose tokens others are compared to, if it ran; else the first.
        """
        facts = self.facts()
        ttft_floor_s = facts["prefill_flops"] / facts["matmul_flops_per_s"]
        tpot_floor_s = facts["decode_bytes"] / facts["read_bytes_per_s"]
        named = {measured.spec.name: measured for measured in all_measured}
        expected = named.get(reference, next(iter(named.values()), None))
        rows = []
        for measured in all_measured:
            assert expected is not None
            spec = measured.spec
            differences = [first_difference(a, b) for a, b in zip(measured.token_ids, expected.token_ids, strict=True)]
            ttft_s, tpot_s = median(measured.ttft_s), median(measured.tpot_s)
            share = facts["weights_bytes"] + facts["kv_bytes"] / spec.num_ranks
            rows.append(
                {
                    "model": self._model_name,
                    "length": self.task.length,
                    "engine": spec.name,
                    "is_peer": spec.peer is not None,
                    "ttft_s": ttft_s,
                    "ttft_floor_s": ttft_floor_s,
                    "ttft / floor": ttft_s / ttft_floor_s,
                    "tpot_s": tpot_s,
                    "tpot_floor_s": tpot_floor_s,
                    "tpot / floor": tpot_s / tpot_floor_s,
                    "peak_bytes": measured.peak_bytes,
                    "memory_ratio": measured.peak_bytes / share,
                    "first_difference": differences,
                    "compared_to": expected.spec.name,
                    "ttft_s_all": measured.ttft_s,
                    "tpot_s_all": measured.tpot_s,
                    "imports_bytes": measured.imports_bytes,
                    "peaks_bytes": measured.peaks_bytes,
                    "settings": measured.facts,
                }
            )
        return rows
