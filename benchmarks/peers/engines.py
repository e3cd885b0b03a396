"""What is compared: every engine's command, environment and processes.

Holds one entry per engine and setting. Must not know how they are measured.
Read next: `process.py`, how an entry is run; `drivers/`, what runs.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.environments import python_of
from peers.models import BenchmarkModel, sizes
from peers.process import Command

DRIVERS = Path(__file__).parent / "drivers"
PEERS = ("transformers", "vllm", "llamacpp")
LONGSPAN_WORKER = r"longspan\.worker\.fork_server"  # the ranks are its forks
SPARE_TOKENS = 512
"""Of context beyond prompt and answer, for the prompt that warms an engine up."""


@dataclass(frozen=True)
class Task:
    """What engines are started for."""

    model: Path
    length: int
    num_tokens: int
    cores: tuple[int, int]

    @property
    def context_len(self) -> int:
        """Tokens that an engine makes room for, a multiple of 256."""
        return -(-(self.length + self.num_tokens + SPARE_TOKENS) // 256) * 256


@dataclass(frozen=True)
class EngineSpec:
    """One engine with one setting."""

    name: str
    peer: str | None
    """Under which name it is chosen; None is longspan."""
    num_ranks: int
    driver: str
    options: dict[str, Any] = field(default_factory=dict)
    rank_pattern: str = "."
    """Commands of the processes that compute: one per rank."""
    has_one_core: bool = False
    """vLLM: a lone rank that is bound to the first core alone."""

    def command(self, task: Task) -> Command:
        """How to start it. Makes the engine's environment if it has its own."""
        if self.peer == "vllm":
            return self._vllm(task)
        options = {"model": str(task.model), **self.options}
        if self.peer == "llamacpp":
            options |= {"model": str(gguf_path(task.model)), "context_len": task.context_len}
            return Command(python_of("llamacpp"), DRIVERS / self.driver, options, _threads(2))
        # longspan sets its workers' threads itself.
        environment = {} if self.peer is None else _threads(2)
        return Command(Path(sys.executable), DRIVERS / self.driver, options, environment)

    def _vllm(self, task: Task) -> Command:
        a, b = task.cores
        kv_bytes = sizes(task.model).kv_bytes_per_token * (task.context_len + 1024) // self.num_ranks
        options = {
            "model": str(task.model),
            "tensor_parallel_size": self.num_ranks,
            "max_model_len": task.context_len,
            "kv_cache_memory_bytes": kv_bytes,
            **self.options,
        }
        # By default one core is kept for the front end, and ranks without binding get all cores each.
        bind = f"{a}|{b}" if self.num_ranks == 2 else f"{a}" if self.has_one_core else f"{a},{b}"
        environment = {"VLLM_CPU_OMP_THREADS_BIND": bind, "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
        python = python_of("vllm")
        openmp = python.parents[1] / "lib" / "libiomp5.so"
        if openmp.exists():  # vLLM's documentation asks for it; TP 1 took 12.5 ms per token without and 9.8 with it
            environment["LD_PRELOAD"] = str(openmp)
        return Command(python, DRIVERS / self.driver, options, environment)


def _threads(count: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}


def gguf_path(model: Path) -> Path:
    """Where a model's weights for llama.cpp are."""
    return model.with_suffix(".gguf")


def _longspan(num_ranks: int, num_threads: int) -> EngineSpec:
    options = {"num_ranks": num_ranks, "num_threads": num_threads}
    name = f"longspan {num_ranks} x {num_threads}"
    return EngineSpec(name, None, num_ranks, "longspan_engine.py", options, LONGSPAN_WORKER)


LONGSPAN_1X1 = _longspan(1, 1)
LONGSPAN_1X2 = _longspan(1, 2)
LONGSPAN_2X1 = _longspan(2, 1)
LONGSPAN_TP2 = EngineSpec(
    "longspan TP 2 x 1",
    None,
    2,
    "longspan_engine.py",
    {"num_ranks": 1, "num_threads": 1, "config": {"tensor_parallel_size": 2}},
    LONGSPAN_WORKER,
)
TRANSFORMERS = EngineSpec("transformers sdpa 1 x 2", "transformers", 1, "transformers_engine.py", {"num_threads": 2})
VLLM_WORKER = r"VLLM::Worker"
VLLM_TP1 = EngineSpec("vllm TP 1 x 2", "vllm", 1, "vllm_engine.py", {}, VLLM_WORKER)
VLLM_TP2 = EngineSpec("vllm TP 2 x 1", "vllm", 2, "vllm_engine.py", {}, VLLM_WORKER)
VLLM_1X1 = EngineSpec("vllm 1 x 1", "vllm", 1, "vllm_engine.py", {}, VLLM_WORKER, has_one_core=True)
VLLM_LONGSPAN = EngineSpec(
    "vllm with longspan 2 x 1",
    "vllm",
    2,
    "vllm_engine.py",
    {"tensor_parallel_size": 1, "additional_config": {"longspan": {"context_parallel_size": 2}}},
    VLLM_WORKER,
)
LLAMACPP_F16 = EngineSpec(
    "llama.cpp, KV F16 1 x 2", "llamacpp", 1, "llamacpp_engine.py", {"num_threads": 2, "kv": "f16"}
)
LLAMACPP_F32 = EngineSpec(
    "llama.cpp, KV F32 1 x 2", "llamacpp", 1, "llamacpp_engine.py", {"num_threads": 2, "kv": "f32"}
)
PEER_ENGINES = (TRANSFORMERS, VLLM_TP1, VLLM_TP2, LLAMACPP_F32, LLAMACPP_F16)


def chosen(size: BenchmarkModel, length: int, peers: Sequence[str]) -> list[EngineSpec]:
    """Engines of one comparison, in the order of their first turn."""
    longspan = [LONGSPAN_1X2, LONGSPAN_2X1]
    if size.single_rank_from is not None and length >= size.single_rank_from:
        longspan.append(LONGSPAN_1X1)
    engines = (TRANSFORMERS, VLLM_TP1, LLAMACPP_F32) if size.one_setting_per_peer else PEER_ENGINES
    known = [peer for peer in peers if peer != "llamacpp" or size.has_gguf]
    return longspan + [engine for engine in engines if engine.peer in known]


def parse_cores(text: str) -> tuple[int, int]:
    """Two numbers of cores, such as `0,1`. Raises: ValueError."""
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if match is None or match[1] == match[2]:
        raise ValueError("two different numbers of cores, such as 0,1")
    return int(match[1]), int(match[2])
