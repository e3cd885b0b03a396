"""Communicators of ranks that are processes, over `torch.distributed` (gloo; `longspan.comm.nccl` for GPUs).

Holds the wrapper of point-to-point sends and receives. Must not know attention, pages or plans.
Read next: `longspan.comm.recording`.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from longspan.comm.base import RANKS, GroupNames, Pending
from longspan.errors import CommunicationError

JOIN_TIMEOUT_S = 300.0
"""Shortest wait for all ranks to join: they load their weights before, at different speeds."""


class GroupCommunicator:
    """One rank of a `torch.distributed` process group that the caller made and will destroy."""

    def __init__(
        self, group: dist.ProcessGroup, store: Any, *, timeout_s: float = 300.0, names: GroupNames = RANKS
    ) -> None:
        """Wrap a process group.

        Args:
            group: process group that this process belongs to.
            store: key-value store of the group.
            timeout_s: longest wait for a peer in every exchange.
            names: names of this process and its peers in errors.
        """
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.store, self.names = store, names
        self._group, self._timeout_s = group, timeout_s

    def exchange(self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]) -> Pending:
        works: list[tuple[str, dist.Work]] = []
        what = ""
        try:
            for peer, tensor in recvs:
                if tensor.numel():
                    what = f"receive of {tensor.numel()} elements from {self.names.peer(peer)}"
                    works.append((what, _started(dist.irecv(tensor, group=self._group, group_src=peer))))
            for peer, tensor in sends:
                if tensor.numel():
                    what = f"send of {tensor.numel()} elements to {self.names.peer(peer)}"
                    works.append((what, _started(dist.isend(tensor, group=self._group, group_dst=peer))))
        except RuntimeError as error:
            raise CommunicationError(f"{self.names.own(self.rank)}: {what} failed: {error}") from error
        return _PendingWorks(self.names.own(self.rank), works, self._timeout_s)

    def close(self) -> None:
        """Do nothing: the caller destroys the process group."""


class DistributedCommunicator(GroupCommunicator):
    """One rank of the default process group, which this communicator makes and destroys."""

    def __init__(
        self,
        rank: int,
        size: int,
        init_method: str,
        *,
        timeout_s: float = 300.0,
        backend: str = "gloo",
        device: torch.device | None = None,
        options: Any = None,
    ) -> None:
        """Join the group.

        Args:
            rank: position of this process's rank.
            size: number of ranks in the group.
            init_method: where the ranks meet, for torch.distributed (`file:///...`, `tcp://host:port`, `env://`).
            timeout_s: longest wait for a peer in every exchange; joining may take at least `JOIN_TIMEOUT_S`.
            backend: backend of torch.distributed.
            device: this process's device, for a backend whose waits have no deadline of their own: `timeout_s` then is
                the group's, and a GPU is connected at once. None for a backend that waits with a deadline each time.
            options: the backend's own options; None for its defaults.

        Raises:
            CommunicationError: not all ranks joined.

        Collective: all `size` ranks must join.
        """
        join_timeout = timedelta(seconds=max(timeout_s, JOIN_TIMEOUT_S))
        try:
            store, _, _ = next(rendezvous(init_method, rank, size, timeout=join_timeout))
            store.set_timeout(join_timeout)
            timeout = join_timeout if device is None else timedelta(seconds=timeout_s)
            at_once = device if device is not None and device.type == "cuda" else None
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=size,
                timeout=timeout,
                device_id=at_once,
                pg_options=options,
            )
        except (RuntimeError, dist.DistError) as error:
            raise CommunicationError(f"rank {rank}: could not join the group of {size}: {error}") from error
        world = dist.group.WORLD
        assert world is not None
        super().__init__(world, store, timeout_s=timeout_s)

    def close(self) -> None:
        dist.destroy_process_group()


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this process is not in the group"
    return work


class _PendingWorks:
    def __init__(self, who: str, works: list[tuple[str, dist.Work]], timeout_s: float) -> None:
        self._who, self._works, self._timeout = who, works, timedelta(seconds=timeout_s)

    def wait(self) -> None:
        for what, work in self._works:
            try:
                work.wait(self._timeout)
            except RuntimeError as error:
                raise CommunicationError(f"{self._who}: {what} failed: {error}") from error
