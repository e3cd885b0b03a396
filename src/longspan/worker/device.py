"""Device of a process, and the checks before it loads gigabytes.

Holds the checks. Must not know plans, schedulers or how ranks start.
Read next: `longspan.worker.build`, which calls them; `longspan.engine.gpus`, the driver's checks.
"""

from collections.abc import Mapping, Sequence

import torch

from longspan.attention.base import AttentionBackend, check_stored
from longspan.attention.check import check_against_reference
from longspan.attention.latent import LatentBackend
from longspan.attention.select import MIN_CAPABILITY, make_backend
from longspan.config import EngineConfig
from longspan.errors import ConfigError
from longspan.group.shape import GroupShape, ProcessId
from longspan.types import ModelSpec


def process_device(
    config: EngineConfig, shape: GroupShape, process: ProcessId, environment: Mapping[str, str]
) -> torch.device:
    """Return a process's own device; a GPU becomes the process's current one.

    Processes of one machine take its GPUs in their order; a process that torchrun started takes the GPU of its
    LOCAL_RANK, and one that sees a single GPU, as Ray's actors do, takes that. Ranks that are threads share the first.

    Args:
        config: engine options, which name the device.
        shape: ranks and processes of the group.
        process: this process.
        environment: environment variables, torchrun's among them.

    Raises:
        ConfigError: there is no such GPU, or it is too old.
    """
    if config.device == "cpu":
        return torch.device("cpu")
    assert config.device == "cuda", "the driver has chosen"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ConfigError("device: got 'cuda' where PyTorch sees no GPU, legal is cpu")
    index = 0
    if config.executor == "processes":
        index = shape.number(process)
    elif config.executor == "external":
        index = int(environment.get("LOCAL_RANK", "0"))
    if index >= count and config.executor == "external":
        raise ConfigError(f"LOCAL_RANK: got {index} with {count} GPUs in sight of {shape.name(process)}, legal is less")
    if index >= count:
        raise ConfigError(
            f"context_parallel_size: got {config.context_parallel_size} with {count} GPU{'s' * (count > 1)} in sight "
            f"of {shape.name(process)}, legal is a GPU for every process of a rank, or device cpu"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)  # before anything is asked, which would take memory of the first GPU
    check_capability(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    return device


def check_capability(name: str, capability: tuple[int, int]) -> None:
    """Check that a GPU is new enough.

    Raises:
        ConfigError: the GPU is too old.
    """
    if capability < MIN_CAPABILITY:
        needed = ".".join(map(str, MIN_CAPABILITY))
        raise ConfigError(
            f"device: got {name} of compute capability {capability[0]}.{capability[1]}, legal is {needed} or later, "
            "or device cpu"
        )


def device_backend(config: EngineConfig, spec: ModelSpec, device: torch.device) -> AttentionBackend:
    """Return a device's attention kernels, checked for the model, and on a GPU against the reference.

    Raises:
        ConfigError: the kernels do not take the model's dtype, head size, KV layout or kind of attention.
        LongspanError: the kernels are wrong on this GPU.
    """
    backend = make_backend(config.attention_backend, device)
    kinds = {(group, spec.attention_params(layer)) for group in spec.kv_groups for layer in group.layers}
    for group, params in kinds:
        check_stored(group.spec)
        if (reason := backend.unsupported(group.spec, params)) is not None:
            raise ConfigError(
                f"attention_backend: got {config.attention_backend!r}, legal is one that takes the model ({reason})"
            )
    if device.type == "cuda":
        for group, params in kinds:
            check_against_reference(backend, group, params, device)
            if group.spec.latent is not None and backend.unsupported(group.expanded.spec, params) is None:
                check_against_reference(backend, group.expanded, params, device)
    has_latents = any(group.spec.latent is not None for group in spec.kv_groups)
    return LatentBackend(backend) if has_latents else backend


def check_memory(
    spec: ModelSpec, weight_bytes: int, num_pages: Sequence[int], page_size: int, device: torch.device
) -> None:
    """Check that weights and pools fit into a GPU's memory.

    Args:
        spec: the model's facts.
        weight_bytes: bytes of weights that are still to be loaded.
        num_pages: pages per KV group, of all ranks that share the device; behind them slots of states, if the model has
            recurrent layers.
        page_size: tokens per page.
        device: the device.

    Raises:
        ConfigError: they do not fit.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    pools = sum(pages * group.page_bytes(page_size) for group, pages in zip(spec.kv_groups, num_pages, strict=False))
    pools += num_pages[-1] * spec.state_bytes
    if weight_bytes + pools > free:
        raise ConfigError(
            f"kv_cache_memory: got pools of {pools} bytes beside weights of {weight_bytes} bytes, legal is what "
            f"fits into the {free} bytes that are free on {torch.cuda.get_device_name(device)} (of {total})"
        )
