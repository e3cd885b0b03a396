"""Memory that ranks on this machine may use for KV.

Holds the ranks' shares of a machine or of its GPUs. Must not know pages.
Read next: `longspan.sharding.capacity`, which divides the memory into pages.
"""

from collections.abc import Sequence

from longspan.config import REMOTE_EXECUTORS, EngineConfig
from longspan.engine.gpus import GPU
from longspan.errors import ConfigError
from longspan.group.host_memory import memory_bytes
from longspan.kv.layout import DTYPE_BYTES
from longspan.types import ModelSpec

DEFAULT_KV_CACHE_MEMORY = 4 * 2**30


def rank_cache_memory(
    config: EngineConfig, gpus: Sequence[GPU], spec: ModelSpec, hidden_size: int, *, is_loaded: bool
) -> tuple[int, ...]:
    """Return the bytes for KV of every rank, or, where ranks have several processes, of each process of every rank.

    Args:
        config: what the user asked for, with the device that was chosen.
        gpus: GPUs that ranks use.
        spec: the model's facts.
        hidden_size: width of the model's hidden states.
        is_loaded: whether the weights are in memory already.

    Raises:
        ConfigError: there is not enough memory, or its size cannot be known.
    """
    asked, size, weights = config.kv_cache_memory, config.context_parallel_size, config.known_weights
    shares = (1.0,) * size if weights is None else tuple([weight / max(weights) for weight in weights])
    parts = config.tensor_parallel_size
    if config.device == "cpu":
        whole = kv_cache_memory(asked, parts * sum(shares))
        return tuple([int(whole * share) for share in shares])
    if config.executor in REMOTE_EXECUTORS:
        if asked is None:
            raise ConfigError(
                f"kv_cache_memory: got none with executor {config.executor!r} and device 'cuda', legal is a size: "
                "the GPUs are elsewhere"
            )
        return tuple([int(asked * share) for share in shares])
    weight_bytes = 0 if is_loaded else spec.weight_bytes
    if len(gpus) < size * parts:  # threads share one GPU
        together = None if asked is None else int(asked * parts * sum(shares))
        tokens, used = config.max_num_batched_tokens * size * parts, config.gpu_memory_utilization
        left = gpu_cache_memory(together, gpus, spec, parts * weight_bytes, hidden_size, tokens, used)
        return tuple([int(left / parts / sum(shares) * share) for share in shares])
    rooms = [
        gpu_cache_memory(
            None if asked is None else int(asked * share),
            gpus[rank * parts : (rank + 1) * parts],
            spec,
            weight_bytes,
            hidden_size,
            config.max_num_batched_tokens,
            config.gpu_memory_utilization,
        )
        for rank, share in enumerate(shares)
    ]
    if config.rank_weights == "auto":
        return tuple(rooms)
    smallest = min(room / share for room, share in zip(rooms, shares, strict=True))
    return tuple([int(smallest * share) for share in shares])


def kv_cache_memory(asked: int | None, num_shares: float) -> int:
    """Return the bytes for KV of the largest rank: those asked for, or 4 GiB at most and its share of half the memory.

    Args:
        asked: bytes that the user asked for, or None.
        num_shares: processes of ranks on this machine, each counted by its share of what the one with most has.

    Raises:
        ConfigError: all ranks together would take more than the machine has.
    """
    total, free = memory_bytes()
    if asked is None:
        return min(DEFAULT_KV_CACHE_MEMORY, int(free // 2 // num_shares))
    if asked * num_shares > total:
        raise ConfigError(
            f"kv_cache_memory: got {asked} bytes per rank, legal is at most {int(total // num_shares)}: "
            f"{num_shares:g} rank{'s' * (num_shares > 1)} share this machine's {total} bytes"
        )
    return asked


def share_with_draft(
    memories: Sequence[int], spec: ModelSpec, draft: ModelSpec
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide every rank's bytes for KV, so that the ranks hold as many tokens of the draft model as of the model.

    Args:
        memories: bytes of every rank.
        spec: the model's facts.
        draft: those of the model that makes drafts.

    Returns:
        Bytes of the model, and of the draft model, per rank.
    """
    own, drafts = (sum(group.token_bytes for group in of.kv_groups) for of in (spec, draft))
    for_draft = tuple([memory * drafts // (own + drafts) for memory in memories])
    return tuple([memory - taken for memory, taken in zip(memories, for_draft, strict=True)]), for_draft


CONTEXT_BYTES = 2**30
"""Bytes of a rank's CUDA context, libraries, and their workspaces."""
STEP_WIDTHS = 16
"""Tensors of the model's width that a step holds per token at its peak, about: four for an MLP's inner values, four
for queries and attention in float32, and the rest for messages."""


def gpu_cache_memory(
    asked: int | None,
    gpus: Sequence[GPU],
    spec: ModelSpec,
    weight_bytes: int,
    hidden_size: int,
    num_tokens: int,
    utilization: float,
) -> int:
    """Return the bytes for KV on a GPU, for all ranks that share it.

    Args:
        asked: bytes that the user asked for; None takes what is left of the GPU with the least free memory.
        gpus: GPUs that ranks use.
        spec: the model's facts.
        weight_bytes: bytes of the weights to load.
        hidden_size: width of the model's hidden states.
        num_tokens: most tokens of a step.
        utilization: share of the free memory that may be used.

    Raises:
        ConfigError: there is no room beside the weights.
    """
    least = min(gpus, key=lambda gpu: gpu.free_bytes)
    step_bytes = STEP_WIDTHS * hidden_size * DTYPE_BYTES[spec.kv_groups[0].spec.compute_dtype] * num_tokens
    left = int(utilization * least.free_bytes) - weight_bytes - CONTEXT_BYTES - step_bytes
    one_page = min(group.token_bytes for group in spec.kv_groups)  # more, but `pool_pages` knows how much
    if (one_page if asked is None else asked) > left:
        raise ConfigError(
            f"kv_cache_memory: got {asked or 'none'}, legal is at most {max(0, left)} bytes for a GPU: {least.name} "
            f"has {least.free_bytes} bytes free, of which gpu_memory_utilization {utilization:g} may be used, and "
            f"besides weights of {weight_bytes} bytes a step needs about {CONTEXT_BYTES + step_bytes}; or device cpu"
        )
    return left if asked is None else asked
