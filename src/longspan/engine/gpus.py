"""What the driver must know of this machine's GPUs before it starts ranks on them.

Holds the look at them, from a process of its own: the driver makes no CUDA context, which would take memory of the
first GPU for as long as it runs. Must not know models.
Read next: `longspan.engine.memory`; `longspan.worker.device`, what every rank checks of its own GPU.
"""

import subprocess
import sys

import msgspec
import torch

from longspan.config import REMOTE_EXECUTORS, EngineConfig
from longspan.errors import ConfigError

LOOK_S = 120.0
"""Longest look. A driver that is loaded for the first time takes seconds, torch's libraries from a cold disk more."""

_SCRIPT = """
import json, torch
gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
print(json.dumps([(torch.cuda.get_device_name(gpu), *torch.cuda.mem_get_info(gpu)) for gpu in gpus]))
"""


class GPU(msgspec.Struct, frozen=True, array_like=True):
    """One of them."""

    name: str
    free_bytes: int
    total_bytes: int


def resolve_device(config: EngineConfig) -> str:
    """`cpu` or `cuda`: what was asked for, or what this machine has.

    Raises:
        ConfigError: this machine has no GPU that PyTorch can use, and ranks would run here.
    """
    if config.executor in REMOTE_EXECUTORS:
        return "cpu" if config.device == "auto" else config.device
    if config.device == "cpu" or torch.version.cuda is None:
        if config.device == "cuda":
            raise ConfigError(f"device: got 'cuda' with PyTorch {torch.__version__}, a build for CPUs, legal is cpu")
        return "cpu"
    count = torch.cuda.device_count()  # through NVML, without a context
    if config.device == "auto":
        return "cuda" if count and config.attention_backend != "cpu" else "cpu"
    if count == 0:
        raise ConfigError("device: got 'cuda' on a machine where PyTorch sees no GPU, legal is cpu")
    return "cuda"


def find_gpus(script: str = _SCRIPT) -> list[GPU]:
    """This machine's, as a process that starts now sees them. Args: `script` for tests.

    Raises:
        ConfigError: they cannot be looked at.
    """
    try:
        look = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LOOK_S)
        return msgspec.json.decode(look.stdout.strip().rpartition("\n")[2], type=list[GPU])
    except subprocess.TimeoutExpired:
        raise ConfigError(f"device: got 'cuda', whose GPUs did not answer within {LOOK_S:g} s, legal is cpu") from None
    except msgspec.DecodeError:
        said = look.stderr.strip().rpartition("\n")[2]
        raise ConfigError(f"device: got 'cuda', whose GPUs cannot be used ({said}), legal is cpu") from None
