"""Facts about this machine's GPUs, which the driver needs before it starts processes on them.

Holds the query of the GPUs: by NVML, or by PyTorch in a process of its own, which takes seconds: a CUDA context in the
driver would take memory of the first GPU for as long as the driver runs. Must not know models.
Read next: `longspan.engine.nvml`; `longspan.engine.memory`; `longspan.worker.device`, which checks every process's own
GPU.
"""

import os
import subprocess
import sys

import msgspec
import torch
from msgspec import structs

from longspan.attention.select import MIN_CAPABILITY
from longspan.config import REMOTE_EXECUTORS, EngineConfig
from longspan.engine import nvml
from longspan.errors import ConfigError
from longspan.group.shape import GroupShape
from longspan.worker.device import check_capability

LOOK_S = 120.0
"""Seconds that the query may take: a CUDA driver's first load takes some, torch's libraries on a cold disk more."""

_SCRIPT = """
import json, torch
gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
facts = [(torch.cuda.get_device_name(gpu), torch.cuda.get_device_capability(gpu), torch.cuda.mem_get_info(gpu)[0])
         for gpu in gpus]
print(json.dumps(facts))
"""


class GPU(msgspec.Struct, frozen=True, array_like=True):
    """One GPU, as PyTorch reports it."""

    name: str
    capability: tuple[int, int]
    """Compute capability, major and minor."""
    free_bytes: int


def choose_device(config: EngineConfig, model: torch.nn.Module | None = None) -> tuple[str, list[GPU]]:
    """Choose the device that ranks compute on.

    Args:
        config: with `auto`, ranks go where a loaded model is, or else on this machine's GPUs, if there is one for each
            process, none is too old, and the config asks for nothing that only a CPU does.
        model: a loaded model, or None.

    Returns:
        `cpu` or `cuda`, and the GPUs that processes of this machine use, in the order of processes.

    Raises:
        ConfigError: GPUs were asked for and are not there, or the model is on another device.
    """
    if model is not None:
        holds = next(model.parameters()).device.type
        if config.device not in ("auto", holds):
            raise ConfigError(f"device: got {config.device!r} with a model on {holds!r}, legal is the model's")
        if (next(model.parameters()).device.index or 0) != 0:
            raise ConfigError(f"model: got one on {next(model.parameters()).device}, legal is cpu or cuda:0")
        config = structs.replace(config, device=holds)
    is_remote = config.executor in REMOTE_EXECUTORS
    if is_remote or config.device == "cpu":
        return ("cuda" if config.device == "cuda" else "cpu"), []
    needed = 1 if config.executor == "threads" else GroupShape.of(config).world_size  # threads share the first GPU
    if config.device == "auto":
        only_on_a_cpu = (
            config.attention_backend == "cpu"
            or config.check_messages
            or config.simulated_links is not None
            or config.measure == "again"
            or config.quantization != "none"
            or config.has_tiers
        )
        # NVML counts GPUs without a CUDA context; a PyTorch build for CPUs sees none.
        if only_on_a_cpu or torch.version.cuda is None or torch.cuda.device_count() < needed:
            return "cpu", []
        try:
            gpus = find_gpus()[:needed]
        except ConfigError:  # the GPUs were counted, and cannot be used
            return "cpu", []
        are_fit = len(gpus) == needed and all(gpu.capability >= MIN_CAPABILITY for gpu in gpus)
        return ("cuda", gpus) if are_fit else ("cpu", [])
    if torch.version.cuda is None:
        raise ConfigError(f"device: got 'cuda' with PyTorch {torch.__version__}, a build for CPUs, legal is cpu")
    gpus = find_gpus()
    if not gpus:
        raise ConfigError("device: got 'cuda' on a machine where PyTorch sees no usable GPU, legal is cpu")
    if len(gpus) < needed:
        size = config.tensor_parallel_size
        raise ConfigError(
            f"context_parallel_size: got {config.context_parallel_size}{f' x {size} processes' * (size > 1)} with "
            f"{len(gpus)} GPU{'s' * (len(gpus) != 1)}, legal is one {'rank' if size == 1 else 'process'} for each at "
            "most, or device cpu"
        )
    for gpu in gpus[:needed]:
        check_capability(gpu.name, gpu.capability)
    return "cuda", gpus[:needed]


def find_gpus() -> list[GPU]:
    """Return this machine's GPUs, in CUDA's order.

    Raises:
        ConfigError: the GPUs cannot be queried.
    """
    found = nvml.look(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return ask_pytorch(_SCRIPT) if found is None else [GPU(*gpu) for gpu in found]


def ask_pytorch(script: str) -> list[GPU]:
    """Return this machine's GPUs, as a new process sees them.

    Args:
        script: Python program that prints the GPUs' facts as JSON.

    Raises:
        ConfigError: the GPUs cannot be queried.
    """
    try:
        look = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LOOK_S)
        return msgspec.json.decode(look.stdout.strip().rpartition("\n")[2], type=list[GPU])
    except subprocess.TimeoutExpired:
        raise ConfigError(f"device: got 'cuda', whose GPUs did not answer within {LOOK_S:g} s, legal is cpu") from None
    except msgspec.DecodeError:
        said = look.stderr.strip().rpartition("\n")[2]
        raise ConfigError(f"device: got 'cuda', whose GPUs cannot be used ({said}), legal is cpu") from None
