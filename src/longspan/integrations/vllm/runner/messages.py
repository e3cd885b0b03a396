"""Messages of a step's attention between the ranks, over a process group that vLLM made.

Holds two collectives. Must not know what rows and parts mean.
Read next: `longspan.integrations.vllm.runner.step`.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class RankMessages:
    """Exchanges among the processes that hold the same part of every head: NCCL's on GPUs, gloo's on CPUs.

    Nothing goes through the host. All processes of the group must make the same calls in the same order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.num_bytes = 0
        """Bytes that this process has sent to others."""

    def gather(self, rows: Tensor) -> tuple[Tensor, dist.Work]:
        """Begin to bring the rows of all ranks to all.

        Args:
            rows: [M, ...], the same shape on every rank.

        Returns:
            [P * M, ...] in the order of ranks, and what must be waited for before they are read.

        Collective: every process of the group; (P - 1) times the bytes of `rows` from each.
        """
        rows = rows.contiguous()
        gathered = rows.new_empty((self.size * rows.shape[0], *rows.shape[1:]))
        work = dist.all_gather_into_tensor(gathered, rows, group=self._group, async_op=True)
        assert work is not None, "this process is in the group"
        self._count(rows.nbytes)
        return gathered, work

    def give_back(self, parts: Tensor) -> Tensor:
        """Send every rank its part, and receive this rank's part from all.

        Args:
            parts: [P, ...] contiguous; entry r is for rank r.

        Returns:
            [P, ...]; entry r is what rank r made for this rank.

        Collective: every process of the group; (P - 1) / P of the bytes of `parts` from each.
        """
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self._group)
        self._count(parts.nbytes // self.size)
        return received

    def _count(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes * (self.size - 1)


def warm_up(group: dist.ProcessGroup, device: torch.device) -> None:
    """Make both exchanges once, so that the group's buffers are allocated.

    Collective: every process of the group.
    """
    messages = RankMessages(group)
    gathered, arrival = messages.gather(torch.zeros(1, device=device))
    arrival.wait()
    messages.give_back(gathered)
