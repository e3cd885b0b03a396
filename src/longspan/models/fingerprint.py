"""Fingerprint of a model's files: hosts whose files differ would compute with different models.

Holds the search for the files and the hash of their parts. Must not know ranks or hosts.
Read next: `longspan.group.membership`, which compares fingerprints.
"""

import hashlib
import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from longspan.models.loader import resolve_model
from longspan.models.lora import ADAPTER_CONFIG

NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
"""Number and size of the blocks hashed per file of weights: enough to detect another checkpoint, a merge or a largely
broken copy, but not one changed number."""

TENSOR_BYTES = 512
"""Bytes in the middle of a tensor that are hashed of each."""


def local_directory(model: str) -> Path | None:
    """Directory of a model's files on this host; None for a model from the Hub."""
    path = Path(resolve_model(model))
    return path if path.is_dir() else None


def hub_directory(model: str) -> Path | None:
    """Directory of a Hub model's files in the cache; None if they are not cached."""
    config = try_to_load_from_cache(resolve_model(model), "config.json")
    return Path(config).parent if isinstance(config, str) else None


def tensor_fingerprint(*directories: Path | None) -> str:
    """Hash a block of every tensor in safetensors files: one that another training or merge has changed is noticed,
    even if it is a small part of its file.

    Args:
        directories: of the files, None among them for none.
    """
    digest = hashlib.sha256()
    for path in sorted(file for place in directories if place is not None for file in place.glob("*.safetensors")):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
            for name, tensor in sorted(header.items()):
                if name != "__metadata__":
                    start, end = tensor["data_offsets"]
                    file.seek(8 + header_bytes + max(start, (start + end - TENSOR_BYTES) // 2))
                    digest.update(f"{path.name} {name} {tensor['dtype']} {tensor['shape']}".encode())
                    digest.update(file.read(min(TENSOR_BYTES, end - start)))
    return digest.hexdigest()


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
