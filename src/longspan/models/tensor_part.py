"""A process's part of a model, and the places where the parts of a rank are put together.

Holds which rows and columns a part has, and the sums behind modules. Must not know plans of families, pages, or how
processes reach each other.
Read next: `longspan.comm.peers`, the sums; `longspan.models.tensor_parallel`, which cuts models.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from longspan.comm.peers import Peers, span

JOINT = "longspan_joint"
"""Attribute of a module whose output is a part of a sum: its `Joint`."""


class Part(NamedTuple):
    """Which part of a model a process has."""

    tp_index: int
    """Position of the process in its rank."""
    size: int
    """Processes of the rank."""

    def of(self, width: int) -> slice:
        """This part of so many rows or columns."""
        return span(width, self.tp_index, self.size)

    def rows(self, width: int, least: int) -> slice:
        """This part of so many rows, `least` of which stay together: several parts may have the same ones."""
        count = max(width // self.size, least)
        first = self.of(width).start // count * count
        return slice(first, first + count)


class PartPeers:
    """The other processes of a part's rank; until they are there, sums are of this part alone."""

    peers: Peers | None = None

    def sum(self, part: Tensor) -> Tensor:
        return part if self.peers is None else self.peers.sum(part)

    def gather(self, part: Tensor, width: int) -> Tensor:
        return part if self.peers is None else self.peers.gather(part, width)


class Joint(NamedTuple):
    """Place behind a module where the parts of all processes are added."""

    peers: PartPeers
    bias: Tensor | None
    """Bias of the module, which is added to the sum."""

    def __call__(self, part: Tensor) -> Tensor:
        """Add the parts, and the bias."""
        total = self.peers.sum(part)
        return total if self.bias is None else total + self.bias


def join_(module: nn.Module, joint: Joint) -> None:
    """Let parts of a module's output be added behind it."""
    setattr(module, JOINT, joint)
    module.register_forward_hook(lambda _module, _args, out: joint(out))


def bias_behind(linear: Any) -> Tensor | None:
    """Bias that is added to a linear layer's product, or to the sum of its parts."""
    joint: Joint | None = getattr(linear, JOINT, None)
    bias: Tensor | None = linear.bias if joint is None else joint.bias
    return bias
