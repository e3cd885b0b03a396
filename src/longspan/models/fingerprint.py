"""A fingerprint of a model's files: hosts whose files differ would compute with different models.

Holds where the files are and what of them is looked at. Must not know ranks or hosts.
Read next: `longspan.group.membership`, which compares.
"""

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from longspan.models.loader import resolve_model

NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
"""Blocks of each file of weights: enough to see another checkpoint, a merge or a broken copy of a good part; not one
changed number."""


def local_directory(model: str) -> Path | None:
    """Where a model's files are on this host; None for one from the Hub."""
    path = Path(resolve_model(model))
    return path if path.is_dir() else None


def hub_directory(model: str) -> Path | None:
    """Where the files of a model from the Hub are in the cache; None if they are not."""
    config = try_to_load_from_cache(resolve_model(model), "config.json")
    return Path(config).parent if isinstance(config, str) else None


def fingerprint(directory: Path) -> str:
    """Hash of the config, and of every file of weights its name, size, header, and blocks at equal distances."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header_bytes, size)))
            for sample in range(NUM_SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
