"""Messages of a GPU's tensors, sent through host memory.

Holds the copies before and after another communicator. This is slower than NCCL, but keeps one order of messages on all
ranks, which NCCL's queues per pair of ranks do not. NCCL may replace it once it can be tested on several GPUs.
Must not know plans.
Read next: `longspan.comm.base`, the protocol; `longspan.integrations.vllm.group`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.comm.base import Communicator, Pending


class StagingCommunicator:
    """Communicator for a GPU's tensors, around one for tensors on the CPU."""

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner
        self.rank, self.size = inner.rank, inner.size

    def exchange(self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]) -> Pending:
        outgoing = [(peer, tensor.to("cpu", copy=True)) for peer, tensor in sends]  # waits for the GPU
        arriving = [(peer, torch.empty(tensor.shape, dtype=tensor.dtype)) for peer, tensor in recvs]
        targets = [(tensor, buffer) for (_, tensor), (_, buffer) in zip(recvs, arriving, strict=True)]
        return _Staged(self._inner.exchange(outgoing, arriving), outgoing, targets)

    def close(self) -> None:
        self._inner.close()


class _Staged:
    """An exchange under way; keeps its buffers alive."""

    def __init__(
        self, pending: Pending, outgoing: list[tuple[int, Tensor]], targets: list[tuple[Tensor, Tensor]]
    ) -> None:
        self._pending, self._outgoing, self._targets = pending, outgoing, targets

    def wait(self) -> None:
        self._pending.wait()
        for tensor, buffer in self._targets:
            tensor.copy_(buffer)
        self._outgoing, self._targets = [], []
