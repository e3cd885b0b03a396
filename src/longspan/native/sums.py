"""Binding of `sums.c`: sums over processes, or threads, that have memory in common.

Holds the call. Must not know who makes the memory, or what is added.
Read next: `longspan.comm.shared_sums`, which calls it.
"""

from enum import IntEnum

import torch
from torch import Tensor

from longspan.native.kernels import library

LINE = 128
"""Bytes of a member's place at the start of the memory, as in sums.c."""

MAX_STEP = 1 << 32
"""Steps are counted modulo this number."""


class Waited(IntEnum):
    """How a member waited for the others, as in sums.c."""

    NOT = 0
    """All were there."""
    LOOKED = 1
    """They came while it looked for them."""
    SLEPT = 2
    """It slept until they came."""
    IN_VAIN = 3
    """Some have not come: there is no sum yet."""


def memory_bytes(size: int, slot_bytes: int) -> int:
    """Bytes of the memory that `size` members have in common."""
    return size * (LINE + 2 * slot_bytes)


class SharedSum:
    """Sum over members, as one of them calls it. All of them make the same calls."""

    def __init__(self, address: int, index: int, size: int, slot_bytes: int) -> None:
        """Take memory of `memory_bytes`, all zeros, at an address that is a multiple of 64.

        Args:
            address: of the memory, in this process.
            index: this member.
            size: number of members.
            slot_bytes: most bytes of a part, a multiple of 64.
        """
        found = library()
        assert found is not None
        assert address % 64 == 0
        self._call = found.longspan_shared_sum
        self._fixed = (address, index, size, slot_bytes)
        self._step = 0

    def next_slot(self, member: int) -> int:
        """Start in bytes of a member's slot of the next sum, in which a sum of no elements leaves what is there."""
        _, _, size, slot_bytes = self._fixed
        return size * LINE + (2 * member + (self._step + 1) % 2) * slot_bytes

    def add(self, part: Tensor, out: Tensor, look_s: float, wait_s: float) -> Waited:
        """Write this member's part of the next sum, and add the parts of all.

        Args:
            part: [n] float32, contiguous, of `slot_bytes` at most.
            out: [n] float32, contiguous, written; not `part`.
            look_s: seconds for which it looks for the others without sleep.
            wait_s: seconds for which it sleeps until the others come.

        Returns:
            How it waited; where that was in vain, `again` waits once more.
        """
        self._step = (self._step + 1) % MAX_STEP
        return self._wait(part, out, 0, look_s, wait_s)

    def again(self, part: Tensor, out: Tensor, wait_s: float) -> Waited:
        """Go on waiting for a sum that was not there, with the same tensors."""
        return self._wait(part, out, 1, 0.0, wait_s)

    def _wait(self, part: Tensor, out: Tensor, is_posted: int, look_s: float, wait_s: float) -> Waited:
        status: int = self._call(
            *self._fixed,
            *(self._step, is_posted, part.data_ptr(), out.data_ptr(), part.numel()),
            *(int(look_s * 1e9), int(wait_s * 1e9)),
        )
        assert status <= Waited.IN_VAIN, f"the kernel refused to add {part.numel()} elements"
        return Waited(status)


def can_add(part: Tensor) -> bool:
    """Whether `SharedSum` takes a tensor, or pieces of it."""
    return part.dtype is torch.float32 and part.device.type == "cpu"
