"""Tensors of a repository's safetensors files, read when they are needed.

Holds finding the files and reading single tensors. Must not know models, or what a tensor means.
Read next: `longspan.models.quantization`, which makes dense weights of several tensors.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file


class LazyTensor:
    """Tensor that is made when it is asked for, as Transformers' loader asks: by `tensor[...]`."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make

    def __getitem__(self, index: Any) -> Tensor:
        """Make the tensor, and return a part of it."""
        return self._make()[index]


class Checkpoint:
    """All tensors of several safetensors files, by name."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Open files, and read their headers alone.

        Raises:
            OSError, safetensors.SafetensorError: a file is missing or broken.
        """
        handles = [safe_open(file, framework="pt", device="cpu") for file in files]
        self._handles = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118, no mapping
        self.metadata: dict[str, str] = {}
        """Texts in the headers of all files."""
        for handle in handles:
            self.metadata |= handle.metadata() or {}

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._handles)

    def read(self, name: str) -> Tensor:
        """Return a tensor, mapped from its file."""
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor

    def read_meta(self, name: str) -> Tensor:
        """Return a tensor's shape and dtype, as a tensor on the meta device."""
        found = self._handles[name].get_slice(name)
        return torch.empty(found.get_shape(), dtype=_DTYPES[found.get_dtype()], device="meta")

    def lazy(self, name: str) -> LazyTensor:
        """Return a tensor that is read later."""
        return LazyTensor(lambda: self.read(name))


_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Dtypes by safetensors' names."""


def find_checkpoint(name: str, *, is_offline: bool) -> Checkpoint:
    """Open the safetensors files of a repository.

    Args:
        name: directory or Hub id.
        is_offline: whether the Hub must not be asked.

    Raises:
        OSError: there are none.
    """

    def find(file: str, *, must_exist: bool) -> Path | None:
        found = cached_file(name, file, local_files_only=is_offline, _raise_exceptions_for_missing_entries=must_exist)
        return None if found is None else Path(found)

    index = find(SAFE_WEIGHTS_INDEX_NAME, must_exist=False)
    shards = (
        [SAFE_WEIGHTS_NAME] if index is None else sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    )
    files = [find(shard, must_exist=True) for shard in shards]
    return Checkpoint([file for file in files if file is not None])
