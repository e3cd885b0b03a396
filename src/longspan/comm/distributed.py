"""Ranks as processes, over `torch.distributed` (gloo).

Holds the wrapper of point-to-point sends and receives. Must not know attention, pages or plans.
Read next: `longspan.comm.recording`.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from longspan.comm.base import Pending
from longspan.errors import CommunicationError

JOIN_TIMEOUT_S = 300.0
"""Shortest wait for all ranks to come: they load their weights before, and not at the same speed."""


class DistributedCommunicator:
    """One rank of a `torch.distributed` process group."""

    def __init__(self, rank: int, size: int, init_method: str, *, timeout_s: float = 300.0) -> None:
        """Join the group.

        Args:
            rank: this process's position.
            size: ranks in the group.
            init_method: where the ranks meet, as torch.distributed takes it (`file:///...`, `tcp://host:port`, `env://`).
            timeout_s: longest wait for a peer in every exchange; joining may take `JOIN_TIMEOUT_S` at least.

        Raises:
            CommunicationError: not all ranks came.

        Collective: all `size` ranks must join.
        """
        self.rank, self.size = rank, size
        self._timeout_s = timeout_s
        join_timeout = timedelta(seconds=max(timeout_s, JOIN_TIMEOUT_S))
        try:
            self.store, _, _ = next(rendezvous(init_method, rank, size, timeout=join_timeout))
            self.store.set_timeout(join_timeout)
            dist.init_process_group("gloo", store=self.store, rank=rank, world_size=size, timeout=join_timeout)
        except (RuntimeError, dist.DistError) as error:
            raise CommunicationError(f"rank {rank}: could not join the group of {size}: {error}") from error

    def exchange(self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]) -> Pending:
        works: list[tuple[str, dist.Work]] = []
        what = ""
        try:
            for peer, tensor in recvs:
                if tensor.numel():
                    what = f"receive of {tensor.numel()} elements from rank {peer}"
                    works.append((what, _started(dist.irecv(tensor, peer))))
            for peer, tensor in sends:
                if tensor.numel():
                    what = f"send of {tensor.numel()} elements to rank {peer}"
                    works.append((what, _started(dist.isend(tensor, peer))))
        except RuntimeError as error:
            raise CommunicationError(f"rank {self.rank}: {what} failed: {error}") from error
        return _PendingWorks(self.rank, works, self._timeout_s)

    def close(self) -> None:
        dist.destroy_process_group()


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this process is not in the group"
    return work


class _PendingWorks:
    def __init__(self, rank: int, works: list[tuple[str, dist.Work]], timeout_s: float) -> None:
        self._rank, self._works, self._timeout = rank, works, timedelta(seconds=timeout_s)

    def wait(self) -> None:
        for what, work in self._works:
            try:
                work.wait(self._timeout)
            except RuntimeError as error:
                raise CommunicationError(f"rank {self._rank}: {what} failed: {error}") from error
