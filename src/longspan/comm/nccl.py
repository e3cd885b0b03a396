"""Communicator of ranks with a GPU each, over NCCL.

Holds what is specific to NCCL: messages that start together, waits that block a stream and not the process, and the end
of a rank that hangs. Must not know attention, pages or plans. No GPU has run it yet; its messages are tested over gloo.
Read next: `longspan.comm.distributed`, its base classes.

Note [Waiting on a GPU]
    `wait` makes the current stream wait for what has arrived, and returns at once; kernels of other streams, and what
    was launched before, run meanwhile. So a local partial that is launched between `exchange` and `wait` overlaps with
    the exchange, whose kernels are on NCCL's own stream, and exchanges may be part of a CUDA graph.

    `wait` gives no deadline to PyTorch: with one it would poll in this thread until all has arrived, which takes a
    millisecond at least and may not happen in a capture. So no Python code raises when a message does not come.
    PyTorch's watchdog ends the process when an exchange has taken `timeout_s` since it was launched, so that a step's
    exchanges have that long together. It does not see those that a graph repeats: there the driver ends ranks that owe
    an answer and get no further (`longspan.group.failures`).
    Source: torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp, `WorkNCCL::wait` and `workEnqueue`.
"""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.base import Pending
from longspan.comm.distributed import DistributedCommunicator, GroupCommunicator
from longspan.errors import CommunicationError


class BatchedCommunicator(GroupCommunicator):
    """One rank of a group over NCCL that the caller made and will destroy. See Note [Waiting on a GPU]."""

    def exchange(self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]) -> Pending:
        ops = [
            dist.P2POp(dist.irecv, tensor, group=self._group, group_peer=peer)
            for peer, tensor in recvs
            if tensor.numel()
        ]
        ops += [
            dist.P2POp(dist.isend, tensor, group=self._group, group_peer=peer)
            for peer, tensor in sends
            if tensor.numel()
        ]
        if not ops:
            return _PendingBatch(self.rank, [])
        try:
            works = dist.batch_isend_irecv(ops)  # together: one after another, two ranks could wait for each other
        except RuntimeError as error:
            raise CommunicationError(f"rank {self.rank}: {len(ops)} messages could not be started: {error}") from error
        return _PendingBatch(self.rank, works)


SHARED_BYTES = 64 * 2**20
"""Size of /dev/shm, per rank, with which NCCL is let use it. A connection takes 10 MB, and a container has 64 MB."""


def spare_shared_memory(rank: int, size: int, path: str = "/dev/shm") -> None:
    """Keep NCCL off shared memory that is too small: it would fail when it connects GPUs without peer access.

    It goes by sockets then. The whole size decides, not what is free at the moment: all ranks must decide the same.

    Args:
        rank: position of this process's rank; the first one says what it does on standard error.
        size: number of ranks in the group.
        path: where shared memory is.
    """
    try:
        found = os.statvfs(path)
        whole = found.f_blocks * found.f_frsize
    except OSError:
        whole = 0
    if whole >= SHARED_BYTES * size or "NCCL_SHM_DISABLE" in os.environ:
        return
    os.environ["NCCL_SHM_DISABLE"] = "1"
    if rank == 0:
        print(
            f"longspan: {path} has {whole / 2**20:.0f} MiB, too few for {size} GPUs: those without peer access talk "
            f"over sockets, which is slower; give a container --shm-size={size * SHARED_BYTES // 2**20}m",
            file=sys.stderr,
            flush=True,
        )


class NCCLCommunicator(BatchedCommunicator, DistributedCommunicator):
    """One rank of the default process group, which it makes and destroys. See Note [Waiting on a GPU]."""

    def __init__(
        self,
        rank: int,
        size: int,
        init_method: str,
        device: torch.device,
        *,
        timeout_s: float = 300.0,
        backend: str = "nccl",
    ) -> None:
        """Join the group.

        Args:
            rank: position of this process's rank.
            size: number of ranks in the group.
            init_method: where the ranks meet, for torch.distributed (`file:///...`, `tcp://host:port`, `env://`).
            device: this process's GPU, used by no other process.
            timeout_s: longest time of an exchange, from its launch.
            backend: backend of torch.distributed; others than `nccl` are for tests.

        Raises:
            CommunicationError: not all ranks came.

        Collective: all `size` ranks must join; NCCL connects them here.
        """
        # A graph's buffers would be registered with the network, and a registered sender waits for a registered
        # receiver: one rank may replay what another launches. Source: NVIDIA/nccl v2.28.9, src/device/prims_simple.h.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        spare_shared_memory(rank, size)
        options = None
        if backend == "nccl":
            # A hop of a ring must not wait for an attention kernel that fills the GPU.
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            options._timeout = timedelta(seconds=timeout_s)  # as the group's, or PyTorch warns
        super().__init__(rank, size, init_method, timeout_s=timeout_s, backend=backend, device=device, options=options)


class _PendingBatch:
    def __init__(self, rank: int, works: Sequence[dist.Work]) -> None:
        self._rank, self._works = rank, works

    def wait(self) -> None:
        for work in self._works:
            try:
                work.wait()
            except RuntimeError as error:
                raise CommunicationError(f"rank {self._rank}: an exchange failed: {error}") from error
