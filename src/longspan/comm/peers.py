"""Processes of one rank: sums, and what one of them tells the others.

Holds what a communicator between the processes of a rank is used for. Must not know models, plans or what is summed.
Read next: `longspan.comm.base`; `longspan.models.tensor_parallel`, whose layers call this.

Note [Same sums]
    Every process goes on with a sum as if it had computed it alone: it normalises it, chooses experts by it. So sums
    must be equal to the bit in all of them. Whoever adds, adds the parts in the order of processes, in float32 at
    least. Where they have memory in common, each writes its part there, and adds all parts. As messages, few bytes go
    to all others at once; of many, three or more processes add a piece each, and hand it out. Bytes that each of N
    processes sends, or has the others read:

        shared memory, or few       (N - 1) * S
        many                        2 * (N - 1) / N * S
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.comm.base import Communicator
from longspan.comm.shared_sums import SharedSums
from longspan.native.sums import can_add

FEW_BYTES = 32 * 1024
"""Largest part that each process sends whole to all others, however many they are: one exchange is sooner than two."""


class Peers:
    """Processes of a rank, as one of them sees them. All of them make the same calls in the same order."""

    def __init__(self, comm: Communicator, shared: SharedSums | None = None) -> None:
        """Take what the rank's processes have in common.

        Args:
            comm: their communicator, in which a process has its `tp_index` as its rank.
            shared: their sums in shared memory; None where all sums are messages.
        """
        self._comm, self._shared = comm, shared
        self.index, self.size = comm.rank, comm.size
        self.bytes_summed = 0
        """Bytes that all processes of the rank have sent for sums, or had each other read."""

    def sum(self, part: Tensor) -> Tensor:
        """Add the parts of all processes; the result is equal to the bit in all of them.

        Args:
            part: any shape, the same in all processes.

        Returns:
            A tensor of the same shape and dtype. Without elements nothing is sent.

        Collective: all processes of the rank. See Note [Same sums] for the bytes.
        """
        if self.size == 1 or not part.numel():
            return part
        part = part.contiguous()
        if self._shared is not None and can_add(part):
            self.bytes_summed += self.size * (self.size - 1) * part.nbytes
            return self._shared.add(part)
        if self.size == 2 or part.nbytes <= FEW_BYTES:
            self.bytes_summed += self.size * (self.size - 1) * part.nbytes
            return _add([*self._exchange_whole(part)])
        self.bytes_summed += 2 * (self.size - 1) * part.nbytes
        return self._sum_pieces(part.view(-1)).view(part.shape)

    def _exchange_whole(self, part: Tensor) -> list[Tensor]:
        """Return the parts of all processes, in their order."""
        others = [peer for peer in range(self.size) if peer != self.index]
        parts = [part if peer == self.index else torch.empty_like(part) for peer in range(self.size)]
        self._comm.exchange([(peer, part) for peer in others], [(peer, parts[peer]) for peer in others]).wait()
        return parts

    def _sum_pieces(self, part: Tensor) -> Tensor:
        """Add parts [n] of which each process adds one piece."""
        pieces = [part[span(len(part), peer, self.size)] for peer in range(self.size)]
        others = [peer for peer in range(self.size) if peer != self.index]
        mine = pieces[self.index]
        parts = [mine if peer == self.index else torch.empty_like(mine) for peer in range(self.size)]
        self._comm.exchange([(peer, pieces[peer]) for peer in others], [(peer, parts[peer]) for peer in others]).wait()
        total = torch.empty_like(part)
        out = [total[span(len(part), peer, self.size)] for peer in range(self.size)]
        out[self.index].copy_(_add(parts))
        own = out[self.index]
        self._comm.exchange([(peer, own) for peer in others], [(peer, out[peer]) for peer in others]).wait()
        return total

    def gather(self, part: Tensor, width: int) -> Tensor:
        """Join the processes' columns in the first process.

        Args:
            part: [..., w] this process's columns, `span(width, index, size)` of them.
            width: columns of all processes.

        Returns:
            [..., width] in the first process; `part` in the others, which send it: w elements per row.

        Collective: all processes of the rank.
        """
        if self.size == 1:
            return part
        spans = (span(width, peer, self.size) for peer in range(self.size))
        widths = [one.stop - one.start for one in spans]
        if self._shared is not None and can_add(part) and self._shared.can_gather(part, widths):
            return self._shared.gather(part, widths)
        if self.index:
            self._comm.exchange([(0, part.contiguous())], []).wait()
            return part
        parts = [part.new_empty(*part.shape[:-1], columns) for columns in widths[1:]]
        self._comm.exchange([], list(enumerate(parts, start=1))).wait()
        return torch.cat([part, *parts], dim=-1)

    def tell(self, values: Sequence[int], device: torch.device) -> list[int]:
        """Return the first process's numbers in all processes; the others say anything of the same length.

        Args:
            values: numbers, eight bytes each.
            device: device of this process, through whose memory they go.

        Collective: all processes of the rank.
        """
        if self.size == 1 or not values:
            return list(values)
        told = torch.tensor(values, dtype=torch.int64, device=device)
        if self.index == 0:
            self._comm.exchange([(peer, told) for peer in range(1, self.size)], []).wait()
            return list(values)
        self._comm.exchange([], [(0, told)]).wait()
        found: list[int] = told.tolist()
        return found

    def close(self) -> None:
        """Leave the group."""
        self._comm.close()


def span(width: int, index: int, size: int) -> slice:
    """Part of `width` columns, rows or elements that belongs to one of `size` processes."""
    return slice(width * index // size, width * (index + 1) // size)


def _add(parts: Sequence[Tensor]) -> Tensor:
    """Add tensors in their order, in float32 at least; return a new one of their dtype."""
    dtype = parts[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.add(parts[0].to(wide), parts[1])
    for part in parts[2:]:
        total.add_(part)
    return total.to(dtype)
