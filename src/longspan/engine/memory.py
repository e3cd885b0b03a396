"""Memory that ranks on this machine may use for KV.

Holds the query of the machine's memory. Must not know pages.
Read next: `longspan.sharding.capacity`, which divides the memory into pages.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from longspan.config import REMOTE_EXECUTORS, EngineConfig
from longspan.engine.gpus import GPU
from longspan.errors import ConfigError
from longspan.kv.layout import DTYPE_BYTES
from longspan.types import ModelSpec

DEFAULT_KV_CACHE_MEMORY = 4 * 2**30


def rank_cache_memory(
    config: EngineConfig, gpus: Sequence[GPU], spec: ModelSpec, hidden_size: int, *, is_loaded: bool
) -> int:
    """Return the bytes for KV per rank.

    Args:
        config: what the user asked for, with the device that was chosen.
        gpus: GPUs that ranks use.
        spec: the model's facts.
        hidden_size: width of the model's hidden states.
        is_loaded: whether the weights are in memory already.

    Raises:
        ConfigError: there is not enough memory, or its size cannot be known.
    """
    asked, size = config.kv_cache_memory, config.context_parallel_size
    if config.device == "cpu":
        return kv_cache_memory(asked, size)
    if config.executor in REMOTE_EXECUTORS:
        if asked is None:
            raise ConfigError(
                f"kv_cache_memory: got none with executor {config.executor!r} and device 'cuda', legal is a size: "
                "the GPUs are elsewhere"
            )
        return asked
    sharing = size // len(gpus)  # threads share one GPU
    weight_bytes = 0 if is_loaded else spec.weight_bytes
    together = None if asked is None else asked * sharing
    tokens = config.max_num_batched_tokens * sharing
    return gpu_cache_memory(together, gpus, spec, weight_bytes, hidden_size, tokens) // sharing


def kv_cache_memory(asked: int | None, num_ranks: int) -> int:
    """Return the bytes for KV per rank: those asked for, or at most 4 GiB and an equal share of half the free memory.

    Raises:
        ConfigError: all ranks together would take more than the machine has.
    """
    total, free = _memory_bytes()
    if asked is None:
        return min(DEFAULT_KV_CACHE_MEMORY, free // 2 // num_ranks)
    if asked * num_ranks > total:
        raise ConfigError(
            f"kv_cache_memory: got {asked} bytes per rank, legal is at most {total // num_ranks}: {num_ranks} "
            f"rank{'s' * (num_ranks > 1)} share this machine's {total} bytes"
        )
    return asked


GPU_SHARE = 0.9
"""Share of a GPU's free memory for weights, pools and a step's tensors: allocators leave gaps."""
CONTEXT_BYTES = 2**30
"""Bytes of a rank's CUDA context, libraries, and their workspaces."""
STEP_WIDTHS = 16
"""Tensors of the model's width that a step holds per token at its peak, about: four for an MLP's inner values, four
for queries and attention in float32, and the rest for messages."""


def gpu_cache_memory(
    asked: int | None, gpus: Sequence[GPU], spec: ModelSpec, weight_bytes: int, hidden_size: int, num_tokens: int
) -> int:
    """Return the bytes for KV on a GPU, for all ranks that share it.

    Args:
        asked: bytes that the user asked for; None takes what is left of the GPU with the least free memory.
        gpus: GPUs that ranks use.
        spec: the model's facts.
        weight_bytes: bytes of the weights to load.
        hidden_size: width of the model's hidden states.
        num_tokens: most tokens of a step.

    Raises:
        ConfigError: there is no room beside the weights.
    """
    least = min(gpus, key=lambda gpu: gpu.free_bytes)
    step_bytes = STEP_WIDTHS * hidden_size * DTYPE_BYTES[spec.kv_groups[0].spec.compute_dtype] * num_tokens
    left = int(GPU_SHARE * least.free_bytes) - weight_bytes - CONTEXT_BYTES - step_bytes
    one_page = min(group.token_bytes for group in spec.kv_groups)  # more, but `pool_pages` knows how much
    if (one_page if asked is None else asked) > left:
        raise ConfigError(
            f"kv_cache_memory: got {asked or 'none'}, legal is at most {max(0, left)} bytes for a GPU: {least.name} "
            f"has {least.free_bytes} bytes free, and besides weights of {weight_bytes} bytes a step needs about "
            f"{CONTEXT_BYTES + step_bytes}; or device cpu"
        )
    return left if asked is None else asked


def _memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Return the bytes that this process may use, and those that are free now; file caches count as free."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        fields = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        free = fields["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        pass  # not Linux
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        inactive = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, KeyError, ValueError):
        return total, free  # no container, or one without a limit ("max")
    return min(total, limit), min(free, max(0, limit - used + int(inactive)))
