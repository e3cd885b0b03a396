"""Fingerprint of a model's files: hosts whose files differ would compute with different models.

Holds the search for the files and the hash of their parts. Must not know ranks or hosts.
Read next: `longspan.group.membership`, which compares fingerprints.
"""

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from longspan.models.loader import resolve_model
from longspan.models.lora import ADAPTER_CONFIG

NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
"""Number and size of the blocks hashed per file of weights: enough to detect another checkpoint, a merge or a largely
broken copy, but not one changed number."""


def local_directory(model: str) -> Path | None:
    """Directory of a model's files on this host; None for a model from the Hub."""
    path = Path(resolve_model(model))
    return path if path.is_dir() else None


def hub_directory(model: str) -> Path | None:
    """Directory of a Hub model's files in the cache; None if they are not cached."""
    config = try_to_load_from_cache(resolve_model(model), "config.json")
    return Path(config).parent if isinstance(config, str) else None


def fingerprint(directory: Path, adapter: Path | None = None) -> str:
    """Hash the configs, and the name, size, header and evenly spaced blocks of every file of weights.

    Args:
        directory: the model's files.
        adapter: files of the adapter that is merged into the weights, or None.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    files = sorted(directory.glob("*.safetensors"))
    if adapter is not None:
        digest.update((adapter / ADAPTER_CONFIG).read_bytes())
        files += sorted(adapter.glob("*.safetensors"))
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header_bytes, size)))
            for sample in range(NUM_SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
