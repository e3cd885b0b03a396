"""Memory of a rank for keys and values.

Holds the amount that one process finds, and the one that all processes have. Must not know models.
Read next: `longspan.integrations.vllm.worker`.
"""

import os
from typing import Any

import psutil
import torch
import torch.distributed as dist
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

from longspan.errors import ConfigError


def local_kv_bytes(cache_config: Any, num_sharing: int, node_id: int) -> int:
    """Return the bytes for keys and values in this process.

    This is the user's number (`--kv-cache-memory-bytes` or VLLM_CPU_KVCACHE_SPACE), which is per process, as in vLLM;
    else this process's share of the memory that vLLM may use, less what the process has already.

    Args:
        cache_config: vLLM's configuration of KV caches.
        num_sharing: processes that share this process's memory node.
        node_id: the memory node.

    Returns:
        Bytes; 0 if none are left, which all ranks refuse together: a rank that raised here would let the others wait.
    """
    explicit: int | None = cache_config.kv_cache_memory_bytes
    if explicit is not None:
        return explicit
    memory = get_memory_node_info(node_id)  # knows the limits of containers
    share = cache_config.gpu_memory_utilization * memory.total_memory / num_sharing
    left = min(share - psutil.Process(os.getpid()).memory_info().rss, memory.available_memory / num_sharing)
    return max(0, int(left))


def common_kv_bytes(cache_config: Any, num_processes: int, block_bytes: int) -> int:
    """Return the bytes that every process has for keys and values, in whole blocks.

    Raises:
        ConfigError: a process has no room for a block; raised in all processes.

    Collective: every process of the default group.
    """
    # vLLM's rule: a process uses the memory node of the first core that it may run on.
    node_id: int = get_allowed_cpu_list()[0].numa_node
    nodes: list[int | None] = [None] * num_processes
    dist.all_gather_object(nodes, node_id)
    local = local_kv_bytes(cache_config, nodes.count(node_id), node_id)
    blocks = torch.tensor([local // block_bytes])
    dist.all_reduce(blocks, dist.ReduceOp.MIN)
    if not blocks.item():
        raise ConfigError(
            f"kv_cache_memory_bytes: got {cache_config.kv_cache_memory_bytes}, with gpu_memory_utilization "
            f"{cache_config.gpu_memory_utilization}, which leaves a process no room for a block of "
            f"{block_bytes} bytes; legal is more of either"
        )
    return int(blocks.item()) * block_bytes
